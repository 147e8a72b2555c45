"""Checkpoints of one process: damage, age, other models, the thread that writes them; and steps
that are refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import transnormer
from transnormer.files import read_tensors, write_pieces
from transnormer.run_folder import step_folders
from transnormer.train import checkpoints, loop
from transnormer.train.checkpoints import RECORD
from transnormer.train.feed import StepBatches
from transnormer.train.loop import Interrupted, train
from transnormer.train.metrics import read_metrics

from .runs import PATIENCE, curve, tiny

pytestmark = pytest.mark.usefixtures("single_thread")
OFTEN = ("train.steps=24", "checkpoint.every=4", "checkpoint.keep=9")


def record(run: str, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        Path(f"runs/{run}/checkpoints/step-{step:07d}/{RECORD}").read_text()
    )
    return found


def state(run: str, step: int) -> dict[str, Tensor]:
    """Weights and optimizer's memory."""
    folder = Path(f"runs/{run}/checkpoints/step-{step:07d}")
    return (
        read_tensors(folder / "model.safetensors")[0]
        | read_tensors(folder / "optimizer.safetensors")[0]
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Damage.


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped byte": (lambda folder: flip(folder / "model.safetensors"),
                       r"model\.safetensors is damaged"),
    "a flipped byte of memory": (lambda folder: flip(folder / "optimizer.safetensors"),
                                 r"optimizer\.safetensors is damaged"),
    "a lost file": (lambda folder: (folder / RECORD).unlink(), r"training\.json is missing"),
    "a cut file": (lambda folder: os.truncate(folder / "model.safetensors", 100),
                   r"truncated \(100 of"),
    "no marker": (lambda folder: (folder / "complete.json").unlink(), r"complete\.json is missing"),
    "a spoilt marker": (lambda folder: flip(folder / "complete.json"),
                        r"complete\.json is damaged|is missing|differs|truncated"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_good_checkpoint_is_used_and_nothing_deleted(
    work: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    spoil, message = DAMAGES[damage]
    settings = ("train.steps=9", "checkpoint.keep=9")
    train(tiny("run=whole", *settings))
    run = train(tiny("run=hurt", *settings)).folder
    newest = step_folders(run / "checkpoints")[0]
    spoil(newest)
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    capfd.readouterr()
    train(tiny("run=hurt", *settings))
    said = capfd.readouterr().err
    assert re.search(
        rf"step-0000009: .*{message}.* damaged-step-0000009, and the run goes on from step-0000006",
        said,
    )
    assert {
        path.name: path.read_bytes() for path in newest.with_name("damaged-step-0000009").iterdir()
    } == left
    assert [folder.name for folder in step_folders(run / "checkpoints")] == [
        f"step-000000{n}" for n in (9, 6, 3)
    ]
    assert curve("hurt") == curve("whole")
    assert same(state("hurt", 9), state("whole", 9))


def test_a_model_is_loaded_from_the_newest_good_checkpoint(work: Path) -> None:
    run = train(tiny("run=hurt", "train.steps=9", "checkpoint.keep=9")).folder
    newest, older, oldest = step_folders(run / "checkpoints")
    flip(newest / "model.safetensors")
    (older / "config.json").unlink()
    with pytest.warns(
        UserWarning, match=r"step-000000[96]: .* step-0000003 is taken instead"
    ) as warned:
        model = transnormer.load(run)
    assert len(warned) == 2
    assert same(model.state_dict(), read_tensors(oldest / "model.safetensors")[0])
    (oldest / "complete.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"step-0000009: model\.safetensors is damaged.*; no earlier checkpoint is good",
    ):
        transnormer.load(run)
    with pytest.raises(
        ValueError,
        match=r"step-0000009: model\.safetensors is damaged .*; none is good: to start again",
    ):
        train(tiny("run=hurt", "train.steps=9", "checkpoint.keep=9"))
    assert step_folders(run / "checkpoints") == [newest, older, oldest]


def test_what_is_damaged_again_is_set_aside_beside_the_first(work: Path) -> None:
    run = train(tiny("run=hurt", "train.steps=6")).folder
    for _ in range(2):
        flip(run / "checkpoints/step-0000006/model.safetensors")
        train(tiny("run=hurt", "train.steps=6"))
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert found == [
        "damaged-step-0000006",
        "damaged-step-0000006-1",
        "step-0000003",
        "step-0000006",
    ]


def test_a_checkpoint_of_another_model_names_the_first_difference(work: Path) -> None:
    run = train(tiny("run=tall", "train.steps=3")).folder
    train(tiny("run=flat", "train.steps=2", "model.num_hidden_layers=3"))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree("runs/flat/checkpoints", run / "checkpoints")
    with pytest.raises(
        ValueError, match=r"step-0000002 is of another model: its num_hidden_layers is 3, not 2"
    ):
        train(tiny("run=tall", "train.steps=3"))


# Age.


def test_the_newest_are_kept_and_those_of_every_so_many_steps(work: Path) -> None:
    settings = (
        "train.steps=22",
        "checkpoint.every=5",
        "checkpoint.keep=2",
        "checkpoint.keep_every=8",
    )
    run = train(tiny("run=aged", *settings)).folder
    assert [int(folder.name[5:]) for folder in step_folders(run / "checkpoints")] == [22, 20, 16, 8]
    assert not list((run / "checkpoints").glob(".*"))


# The thread that writes.


def test_training_goes_on_while_a_checkpoint_is_written(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on, steps = threading.Event(), threading.Event(), []

    def slow(path: Path, *content: Any) -> dict[str, object]:
        started.set()
        assert go_on.wait(PATIENCE)
        return write_pieces(path, *content)

    def watched(model: Any, batches: StepBatches, *rest: Any) -> Tensor:
        if len(steps) == 4:  # the first step after the first checkpoint
            assert started.wait(PATIENCE)
        steps.append(started.is_set() and not go_on.is_set())
        if sum(steps) == 3:  # the weights have moved on three times since they were copied
            go_on.set()
        return gradients(model, batches, *rest)

    gradients = loop.gradients
    train(tiny("run=plain", "train.steps=12", "checkpoint.every=4", "checkpoint.keep=9"))
    monkeypatch.setattr(checkpoints, "write_pieces", slow)
    monkeypatch.setattr(loop, "gradients", watched)
    train(tiny("run=slow", "train.steps=12", "checkpoint.every=4", "checkpoint.keep=9"))
    assert sum(steps) == 3
    assert curve("slow") == curve("plain")
    assert all(same(state("slow", step), state("plain", step)) for step in (4, 8, 12))


def test_a_failed_write_is_named_and_earlier_checkpoints_are_untouched(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *content: Any) -> dict[str, object]:
        if "0000008" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(f"{path}: cannot be written: No space left on device")
        return write_pieces(path, *content)

    train(tiny("run=whole", *OFTEN))
    monkeypatch.setattr(checkpoints, "write_pieces", full)
    with pytest.raises(
        OSError, match=r"step-0000008\.partial/optimizer\.safetensors: cannot be written: No space"
    ):
        train(tiny("run=full", *OFTEN))
    assert [path.name for path in Path("runs/full/checkpoints").iterdir()] == ["step-0000004"]
    monkeypatch.undo()
    monkeypatch.chdir(work)
    train(tiny("run=full", *OFTEN))
    assert curve("full") == curve("whole")


# Steps that are refused.


def test_a_step_that_is_not_finite_never_reaches_the_weights(
    work: Path, spoil: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(18)
    train(tiny("run=bad", "train.steps=8", "checkpoint.every=1", "checkpoint.keep=9"))
    line = read_metrics(Path("runs/bad/metrics.jsonl"))[4]
    assert line["loss"] is line["gradient_norm"] is None
    assert line["samples"] == [16, 20]
    assert (
        "step 5: loss nan, gradient norm nan; not applied (samples 16 to 20)"
        in capfd.readouterr().err
    )
    before, after = state("bad", 4), state("bad", 5)
    assert same(before, after)
    assert not same(after, state("bad", 6))
    assert [record("bad", step)["refused"] for step in (4, 5, 6)] == [0, 1, 0]
    assert [record("bad", step)["position"] for step in (4, 5, 6)] == [16, 20, 24]


# samples of steps 9, 10, 11: with the checkpoint before them at step 8, after 32 samples
BAD = (33, 37, 41)


def test_refused_again_and_again_the_run_goes_back_past_the_samples(
    work: Path, spoil: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(*BAD)
    summary = train(tiny("run=back", *OFTEN))
    assert "going back to step 8; samples 32 to 44 are passed over" in capfd.readouterr().err
    assert summary.refused == 3
    lines = read_metrics(summary.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["step"] for line in lines if "went_back" in line] == [9]
    assert lines[8]["went_back"]["after_step"] == 11
    assert not any("refused" in line for line in lines)
    assert record("back", 12) | {"position": 60, "skipped": [[32, 44]], "refused": 0} == record(
        "back", 12
    )


@pytest.mark.parametrize(("patience", "samples"), [(1, (41,)), (3, (37, 41, 45, 70))])
def test_a_run_that_went_back_resumes_exactly(
    work: Path, spoil: Callable[..., None], patience: int, samples: tuple[int, ...]
) -> None:
    """Stopped in the refused steps, or after them before and after the next checkpoint; killed
    likewise."""
    settings = (*OFTEN, f"train.patience={patience}", "train.spike=9", "checkpoint.keep=1")
    spoil(*BAD)
    train(tiny("run=whole", *settings))
    whole = read_metrics(Path("runs/whole/metrics.jsonl"))
    for number, sample in enumerate(samples):
        for error in (None, RuntimeError):
            run = f"run=cut{number}{error is None}"
            spoil(*BAD, stop_at=sample, error=error)
            with pytest.raises(error or Interrupted):
                train(tiny(run, *settings))
            spoil(*BAD)
            train(tiny(run, *settings))
            lines = read_metrics(Path("runs") / run[4:] / "metrics.jsonl")
            timeless = [
                [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in each]
                for each in (lines, whole)
            ]
            assert timeless[0] == timeless[1]
            assert same(state(run[4:], 24), state("whole", 24))
            assert record(run[4:], 24) == record("whole", 24)


def test_what_was_saved_among_refused_steps_goes_when_the_run_goes_back(
    work: Path, spoil: Callable[..., None]
) -> None:
    spoil(*BAD, stop_at=37)
    with pytest.raises(Interrupted):
        train(tiny("run=back", *OFTEN))
    assert record("back", 10)["refused"] == 2
    spoil(*BAD, stop_at=49, error=RuntimeError)
    with pytest.raises(RuntimeError):
        train(tiny("run=back", *OFTEN))
    assert step_folders(Path("runs/back/checkpoints"))[0].name == "step-0000008"


def test_going_back_in_vain_ends_the_run(work: Path, spoil: Callable[..., None]) -> None:
    spoil(*range(33, 999))
    with pytest.raises(
        ValueError,
        match=(
            r"2 steps in a row were refused .* went back to step 8 3 times, with other samples; "
            r"try run=NAME"
        ),
    ):
        train(tiny("run=vain", *OFTEN, "train.patience=2"))
    assert step_folders(Path("runs/vain/checkpoints"))[0].name == "step-0000008"
    spoil(1)
    with pytest.raises(ValueError, match="there is no checkpoint to go back to"):
        train(tiny("run=never", *OFTEN, "train.patience=1"))


def test_a_loss_spike_is_refused_on_request(work: Path, spoil: Callable[..., None]) -> None:
    settings = ("train.steps=40", "optim.warmup_steps=0", "checkpoint.every=38")
    spoil(4 * 35, factor=1.5)
    train(tiny("run=taken", *settings))
    assert not any("refused" in line for line in read_metrics(Path("runs/taken/metrics.jsonl")))
    run = train(tiny("run=refused", *settings, "train.spike=4")).folder
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "refused" in line] == [36]
    assert lines[35]["loss"] > 1.3 * lines[34]["loss"]
    assert "is a spike" in lines[35]["refused"]
    assert len(record("refused", 38)["losses"]) == 32


# Runs that diverge.


LOST = (
    "eval.tokens=64",
    "optim.lr=1e18",
    "optim.warmup_steps=0",
    "train.steps=8",
    "checkpoint.every=1",
)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("every", [0, 1])
def test_a_run_that_diverges_says_so_draws_its_curve_and_saves_nothing(
    work: Path, every: int
) -> None:
    for _ in range(2):  # the same command again finds nothing that it could crash on
        with pytest.raises(
            ValueError,
            match=r"step \d: .*; the run diverged, and there is no checkpoint to go back to",
        ):
            train(tiny("run=lost", *LOST, f"eval.every={every}"))
        assert step_folders(Path("runs/lost/checkpoints")) == []
        assert Path("runs/lost/loss.png").read_bytes().startswith(b"\x89PNG")
        assert curve("lost")  # also the step that ended it


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("often", [True, False])
def test_a_run_goes_back_past_the_update_that_ruined_its_weights(
    work: Path, monkeypatch: pytest.MonkeyPatch, every: int, often: bool
) -> None:
    """The update of step 6 does, whose own loss and gradients are still finite."""

    def rate(recipe: Any, step: int, steps: int) -> float:
        ruined.append(step == 6 and (often or True not in ruined))
        return 1e18 if ruined[-1] else learning_rate(recipe, step, steps)

    ruined: list[bool] = []
    learning_rate = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", rate)
    saving = ("checkpoint.every=1", "checkpoint.keep=9", f"eval.every={every}", "eval.tokens=64")
    recipe = tiny("run=hurt", "train.steps=8", *saving)
    if often:
        with pytest.raises(
            ValueError,
            match="the run diverged, and went back to step 5 3 times, with other samples",
        ):
            train(recipe)
    else:
        assert math.isfinite(train(recipe).valid_loss or math.nan)
        assert record("hurt", 8)["skipped"] == [[20, 24]]
    saved = step_folders(Path("runs/hurt/checkpoints"))
    assert saved[0].name == f"step-000000{5 if often else 8}"
    for folder in saved:
        assert all(
            weight.abs().max() < 1e3 for weight in state("hurt", int(folder.name[5:])).values()
        )


def test_the_validation_loss_alone_can_send_a_run_back(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(*inputs: Any) -> Callable[[str], dict[str, float]]:
        evaluate, losses = evaluation(*inputs), iter([None, float("inf")])
        return lambda text: (
            evaluate(text) | ({} if (loss := next(losses, None)) is None else {"valid_loss": loss})
        )

    evaluation: Any = loop._evaluation
    monkeypatch.setattr(loop, "_evaluation", build)
    train(
        tiny(
            "run=blind",
            "train.steps=6",
            "checkpoint.every=0",
            "checkpoint.keep_every=2",
            "eval.every=2",
        )
    )
    assert (
        "step 4: the validation loss is inf; going back to step 2; samples 8 to 16"
        in capfd.readouterr().err
    )
    assert [line["step"] for line in read_metrics(Path("runs/blind/metrics.jsonl"))] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_run_whose_steps_were_all_refused_is_not_finished(
    work: Path, spoil: Callable[..., None]
) -> None:
    spoil(*range(16))
    recipe = tiny("run=idle", "train.steps=4", "train.patience=9", "checkpoint.every=2")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"step 4: all 4 steps were refused \(the last: loss nan, .*diverged"
        ):
            train(recipe)
    assert [folder.name for folder in step_folders(Path("runs/idle/checkpoints"))] == [
        "step-0000002"
    ]
