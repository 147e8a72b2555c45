"""`generate --prompts`: a file of prompts to a file of texts."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import transnormer
from tests.test_cli import call, refused
from transnormer import Engine, LanguageModel, ModelConfig, RequestSettings
from transnormer.__main__ import interrupt
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference.batch import read_lines, write_texts

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def model(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = LanguageModel(ModelConfig(**SMALL))
    model.tokenizer = load_tokenizer(prepared)
    model.save_pretrained(folder)
    return folder


def test_each_line_is_answered_as_generate_answers_it(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    lines = [
        {"prompt": "To be"},
        {"prompt": "Speak", "id": "second", "seed": 7, "max_tokens": 5, "temperature": 0},
        {"prompt": "", "stop": ["e", "a"], "top_p": 1, "id": None},
        {"prompt": "Ö", "max_tokens": 0},
    ]
    prompts.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    verb = ("generate", "--model", model, "--prompts", prompts, "--out", out)
    call(*verb, "--seed", 3, "--max-tokens", 20)
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [each["id"] for each in found] == [0, "second", 2, 3]
    assert all([*each] == ["id", "text", "tokens", "finish_reason"] for each in found)
    assert [each["finish_reason"] for each in found][3] == "length"
    assert [len(each["tokens"]) for each in found][1::2] == [5, 0]
    options = ("generate", "--model", model, "--seed")
    for each, prompt, more in (
        (found[0], "To be", (3, "--max-tokens", 20)),
        (found[1], "Speak", (7, "--max-tokens", 5, "--temperature", 0)),
        (found[2], "", (3, "--max-tokens", 20, "--stop", "e", "--stop", "a", "--top-p", 1)),
    ):
        assert call(*options, *more, "--prompt", prompt)[0] == (prompt + each["text"] + "\n")
    before = out.read_bytes()
    call(*verb, "--seed", 3, "--max-tokens", 20, "--slots", 1)
    assert out.read_bytes() == before


def test_what_would_be_lost_or_too_large_is_refused(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "To be"}\n{"prompt": "", "max_tokens": 1000000000000}\n')
    verb = ("generate", "--model", model, "--prompts", prompts, "--out")
    assert "would overwrite the prompts" in refused(*verb, prompts)
    growing = LanguageModel(ModelConfig(**{**SMALL, "mixer": "softmax", "position": "rope"}))
    growing.tokenizer = load_tokenizer(model)
    lines = read_lines(prompts, RequestSettings())
    with pytest.raises(ValueError, match=r"line 2: a text of 1,000,000,000,001 tokens needs"):
        write_texts(growing, lines, out)


def test_what_prompts_share_is_read_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    beginning = "Before we proceed any further, hear me speak. "
    lines = [{"prompt": beginning + end} for end in ("Speak", "No", "You are", "What", "Resolved")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    engines: list[Engine] = []

    def remembered(engine: Engine, *arguments: Any, **options: Any) -> None:
        make(engine, *arguments, **options)
        engines.append(engine)

    make = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", remembered)
    verb = ("generate", "--model", model, "--prompts", prompts, "--out", out, "--temperature", 0)
    texts = []
    for options in ((), ("--prefix-mib", 0)):
        call(*verb, "--slots", 1, "--max-tokens", 5, *options)
        texts.append(out.read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    assert [engine.stats().prefix_hits for engine in engines] == [3, 0]


def test_a_bad_line_is_named_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    verb = ("generate", "--model", model, "--prompts", prompts, "--out", out)
    for line, message in (
        ({"text": "x"}, "no field 'prompt'"),
        ({"prompt": 5}, "prompt holds int, not a string"),
        ({"prompt": "x", "max_token": 5}, "unknown field 'max_token'; a line may have id, prompt,"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens holds float, not int"),
        ({"prompt": "x", "seed": True}, "seed holds bool, not int"),
        ({"prompt": "x", "top_p": 2}, "top_p = 2, but must be above 0"),
        ({"prompt": "x", "stop": [3]}, "stop holds int, not a string"),
        ({"prompt": "x", "id": []}, "id holds list, not a string or a whole number"),
        (["x"], "not a JSON object but list"),
    ):
        prompts.write_text('{"prompt": "fine"}\n\n' + json.dumps(line) + "\n")
        assert f"{prompts} line 3: {message}" in refused(*verb)
    prompts.write_text("\n")
    assert "holds no prompt" in refused(*verb)
    assert "no such file" in refused(*verb[:4], "none.jsonl", *verb[5:])
    prompts.write_text('{"prompt": "x"}\n' * 3)
    assert "cannot be written" in refused(*verb[:-1], tmp_path / "no" / "such")
    assert "belong together" in refused(*verb, "--prompt", "x")
    assert "belong together" in refused(*verb[:-2])
    assert not out.exists()


def test_a_file_that_is_not_complete_does_not_appear(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "x"}\n' * 3)
    out.write_text("before")

    def interrupted(engine: Engine) -> None:
        if engine.stats().tokens_written > 20:
            interrupt(signal.SIGINT, sys._getframe())
        step(engine)

    step = Engine.step
    monkeypatch.setattr(Engine, "step", interrupted)
    call("generate", "--model", model, "--prompts", prompts, "--out", out, code=130)
    assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {prompts.name, out.name}


def test_texts_that_end_with_an_error_say_so(model: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "x"}\n{"prompt": "", "max_tokens": 0}\n')
    broken = transnormer.load(model)
    broken.head_weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="1 of 2 texts ended with an error: the model's logits"):
        write_texts(broken, read_lines(prompts, RequestSettings()), out)
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["finish_reason"], first["tokens"]) == ("error", [])
    assert "not finite" in first["error"]
    assert "error" not in second
