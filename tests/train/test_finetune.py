"""Fine-tuning from records to answers: how conversations are packed, what is learned of them, and
what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import transnormer
from transnormer.config import TRANSFORMER
from transnormer.data.chat import DEFAULT, FILE
from transnormer.data.loader import Loader
from transnormer.data.shards import TokenData
from transnormer.data.tokenizer import encode, load_tokenizer
from transnormer.run_folder import step_folders
from transnormer.train.loop import train
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

from ..lazy import Lazy
from ..test_cli import call
from .runs import load
from .tuning import PLACES, curve, small_model, tune, weights, write_records

datasets, transformers, trl = map(Lazy, ("datasets", "transformers", "trl"))


# Packing.


@pytest.mark.parametrize(
    "changes", [{}, {"position_layers": "all", "tie_word_embeddings": False}, TRANSFORMER]
)
def test_packed_conversations_are_read_as_if_each_stood_alone(
    tuning: Path, prepared: Path, changes: dict
) -> None:
    model = (
        small_model(prepared, tuning / "other", **changes, initializer_range=0.2).double().eval()
    )
    train(tune("run=prepares", "train.steps=1", "data.split=0"))
    data = TokenData("data")
    loader = Loader(data, seq_len=100, batch_size=2, seed=0, reset_state=True)
    batches = [loader.batch([n]) for n in range(loader.count)]
    assert max(len(batch.cu_seqlens) for batch in batches) > 4
    packed = sum(
        model.loss(*batch[:2], cu_seqlens=batch.cu_seqlens, reduction="sum").item()
        for batch in batches
    )
    words, alone, start = load_tokenizer(prepared), 0.0, 0
    for name, place in PLACES.items():
        before = [*encode(words, f"user\nWhere is {name}?"), 0, *encode(words, "assistant\n")]
        answer = [*encode(words, place), 0]
        ids = torch.tensor([before + answer])
        targets = torch.tensor([[-100] * (len(before) - 1) + answer])
        assert data.window(start, ids.shape[1]).tolist() == ids[0].tolist()
        alone += model.loss(ids[:, :-1], targets, reduction="sum").item()
        start += ids.shape[1]
    assert start == data.tokens
    assert packed == pytest.approx(alone, rel=1e-12)
    without = Loader(data, seq_len=100, batch_size=2, seed=0)
    mixed = sum(
        model.loss(*without.batch([n])[:2], reduction="sum").item() for n in range(without.count)
    )
    assert mixed != pytest.approx(alone, rel=1e-3)  # so the state does matter


def test_trl_packs_masks_and_weighs_the_same(tuning: Path) -> None:
    train(tune("run=prepares", "train.steps=1", "data.split=0"))
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = DEFAULT
    records = datasets.Dataset.from_list(
        [json.loads(line) for line in Path("records.jsonl").read_text().splitlines()]
    )
    settings = trl.SFTConfig(
        "theirs",
        max_length=600,
        packing=True,
        assistant_only_loss=True,
        report_to="none",
        bf16=False,
        use_cpu=True,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    trainer = trl.SFTTrainer(model, settings, train_dataset=records, processing_class=tokenizer)
    (theirs,) = trainer.get_train_dataloader()
    data = TokenData("data")
    ours = Loader(data, seq_len=data.tokens, batch_size=1, seed=0, reset_state=True).batch([0])
    assert theirs["input_ids"].shape == (1, data.tokens)
    assert (theirs["labels"] != -100).sum() == ours.learned == data.learned
    loss = transnormer.load("base").loss(*ours[:2], cu_seqlens=ours.cu_seqlens)
    torch.testing.assert_close(model.eval()(**theirs).loss, loss, rtol=1e-5, atol=0)


def test_the_loss_is_a_mean_over_what_is_learned_in_the_whole_step(tuning: Path) -> None:
    for number, overrides in enumerate(((), ("train.accumulate=4",), ("train.recompute=true",))):
        train(tune(f"run=r{number}", *overrides))
    first, second, third = (curve(f"r{n}") for n in range(3))
    assert [loss for _, loss, _ in first] == pytest.approx(
        [loss for _, loss, _ in second], rel=1e-4
    )
    assert [loss for _, loss, _ in first] == pytest.approx([loss for _, loss, _ in third], rel=1e-5)
    model, valid = transnormer.load("runs/r0"), TokenData("data", "valid")
    nats = learned = 0
    for start, stop in zip([0, *valid.document_ends()], valid.document_ends(), strict=False):
        ids, (marks, _) = (
            torch.from_numpy(valid.window(start, stop - start))[None],
            valid.marks(start, stop - start),
        )
        targets = ids.where(torch.from_numpy(marks), -100)
        nats += model.loss(ids[:, :-1], targets[:, 1:], reduction="sum").item()
        learned += int(marks.sum())
    assert first[-1][2] == pytest.approx(nats / learned, rel=1e-4)
    line = read_metrics(Path("runs/r0/metrics.jsonl"))[-1]
    assert line["valid_bits_per_byte"] == pytest.approx(nats / valid.bytes / 0.693147, rel=1e-4)


def test_text_may_reset_its_state_too(tuning: Path, prepared: Path, text_file: Path) -> None:
    lines = [{"text": text} for text in text_file.read_text()[:9_000].split("\n\n")]
    (tuning / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("data.format=text", "data.text=lines.jsonl", "train.seq_len=128")
    for run, reset in (("carry", ()), ("fresh", ("train.reset_state=true",))):
        train(tune(f"run={run}", f"data.path={run}", *options, *reset))
    carry, fresh = ([loss for _, loss, _ in curve(run)] for run in ("carry", "fresh"))
    assert all(loss < 6 for loss in fresh)
    assert all(a != b for a, b in zip(carry, fresh, strict=True))
    assert Recipe.load("runs/fresh/recipe.toml").train.reset_state is True


# From records to answers.


def check_answers(run: Path, places: dict[str, str]) -> None:
    """A chat gives the answers of some training questions, word for word."""
    for name in ("Ann", "Hal", "Una"):
        out, _ = call("chat", "--model", run, "--temperature", 0, text=f"Where is {name}?\n")
        assert out == f"> {places[name]}\n> \n"


def test_what_was_learned_is_said_in_a_chat(tuning: Path, prepared: Path) -> None:
    path, options = (
        Path("pretrain.toml"),
        ("train.seq_len=576", "train.batch_tokens=576", "checkpoint.every=0"),
    )
    path.write_text(
        Path("tune.toml")
        .read_text()
        .replace('from = "base"', "num_hidden_layers = 2\nhidden_size = 64")
    )
    sizes = ("model.num_attention_heads=2", "model.intermediate_size=128", "model.embed_scale=true")
    text = ("data.text=[]", "data.format=text", f"data.path={prepared}", "train.steps=20")
    base = train(load(path, *sizes, *options, *text)).folder
    run = train(
        tune("run=say", f"model.from={base}", "train.steps=120", "data.split=0", *options)
    ).folder
    losses = [loss for _, loss, _ in curve("say")]
    assert losses[0] > 4
    assert losses[-1] < 0.05
    assert (step_folders(run / "checkpoints")[0] / FILE).read_text() == DEFAULT
    check_answers(run, PLACES)

    moved = dict(zip(PLACES, [*list(PLACES.values())[7:], *PLACES.values()], strict=False))
    write_records(Path("moved.jsonl"), moved)
    data = ("data.path=moved", "data.text=moved.jsonl", "data.split=0")
    adapted = train(
        tune("run=moved", f"model.from={run}", "train.steps=60", *data, *options, "lora.rank=16")
    ).folder
    losses = [loss for _, loss, _ in curve("moved")]
    assert losses[0] > 2
    assert losses[-1] < 0.1
    check_answers(adapted, moved)

    cut = ("chat", "--model", run, "--temperature", 0, "--max-tokens", 1)
    out, _ = call(*cut, text="Where is Ann?\nWhere is Bob?\n")
    assert out.count("> ") == 3
    for model, option, message in (
        (run, "--stop", "without a chat template"),
        ("base", "--system", "needs a chat"),
    ):
        _, error = call("chat", "--model", model, option, "x", text="\n", code=1)
        assert message in error


def test_a_run_of_all_weights_resumes_exactly(tuning: Path) -> None:
    train(tune("run=whole"))
    train(tune("run=cut"))
    for folder in step_folders(Path("runs/cut/checkpoints"))[:1]:
        shutil.rmtree(folder)  # back to step 9
    train(tune("run=cut"))
    assert curve("cut") == curve("whole")
    one, other = weights("runs/whole"), weights("runs/cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


# What does not fit.


def test_data_must_be_encoded_with_the_models_tokenizer(
    tuning: Path, prepared: Path, text_file: Path
) -> None:
    from transnormer.data.prepare import prepare

    prepare([text_file], tuning / "words", vocab_size=310, split=0.1)
    with pytest.raises(
        ValueError,
        match=r"words has 310 words, base 300; prepare its text again with --tokenizer base",
    ):
        train(tune("data.path=words", "data.text=[]", "data.format=text"))
    prepare([text_file], tuning / "fewer", vocab_size=290, split=0.1)
    with pytest.raises(ValueError, match="fewer was not encoded with the tokenizer of base"):
        train(tune("data.path=fewer", "data.text=[]", "data.format=text"))
    train(tune("train.steps=1"))
    with pytest.raises(
        ValueError,
        match=r"was prepared with data\.format = 'messages', but the recipe says 'alpaca'",
    ):
        train(tune("run=other", "data.format=alpaca"))
    assert not Path("runs/words").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_size=64", "model.size=10m"],
            r"model\.from says what the model is; remove model\.hidden_size, model\.size",
        ),
        (["model.from=nowhere"], "nowhere: no such folder"),
        (["model.from=3"], "3: no such folder"),
        (["model.from=''"], r"model\.from = '', but must be a model's folder"),
        (["lora.dropout=0.1", "train.segment=8"], r"train\.segment reads rows twice"),
        (
            ["lora.dropout=0.1", "train.graph=true", "train.recompute=true"],
            r"train\.graph cannot recompute what lora\.dropout",
        ),
        (["lora.rnak=3"], r"unknown key lora\.rnak; did you mean lora\.rank\?"),
        (["lora.rank=0"], r"lora\.rank = 0, but must be positive"),
        (
            ["lora.targets=qkv_proj"],
            r"no linear map of the blocks is called 'qkv_proj'; did you mean qkvu_proj\?",
        ),
        (["lora.targets=lm_head"], r"no linear map of the blocks is called 'lm_head'"),
        (["train.reset_state=3"], r"train\.reset_state = 3, but must be true or false"),
        (
            ["data.format=message"],
            r"data\.format = 'message', but must be one of .*did you mean messages\?",
        ),
        (["data.chat_template=gone.jinja"], r"gone\.jinja: no such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tuning: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        train(tune(*overrides))
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()
