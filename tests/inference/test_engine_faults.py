"""What goes wrong in an engine: interrupts, damaged files, requests that cannot be done."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.test_engine import (
    GREEDY,
    MODELS,
    VOCAB,
    Poisoned,
    alone,
    check,
    new_models,
)
from tests.model.test_language_model import small
from transnormer import Engine, LanguageModel, RequestSettings, State
from transnormer.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def models(prepared: Path) -> dict[str, LanguageModel]:
    return new_models(prepared)


@pytest.mark.parametrize("name", ["convolved", "softmax"])
def test_a_step_that_is_interrupted_anywhere_loses_nothing(
    name: str, models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draw = models[name], random.Random(0)
    settings = RequestSettings(max_tokens=8, seed=3, repetition_penalty=1.2, stop_ids=())

    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if draw.random() < 0.3:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    engine = Poisoned(model, slots=2, piece=4)
    handles = [engine.submit([n + 1, 5, 6, 7, 8, 9], settings) for n in range(4)]
    monkeypatch.setattr(model.layers[1], "step_", interrupted(model.layers[1].step_))
    for name in ("_read", "_join", "_finish"):
        monkeypatch.setattr(Poisoned, name, interrupted(getattr(Poisoned, name)))
    while any(handle.finish_reason is None for handle in handles):
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    for n, handle in enumerate(handles):
        check(handle.result(), alone(model, [n + 1, 5, 6, 7, 8, 9], settings))


@pytest.mark.parametrize("name", ["published", "hybrid"])
def test_an_interrupt_at_any_line_loses_nothing(
    name: str, models: dict[str, LanguageModel]
) -> None:
    files = tuple(f"inference/{each}.py" for each in ("engine", "scheduler", "prefixes"))
    draw, lines, stopped = random.Random(5), 60, 0

    def interrupted(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines, stopped
        lines -= event == "line"
        if lines < 0:
            lines, stopped = draw.randint(20, 300), stopped + 1
            raise KeyboardInterrupt
        return interrupted

    def watched(frame: Any, event: str, _: Any) -> Any:
        return interrupted if frame.f_code.co_filename.endswith(files) else None

    prompts = [[7, 3, 9] * 4, [7, 3, 9, 1], [5], [7, 3, 9] * 3, [4] * 12]
    settings = [
        RequestSettings(max_tokens=6, seed=n, logprobs=n == 1, keep=n == 2, stop_ids=(n,))
        for n in range(len(prompts))
    ]
    engine = Poisoned(models[name], slots=2, piece=5, prefix_bytes=100_000)
    handles = [engine.submit(*pair) for pair in zip(prompts, settings, strict=True)]
    before = sys.gettrace()
    while any(handle.finish_reason is None for handle in handles):
        sys.settrace(watched)
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert stopped < 2_000
    assert stopped > 5
    while engine.step():
        pass
    assert (engine.stats().used, engine.stats().waiting) == (0, 0)
    for handle, ids, wanted in zip(handles, prompts, settings, strict=True):
        found, plain = handle.result(), alone(models[name], ids, wanted)
        check(found, plain)


def test_a_request_that_cannot_join_ends_alone(models: dict[str, LanguageModel]) -> None:
    engine = Engine(models["published"], slots=2)
    first, second = engine.submit([1], GREEDY), engine.submit([2], GREEDY)
    first._request.settings = dataclasses.replace(GREEDY)
    object.__setattr__(first._request.settings, "top_k", 2**70)
    assert first.result().finish_reason == "error"
    assert "Overflow" in (first.result().error or "")
    assert second.result().finish_reason == "length"


@pytest.mark.parametrize(
    "wrong",
    [
        {"seen": torch.tensor([-1])},
        {"seen": torch.tensor([1.0])},
        {"seen": torch.tensor([[1]])},
        {"tokens": torch.tensor([1.0, 2.0, 3.0])},
        {"tokens": torch.tensor([[1, 2, 3]])},
        {"logprobs": torch.zeros(7, dtype=torch.float64)},
        {"0.0": torch.zeros(0, 3, 8, 8, dtype=torch.float64)},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(
    wrong: dict[str, torch.Tensor], models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    engine, path = Engine(models["published"]), tmp_path / "state.safetensors"
    handle = engine.submit([1, 2, 3], dataclasses.replace(GREEDY, keep=True))
    handle.result()
    engine.save_state(handle, path)
    tensors, metadata = read_tensors(path)
    if "0.0" in wrong:
        wrong = {"0.0": tensors["0.0"][:0]}
    write_tensors(path, {**tensors, **wrong}, metadata)
    with pytest.raises(ValueError, match=str(path)):
        engine.load_state(path)


def test_a_file_goes_on_in_the_same_model_alone(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    path, settings = tmp_path / "request.safetensors", RequestSettings(seed=5, max_tokens=30)
    model, engine = models["windows"], Engine(models["windows"])
    handle = engine.submit("O brother, ", settings)
    while len(handle.tokens) < 9:
        engine.step()
    engine.save_state(handle, path)
    assert Engine(model).load_state(path, settings=settings).result().text == handle.result().text
    with pytest.raises(ValueError, match=r"request.safetensors: saved with another model, or with"):
        Engine(models["published"]).load_state(path)
    other = small(vocab_size=VOCAB, **MODELS["windows"])
    other.load_state_dict(model.state_dict())
    Engine(other).load_state(path)
    other.head_weight.data[5, 3] += 1e-9
    with pytest.raises(ValueError, match="another model, or with other weights"):
        Engine(other).load_state(path)
    State.new(model).save(path)
    with pytest.raises(ValueError, match="not a request that an engine saved"):
        engine.load_state(path)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match="truncated, damaged or not a safetensors file"):
        engine.load_state(path)


def test_what_cannot_be_done_is_refused_at_once(models: dict[str, LanguageModel]) -> None:
    model, growing = models["published"], models["hybrid"]
    engine, bare = Engine(model, slots=1), small(vocab_size=VOCAB)
    for call, message in (
        (lambda: Engine(model, slots=0), "slots = 0, but must be 1 or more"),
        (lambda: Engine(model, piece=0), "piece = 0, but must be 1 or more"),
        (lambda: Engine(model, record=True), "record = True needs a model on a GPU"),
        (lambda: Engine(growing), "keeps keys and values of the whole text.*needs a capacity"),
        (lambda: Engine(growing, capacity=20).submit([1] * 15, GREEDY), "15 .* and 6 .* the 20 "),
        (lambda: Engine(growing, capacity=500).submit([1] * 95, GREEDY), "the 96 that a text"),
        (lambda: engine.submit([5, VOCAB]), "prompt: token 300 is outside the vocabulary of 300"),
        (lambda: engine.submit([-1]), "prompt: token -1 is outside"),
        (lambda: engine.submit([1], RequestSettings(bias={300: 1})), "bias: token 300"),
        (lambda: engine.submit([1], RequestSettings(stop_ids=[400])), "stop_ids: token 400"),
        (lambda: Engine(bare).submit("text"), "no tokenizer"),
        (lambda: Engine(bare).submit([1], RequestSettings(stop="x")), "no tokenizer"),
        (lambda: Engine(bare).submit([]), "the prompt is empty, and the model has no end-of-text"),
        (lambda: engine.submit([1.5]), "'float' object cannot be interpreted as an integer"),
        (lambda: engine.generate("text"), "prompts must be a list; got the single 'text'"),
        (lambda: engine.generate([[1]], []), "0 settings were given for 1 prompts"),
        (lambda: RequestSettings(max_tokens=-1), "max_tokens = -1, but must be 0 or more"),
        (lambda: RequestSettings(stop=["a", ""]), "stop: an empty string"),
        (lambda: RequestSettings(bias={3: float("nan")}), "bias of token 3 = nan"),
        (
            lambda: RequestSettings(bias={3: 1e39}),
            "bias of token 3 = 1e.39, but must be from",
        ),
        (lambda: RequestSettings(top_k=10**30), "top_k must be below"),
        (lambda: RequestSettings(temperature=10.0**40), "temperature = 1e.40, but must be at most"),
        (lambda: RequestSettings(repetition_penalty=1e-60), "must be from 1e-6 to 1e6"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    with pytest.raises(ValueError, match="prompt: token 300"):
        engine.generate([[1], [2], [300]])
    assert (engine.stats().waiting, engine.stats().used) == (0, 0)
    ended = engine.submit([1], GREEDY)
    ended.result()
    with pytest.raises(ValueError, match="request 3 has ended, and its state was not kept"):
        engine.fork(ended, [1])
    running = engine.submit([1], dataclasses.replace(GREEDY, keep=True))
    running.result()
    with pytest.raises(ValueError, match="already longer than these settings would write"):
        engine.fork(running, settings=dataclasses.replace(GREEDY, max_tokens=2))
    running = engine.submit([1], GREEDY)
    engine.step()
    with pytest.raises(ValueError, match="request 6 is another engine's"):
        Engine(model).fork(running)
    with pytest.raises(ValueError, match="logprobs: those of the tokens written so far"):
        engine.fork(running, settings=dataclasses.replace(GREEDY, logprobs=True))
