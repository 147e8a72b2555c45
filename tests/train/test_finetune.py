"""Fine-tuning: all weights and LoRA, from records to answers, and what binds a run to the model it
began from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.config import TRANSFORMER
from transnormer.data.chat import DEFAULT, FILE
from transnormer.data.loader import Loader
from transnormer.data.shards import TokenData
from transnormer.data.tokenizer import encode, load_tokenizer
from transnormer.run_folder import step_folders
from transnormer.train import lora
from transnormer.train.loop import train
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Lora, Recipe

from ..lazy import Lazy
from ..test_cli import call
from .runs import load, train_on_two

datasets, peft, transformers, trl = map(Lazy, ("datasets", "peft", "transformers", "trl"))

PLACES = {
    "Ann": "Rome", "Bob": "Oslo", "Cal": "Lima", "Dot": "Bonn", "Eve": "Cork", "Flo": "Kiev",
    "Gus": "Riga",
    "Hal": "Bern", "Ida": "Nice", "Jon": "Pisa", "Kit": "York", "Leo": "Bath", "Max": "Deal",
    "Ned": "Hove",
    "Ora": "Hull", "Pam": "Ayr", "Roy": "Ely", "Sam": "Wem", "Tom": "Diss", "Una": "Ware",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    import transnormer.hub  # noqa: F401  registers our classes with the Auto classes


@pytest.fixture
def work(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an untrained model, twenty records, and a recipe that tunes the one on the
    other."""
    small_model(prepared, tmp_path / "base")
    write_records(tmp_path / "records.jsonl", PLACES)
    (tmp_path / "tune.toml").write_text(
        """
        [model]
        from = "base"
        [data]
        path = "data"
        text = ["records.jsonl"]
        format = "messages"
        split = 0.2
        [train]
        steps = 12
        seq_len = 64
        batch_tokens = 256
        [optim]
        lr = 1e-2
        weight_decay = 0.0
        warmup_steps = 4
        [eval]
        every = 4
        [checkpoint]
        every = 3
        """
    )
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write_records(path: Path, places: dict[str, str]) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Where is {name}?"},
                {"role": "assistant", "content": place},
            ]
        }
        for name, place in places.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_model(prepared: Path, folder: Path, **changes) -> LanguageModel:
    config = ModelConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        **changes,
    )
    torch.manual_seed(1)
    model = LanguageModel(config)
    model.tokenizer = load_tokenizer(prepared)
    model.save_pretrained(folder)
    return model


def tune(*overrides: str) -> Recipe:
    return load("tune.toml", *overrides)


def curve(run: str) -> list[tuple[int, float, float | None]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [(line["step"], line["loss"], line.get("valid_loss")) for line in lines]


def means(curve: list[tuple[int, float, float | None]]) -> list[float]:
    return [loss for _, loss, _ in curve]


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return transnormer.load(run).state_dict()


# Packing.


@pytest.mark.parametrize(
    "changes", [{}, {"position_layers": "all", "tie_word_embeddings": False}, TRANSFORMER]
)
def test_packed_conversations_are_read_as_if_each_stood_alone(
    work: Path, prepared: Path, changes: dict
) -> None:
    model = small_model(prepared, work / "other", **changes, initializer_range=0.2).double().eval()
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


def test_trl_packs_masks_and_weighs_the_same(work: Path) -> None:
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


def test_the_loss_is_a_mean_over_what_is_learned_in_the_whole_step(work: Path) -> None:
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


def test_text_may_reset_its_state_too(work: Path, prepared: Path, text_file: Path) -> None:
    lines = [{"text": text} for text in text_file.read_text()[:9_000].split("\n\n")]
    (work / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
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


def test_what_was_learned_is_said_in_a_chat(work: Path, prepared: Path) -> None:
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
    text = ("data.text=[]", "data.format=text", f"data.path={prepared}", "train.steps=100")
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


# Adapters.


def test_an_adapter_is_trained_merged_and_read_by_peft(work: Path) -> None:
    before = weights("base")
    targets = 'lora.targets=["qkvu_proj", "glu.down_proj"]'
    run = train(tune("run=adapt", "lora.rank=4", targets, "train.dtype=bfloat16")).folder
    newest = step_folders(run / "checkpoints")[0]
    changed = {
        name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {
        f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("mixer.qkvu_proj", "glu.down_proj")
    }
    ids = torch.randint(300, (2, 30))
    merged = transnormer.load(run)(ids)[0]
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained("base"), str(newest / lora.FOLDER)
    )
    unmerged = theirs(ids).logits
    assert (unmerged - transnormer.load("base")(ids)[0]).abs().max() > 0.1
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, theirs.merge_and_unload()(ids).logits, rtol=1e-5, atol=1e-5)
    memory = (newest / "optimizer.safetensors").stat().st_size
    assert memory < sum(t.nbytes for t in before.values())  # of the adapters alone


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "gate_rank": 3, "bias": True}, TRANSFORMER],
    ids=str,
)
def test_merged_and_unmerged_models_agree(work: Path, prepared: Path, changes: dict) -> None:
    model = small_model(prepared, work / "other", **changes, initializer_range=0.2).eval()
    ids = torch.randint(300, (2, 30))
    before, count = model(ids)[0], model.parameter_count()
    lora.inject(model, Lora(rank=3, alpha=5), work / "other")
    torch.testing.assert_close(model(ids)[0], before)  # B begins at zero
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    after = model(ids)[0]
    whole = LanguageModel.from_tensors(
        model.config, dict(lora.merged(model, model.state_dict())), "the merged model"
    )
    assert (after - before).abs().max() > 0.1
    assert whole.parameter_count() == count
    assert whole.state_dict().keys() == transnormer.load("other").state_dict().keys()
    torch.testing.assert_close(whole(ids)[0], after, rtol=1e-4, atol=1e-4)


# The command line, which kills itself in the middle of a step once there is a checkpoint.
KILLED = """
import os, pathlib, signal
from transnormer.cli import main
from transnormer.train import loop
gradients = loop.gradients
def killed(*inputs):
    loss = gradients(*inputs)
    if any(pathlib.Path("runs/killed/checkpoints").glob("step-*")):
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
loop.gradients = killed
main()
"""


def test_a_killed_lora_run_loses_nothing(work: Path) -> None:
    options = ("lora.dropout=0.2", "train.steps=40")
    train(tune("run=whole", *options))
    command = [sys.executable, "-c", KILLED, "train", "tune.toml", "run=killed", *options]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    assert done.returncode == -signal.SIGKILL
    train(tune("run=killed", *options))
    assert len(json.loads(Path("runs/killed/run.json").read_text())["starts"]) == 2
    assert curve("killed") == curve("whole")
    adapters = [
        step_folders(Path("runs") / run / "checkpoints")[0] / lora.FOLDER
        for run in ("whole", "killed")
    ]
    for name in (lora.WEIGHTS, "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in adapters}) == 1
    one, other = weights("runs/whole"), weights("runs/killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def remembered(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: x
        for path in folder.glob("optimizer*.safetensors")
        for name, x in load_file(path).items()
    }


MESHES = {
    "shard": (),
    "context": ("parallel.context=2", "train.recompute=true"),
    "replicate": ("parallel.replicate=2", "lora.dropout=0.3"),
}


def test_adapters_on_two_processes(work: Path) -> None:
    """Those of one process; merged, saved for peft; and gone on with from a step that was also
    evaluated."""
    options = ("lora.rank=4", "checkpoint.every=2", "checkpoint.keep=9", "eval.every=3")
    runs = {name: (f"run={name}", *options, *mesh) for name, mesh in MESHES.items()}
    for name, dropout in (("one", ()), ("one-replicate", ("lora.dropout=0.3",))):
        train(tune(f"run={name}", *options, *dropout))
    train_on_two(*runs.values(), recipe="tune.toml")
    base, whole = weights("base"), {name: (curve(name), weights(f"runs/{name}")) for name in runs}
    for name, (losses, merged) in whole.items():
        dropout = name == "replicate"
        alone = "one-replicate" if dropout else "one"
        one, two = (step_folders(Path("runs") / run / "checkpoints") for run in (alone, name))
        config = f"{lora.FOLDER}/adapter_config.json"
        assert (one[0] / config).read_text() == (two[0] / config).read_text()
        assert len(remembered(one[3])) > 0
        assert remembered(two[3]).keys() == remembered(one[3]).keys() | {"torch_rng/1"}
        # each drops out its own
        assert not torch.equal(*(remembered(two[3])[f"torch_rng/{rank}"] for rank in (0, 1)))
        if not dropout:
            assert means(losses) == pytest.approx(means(curve("one")), rel=1e-3)
            for each, tensor in weights("runs/one").items():
                assert (merged[each] - tensor).norm() <= 0.02 * (tensor - base[each]).norm(), each
        ids = torch.randint(300, (2, 30))
        theirs = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained("base"), str(two[0] / lora.FOLDER)
        )
        torch.testing.assert_close(
            transnormer.load(f"runs/{name}")(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-4
        )
        for folder in two[:3]:  # back to step 6
            shutil.rmtree(folder)
    train(tune(*runs["shard"]))
    assert means(curve("shard")) == pytest.approx(means(whole["shard"][0]), rel=1e-3)
    again = [name for name in runs if name != "shard"]
    train_on_two(*(runs[name] for name in again), recipe="tune.toml")
    for name in again:
        losses, merged = whole[name]
        assert curve(name) == losses
        found = weights(f"runs/{name}")
        assert all(torch.equal(found[each], tensor) for each, tensor in merged.items())


def test_a_run_of_all_weights_resumes_exactly(work: Path) -> None:
    train(tune("run=whole"))
    train(tune("run=cut"))
    for folder in step_folders(Path("runs/cut/checkpoints"))[:1]:
        shutil.rmtree(folder)  # back to step 9
    train(tune("run=cut"))
    assert curve("cut") == curve("whole")
    one, other = weights("runs/whole"), weights("runs/cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_damage_to_an_adapter_and_another_base_are_named(
    work: Path, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("run=hurt", "lora.rank=2", "train.seq_len=16")
    run = train(tune(*options)).folder
    newest, older = step_folders(run / "checkpoints")
    file = newest / lora.FOLDER / lora.WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    train(tune(*options))
    said = capfd.readouterr().err
    assert "step-0000012: adapter/adapter_model.safetensors is truncated" in said
    assert f"goes on from {older.name}" in said
    assert "conversations do not fit into seq_len 16 and are cut" in said
    assert (newest.with_name(f"damaged-{newest.name}") / lora.FOLDER / lora.WEIGHTS).exists()
    shutil.rmtree(newest)
    small_model(prepared, work / "base", initializer_range=0.1)
    with pytest.raises(
        ValueError, match=r"was trained on other weights than model\.from holds now"
    ):
        train(tune(*options))


# What does not fit.


def test_data_must_be_encoded_with_the_models_tokenizer(
    work: Path, prepared: Path, text_file: Path
) -> None:
    from transnormer.data.prepare import prepare

    prepare([text_file], work / "words", vocab_size=310, split=0.1)
    with pytest.raises(
        ValueError,
        match=r"words has 310 words, base 300; prepare its text again with --tokenizer base",
    ):
        train(tune("data.path=words", "data.text=[]", "data.format=text"))
    prepare([text_file], work / "fewer", vocab_size=290, split=0.1)
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
def test_what_is_wrong_is_said_in_one_line(work: Path, overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        train(tune(*overrides))
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_adapters_need_a_model_to_stand_on(work: Path) -> None:
    recipe = Path("tune.toml")
    recipe.write_text(
        recipe.read_text().replace('from = "base"', "hidden_size = 48") + "[lora]\nrank = 4\n"
    )
    with pytest.raises(
        ValueError, match=r"lora needs model\.from, the folder of the model to adapt"
    ):
        tune()
