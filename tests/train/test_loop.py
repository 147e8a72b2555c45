"""Runs as a user starts them: real processes, real kills, a full disk, damaged checkpoints."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import resource
import shutil
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transnormer
from transnormer.run_folder import step_folders
from transnormer.train import loop, metrics
from transnormer.train.loop import train
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe
from transnormer.train.stopping import STOPS

from .runs import ENDLESS, PATIENCE, STEPS, curve, start, tiny


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_what_it_promises(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(tiny("run=one")).folder
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert lines[-1]["tokens"] == STEPS * 128
    assert [line["step"] for line in lines if "valid_loss" in line] == [10, 20, 30, 40]
    # 300 byte-level words cover about 1.9 bytes each: bits per byte follow from the loss
    ratio = lines[-1]["valid_bits_per_byte"] / (lines[-1]["valid_loss"] / math.log(2))
    assert 0.3 < ratio < 1
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Recipe.load(run / "recipe.toml") == tiny("run=one")
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert [folder.name for folder in step_folders(run / "checkpoints")] == [
        "step-0000040",
        "step-0000039",
    ]
    model = transnormer.load(run)
    assert model.tokenizer.get_vocab_size() == 300
    text = "".join(transnormer.generate(model, "To be", max_tokens=20))
    assert text

    written = (run / "metrics.jsonl").read_bytes()
    train(tiny("run=one"))
    assert "run one is finished" in capfd.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == written
    with pytest.raises(
        ValueError, match=r"started with other settings: optim\.lr was 0\.01 and is now 0\.02"
    ):
        train(tiny("run=one", "optim.lr=0.02"))
    (work / "runs" / "mine").mkdir()
    (work / "runs" / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a run of ours"):
        train(tiny("run=mine"))


def test_a_run_is_summed_up_and_so_is_one_that_was_finished_before(work: Path) -> None:
    recipe = tiny("run=one", "train.steps=4", "eval.every=2")
    summary = train(recipe, runs=work / "elsewhere")
    lines = read_metrics(work / "elsewhere/one/metrics.jsonl")
    assert (summary.folder, summary.steps, summary.tokens) == (work / "elsewhere/one", 4, 4 * 128)
    assert (summary.final_loss, summary.valid_loss) == (lines[-1]["loss"], lines[-1]["valid_loss"])
    assert summary.valid_bits_per_byte == lines[-1]["valid_bits_per_byte"]
    assert summary.refused == 0
    assert summary.seconds > 0
    assert (summary.peak_memory_bytes is None) == (not torch.cuda.is_available())
    again = train(recipe, runs=work / "elsewhere")
    assert again == dataclasses.replace(summary, seconds=0.0, peak_memory_bytes=None)


def test_a_process_is_left_as_it_was(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[torch.nn.Module]] = []
    resets: list[str] = []

    def watched(*inputs: Any) -> Any:
        model, origin = build(*inputs)
        models.append(weakref.ref(model))
        return model, origin

    build = loop._model
    monkeypatch.setattr(loop, "_model", watched)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append("reset"))
    monkeypatch.setattr(metrics.console, "quiet", True)
    handlers, state = [signal.getsignal(number) for number in STOPS], torch.get_rng_state()
    for number in range(2):
        train(tiny(f"run=r{number}", "train.steps=2", "train.compile=true"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        train(tiny("run=r2", "data.path=nowhere"))
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics.console.quiet
    assert resets == ["reset", "reset"]
    gc.collect()
    assert [model() for model in models] == [None, None]


def test_accumulation_recomputation_and_segments_change_nothing_but_rounding(
    work: Path, single_thread: None
) -> None:
    curves = []
    for number, override in enumerate(
        ("train.accumulate=1", "train.accumulate=4", "train.recompute=true", "train.segment=20")
    ):
        train(tiny(f"run=r{number}", override, "train.steps=12"))
        curves.append([loss for _, loss, _ in curve(f"r{number}")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)
    assert curves[0] == pytest.approx(curves[3], rel=1e-4)


def test_a_cpu_records_no_graph(work: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train\.graph = true needs a GPU, and the device is cpu; write false"
    ):
        train(tiny("run=graph", "train.graph=true", "train.device=cpu"))
    with pytest.raises(
        ValueError, match=r"of one shape; conversations and train\.reset_state = true give several"
    ):
        train(tiny("run=graph", "train.graph=true", "train.reset_state=true"))


def test_bfloat16_keeps_float32_weights(work: Path) -> None:
    run = train(tiny("run=half", "train.dtype=bfloat16", "train.steps=20")).folder
    assert all(p.dtype == torch.float32 for p in transnormer.load(run).parameters())
    losses = [loss for _, loss, _ in curve("half")]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.usefixtures("pictures")
def test_the_curve_is_drawn_without_a_validation_split(work: Path, text_file: Path) -> None:
    options = ("data.path=whole", f"data.text={text_file}", "data.vocab_size=300", "data.split=0")
    run = train(tiny("run=whole", "train.steps=3", *options)).folder
    assert (run / "loss.png").exists()
    assert not any("valid_loss" in line for line in read_metrics(run / "metrics.jsonl"))


def test_tensorboard_on_request(work: Path) -> None:
    pytest.importorskip("tensorboard")
    run = train(tiny("run=board", "train.tensorboard=true", "train.steps=5")).folder
    assert list((run / "tensorboard").glob("events.*"))


def test_ctrl_c_saves_and_says_how_to_go_on(work: Path) -> None:
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    runs = {
        number: start(f"run=stopped-{code}", ENDLESS, "checkpoint.every=0")
        for number, code in codes.items()
    }
    for number, process in runs.items():
        run = f"stopped-{codes[number]}"
        while (
            not (lines := Path("runs") / run / "metrics.jsonl").exists()
            or lines.stat().st_size < 500
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(PATIENCE) == codes[number]
        assert "the same command goes on from there" in process.stderr.read()
        (newest,) = step_folders(Path("runs") / run / "checkpoints")
        assert curve(run)[-1][0] == int(newest.name.removeprefix("step-"))


@pytest.mark.parametrize("place", ["_prepare", "_model", "gradients"])
def test_ctrl_c_in_the_first_seconds_is_obeyed_at_once(
    work: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While data are made ready, the model is built, and the first step, which may compile for
    minutes, is computed."""
    monkeypatch.setattr(loop, place, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(
        loop.Interrupted, match="stopped at once; the same command begins again"
    ) as caught:
        train(tiny("run=early"))
    assert caught.value.signal_number == signal.SIGINT
    assert caught.value.__suppress_context__
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_for_the_step(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []

    def pressed(*inputs: Any) -> Any:
        steps.append(len(steps) + 1)
        if steps[-1] == 5:
            signal.raise_signal(signal.SIGINT)
            assert "stopping after this step; Ctrl-C again stops at once" in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)
        return gradients(*inputs)

    gradients = loop.gradients
    monkeypatch.setattr(loop, "gradients", pressed)
    with pytest.raises(
        loop.Interrupted, match=r"stopped at once; the same command goes on from step [34]"
    ):
        # each save waits until the one before is there
        train(tiny("run=twice", "checkpoint.every=1"))


def test_a_full_disk_leaves_the_last_checkpoint(work: Path) -> None:
    limit = 60_000  # bytes a file: below the weights, above everything else
    train(tiny("run=full", "train.steps=9", "checkpoint.every=3"))
    good = {
        path.name: path.read_bytes()
        for path in Path("runs/full/checkpoints/step-0000009").iterdir()
    }
    assert len(good["model.safetensors"]) > limit
    full = start(
        "run=full",
        "train.steps=12",
        "checkpoint.every=3",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert full.wait(PATIENCE) == 1
    assert "cannot be written" in full.stderr.read().splitlines()[-1]
    assert {
        path.name: path.read_bytes()
        for path in Path("runs/full/checkpoints/step-0000009").iterdir()
    } == good
    assert [path.name for path in sorted(Path("runs/full/checkpoints").iterdir())] == [
        "step-0000006",
        "step-0000009",
    ]
    train(tiny("run=full", "train.steps=12", "checkpoint.every=3"))
    assert curve("full")[-1][0] == 12


def test_what_cannot_work_is_said_before_it_costs_anything(work: Path, prepared: Path) -> None:
    with pytest.raises(
        ValueError, match=r"parameters with 128 tokens .* needs more than [\d,.]+ GiB"
    ):
        train(tiny("run=big", "model.size=175b"))
    with pytest.raises(ValueError, match="for activations"):
        train(tiny("run=big", "train.batch_tokens=1073741824"))
    assert not Path("runs/big").exists()
    with pytest.raises(
        FileNotFoundError, match="no such folder; make it with `transnormer prepare`"
    ):
        train(tiny("run=none", "data.path=nowhere"))
    with pytest.raises(ValueError, match=r"model\.vocab_size = 10, but the tokenizer"):
        train(tiny("run=none", "model.vocab_size=10"))
    with pytest.raises(ValueError, match=r"device 'tpuu' is not supported"):
        train(tiny("run=none", "train.device=tpuu"))
    made = (
        r"was prepared with data\.vocab_size = 300, but the recipe says 400; choose another "
        r"data\.path, or remove"
    )
    with pytest.raises(ValueError, match=made):
        train(tiny("run=none", "data.vocab_size=400", "data.text=x.txt", "data.split=0.1"))
    with pytest.raises(
        ValueError, match=r"was prepared with data\.format = 'text', but the recipe says 'messages'"
    ):
        train(tiny("run=none", "data.format=messages"))
    with pytest.raises(
        ValueError,
        match=r"was prepared without data\.chat_template, but the recipe says 'a\.jinja'",
    ):
        train(tiny("run=none", "data.chat_template=a.jinja"))
    with pytest.raises(ValueError, match=r"data\.vocab_size = 300, but the recipe does not set it"):
        train(tiny("run=none", "data.text=x.txt", "data.split=0.1"))
    with pytest.raises(
        ValueError, match=r"was prepared without data\.tokenizer, but the recipe says 'x'"
    ):
        train(
            tiny(
                "run=none",
                "data.vocab_size=300",
                "data.tokenizer=x",
                "data.text=x.txt",
                "data.split=0.1",
            )
        )
    with pytest.raises(
        ValueError, match=r"model\.vocab_size = 200, but the tokenizer of .* has 300 words"
    ):
        train(tiny("run=none", "model.vocab_size=200"))
    with pytest.raises(
        ValueError, match=r"model\.vocab_size = 200, but a tokenizer has at least 257 words"
    ):
        train(
            tiny(
                "run=none",
                "model.vocab_size=200",
                "data.path=new",
                "data.text=x.txt",
                "data.vocab_size=4096",
            )
        )
    assert not Path("runs/none").exists()


def test_where_no_run_can_be_written_one_line_says_so(work: Path) -> None:
    Path("runs").mkdir()
    Path("runs/taken").touch()
    with pytest.raises(
        ValueError,
        match=r"^runs/taken is a file, where the run's folder should be; give another run=",
    ):
        train(tiny("run=taken"))
    Path("notes").touch()  # under a file as in a folder that is read-only nothing can be made
    with pytest.raises(
        OSError, match=r"^notes/one: nothing can be written there \(Not a directory\)"
    ) as caught:
        train(tiny("run=one"), runs="notes")
    assert "Errno" not in str(caught.value)


def test_a_run_is_made_longer_and_what_is_not_learned_may_change(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rates are those of a run that was as long from the start, from the step on at which it
    was made longer."""
    train(tiny("run=whole", "train.steps=8"))
    train(tiny("run=grown", "train.steps=4", "optim.schedule=constant"))
    moved = ("eval.every=2", "eval.tokens=256", "train.patience=5")
    with pytest.raises(ValueError, match=r"optim\.schedule was \"constant\" and is now \"cosine\""):
        train(tiny("run=grown", "train.steps=8", *moved))
    train(tiny("run=grown", "train.steps=8", "optim.schedule=constant", *moved))
    assert "train.steps was 4 and is now 8" in capfd.readouterr().err
    train(tiny("run=risen", "train.steps=4"))
    train(tiny("run=risen", "train.steps=8"))
    rates = {
        run: [line["learning_rate"] for line in read_metrics(Path(f"runs/{run}/metrics.jsonl"))]
        for run in ("whole", "grown", "risen")
    }
    assert rates["grown"] == [2.5e-3, 5e-3, 7.5e-3, *[1e-2] * 5]
    assert rates["risen"][4:] == rates["whole"][4:]
    assert [
        line["step"]
        for line in read_metrics(Path("runs/grown/metrics.jsonl"))
        if "valid_loss" in line
    ] == [
        4,
        6,
        8,
    ]
    with pytest.raises(
        ValueError,
        match=r"runs/grown has made 8 steps already, more than train\.steps = 6; write more",
    ):
        train(tiny("run=grown", "train.steps=6", "optim.schedule=constant"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("optim.warmup_steps=4",), None),
        (("optim.warmup_steps=16",), "than the 4 steps .* beyond 25% of optim.lr"),
        (
            ("optim.warmup_steps=3", "optim.schedule=wsd", "optim.decay_share=0.5"),
            "than the 2 steps .* beyond 67%",
        ),
    ],
)
def test_a_warm_up_that_does_not_end_is_mentioned(
    work: Path,
    settings: tuple[str, ...],
    message: str | None,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("far enough")

    monkeypatch.setattr(loop, "gradients", stop)
    with pytest.raises(RuntimeError, match="far enough"):
        train(tiny("run=warm", "train.steps=4", *settings))
    said = capfd.readouterr().err
    assert re.search(message, said) if message else "warm" not in said.replace("run warm", "")


def test_a_token_past_the_vocabulary_names_its_shard(work: Path, prepared: Path) -> None:
    shutil.copytree(prepared, "spoilt")
    shard = Path("spoilt/train-00000.bin")
    ids = np.fromfile(shard, np.uint16)
    ids[40:] = 300
    ids.tofile(shard)
    message = r"damaged; it holds the id 300, and the vocabulary has only 300 tokens"
    with pytest.raises(ValueError, match=rf"^spoilt/train-00000\.bin: {message}"):
        train(tiny("run=none", "data.path=spoilt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1", "not JSON"), ("[]", "damaged, or not"), ('{"starts": 3}', "damaged")],
)
def test_a_record_of_starts_that_is_none_is_named(work: Path, content: str, message: str) -> None:
    recipe = tiny("run=hurt", "train.steps=2", "checkpoint.every=1")
    run = train(recipe).folder
    shutil.rmtree(run / "checkpoints" / "step-0000002")
    (run / "run.json").write_text(content)
    with pytest.raises(ValueError, match=rf"runs/hurt/run\.json: {message}"):
        train(recipe)


def test_a_start_that_saved_nothing_binds_nobody(work: Path) -> None:
    with pytest.raises(ValueError, match="needs"):
        train(tiny("run=late", "train.seq_len=1000000", "train.batch_tokens=1000000"))
    with pytest.raises(ValueError, match=r"max_position_embeddings = 8 is below train\.seq_len"):
        train(tiny("run=late", "model.position=ape", "model.max_position_embeddings=8"))
    assert not Path("runs/late").exists()
    with pytest.raises(
        ValueError, match="there is no checkpoint to go back to; try run=NAME with a lower"
    ):
        train(tiny("run=late", "optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every=0"))
    train(tiny("run=late", "train.steps=3"))
    assert len(curve("late")) == 3


def test_a_finished_run_needs_nothing_to_say_so(
    work: Path, prepared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared, work / "moving")
    train(tiny("run=done", "train.steps=3", "data.path=moving"))
    shutil.rmtree(work / "moving")
    train(tiny("run=done", "train.steps=3", "data.path=moving"))
    assert "run done is finished" in capfd.readouterr().err


def test_a_run_goes_on_with_its_own_data_only(work: Path, text_file: Path) -> None:
    from transnormer.data.prepare import prepare

    prepare([text_file], work / "changing", vocab_size=300, split=0.1)
    recipe = tiny("run=tied", "train.steps=6", "data.path=changing")
    run = train(recipe).folder
    for folder in step_folders(run / "checkpoints")[:1]:
        shutil.rmtree(folder)  # back to step 3
    shutil.rmtree(work / "changing")
    prepare([text_file], work / "changing", vocab_size=290, split=0.1)
    with pytest.raises(ValueError, match="was trained on other data"):
        train(recipe)


@pytest.mark.usefixtures("pictures")
def test_without_git_and_with_a_picture_that_cannot_be_drawn(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    (work / "runs/bare/loss.png").mkdir(parents=True)  # a folder where the picture should go
    monkeypatch.setattr("transnormer.train.loop.check_same", lambda *_: None)
    run = train(tiny("run=bare", "train.steps=3")).folder
    assert json.loads((run / "run.json").read_text())["starts"][0]["commit"] is None
    assert step_folders(run / "checkpoints")[0].name == "step-0000003"


def test_one_process_a_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(*inputs: Any) -> Any:
        with pytest.raises(ValueError, match="runs/busy is being trained by another process"):
            # the lock is one of open files, so that this is refused as another process would be
            train(recipe)
        return gradients(*inputs)

    gradients, recipe = loop.gradients, tiny("run=busy", "train.steps=2")
    monkeypatch.setattr(loop, "gradients", meanwhile)
    assert train(recipe).steps == 2
