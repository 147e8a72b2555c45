"""Runs on two processes, in turn on one pair of them: every mesh, what is exact, and what goes
wrong on one alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import transnormer
from transnormer.config import ModelConfig
from transnormer.data.loader import Batch
from transnormer.files import read_weights, sha256, write_pieces
from transnormer.formats.convert import export
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.model.layers import local
from transnormer.planning.mesh_sizes import Parallel
from transnormer.run_folder import step_folders
from transnormer.train import checkpoints, loop
from transnormer.train.loop import train
from transnormer.train.mesh import make_mesh, start
from transnormer.train.metrics import read_metrics
from transnormer.train.parallelize import parallelize
from transnormer.train.recipe import Lora, Recipe
from transnormer.train.step import evaluation

from ..children import run_processes
from .runs import curve, spoiling, tiny, write_recipe

MESHES = ("shard", "replicate", "context", "tensor")
OFTEN = (
    "train.steps=12",
    "checkpoint.every=3",
    "checkpoint.keep=9",
    "eval.every=6",
    "eval.tokens=500",
)


# What both processes do. Each returns what can be told as JSON.


def on_every_mesh(rank: int) -> None:
    for name in MESHES:
        train(tiny(f"run={name}", f"parallel.{name}=2", *OFTEN))


def on_another_mesh(rank: int) -> None:
    """Each goes on from step 6 of the one before it in MESHES."""
    for name, before in zip(MESHES, (MESHES[-1], *MESHES), strict=False):
        if rank == 0:
            back_to_step_6(before, f"{before}-{name}")
        dist.barrier()
        train(tiny(f"run={before}-{name}", f"parallel.{name}=2", *OFTEN))


def from_a_model(rank: int) -> None:
    for name in MESHES:
        train(after_shard(f"run=after-{name}", f"parallel.{name}=2"))


def after_shard(*overrides: str) -> Recipe:
    """A run that begins with what the run "shard" left, slowly: at the rate of a new one a rounding
    doubles every step."""
    return dataclasses.replace(
        tiny(*OFTEN, "optim.lr=1e-3", *overrides), model={"from": "runs/shard"}
    )


PARTS = {name: (f"parallel.{name}=2",) for name in MESHES} | {
    "muon": ("optim.name=muon",), "bf16": ("train.dtype=bfloat16", "parallel.tensor=2"),
}  # fmt: skip


def in_two_parts(rank: int) -> None:
    """Past the place where a run was cut off."""
    for name, settings in PARTS.items():
        if name not in MESHES:
            train(tiny(f"run={name}", *settings, *OFTEN))
        with (
            spoiled(stop_at=20, error=RuntimeError),
            written_at_once(),
            pytest.raises(RuntimeError),
        ):
            train(tiny(f"run={name}-again", *settings, *OFTEN))
        train(tiny(f"run={name}-again", *settings, *OFTEN))


def not_finite_on_the_second(rank: int) -> None:
    for name in ("shard", "tensor"):
        for kind in ("loss", "gradients"):
            settings = (
                f"run=bad-{name}-{kind}",
                f"parallel.{name}=2",
                *OFTEN,
                "checkpoint.every=1",
                "checkpoint.keep=99",
            )
            with spoiled(18, only=kind if rank == 1 else "nothing"):
                train(tiny(*settings))


def again_and_again_on_the_second(rank: int) -> None:
    with spoiled(17, 21, 25, only="loss" if rank == 1 else "nothing"):
        train(tiny("run=back", *OFTEN))


def full_disk_of_the_second(rank: int) -> str:
    def full(path: Path, *content: Any) -> dict[str, object]:
        if rank == 1 and "0000006" in str(path):
            raise OSError(f"{path}: cannot be written: No space left on device")
        return write_pieces(path, *content)

    checkpoints.write_pieces = full  # type: ignore[attr-defined]
    try:
        train(tiny("run=full", *OFTEN))
    except Exception as error:
        return f"{type(error).__name__} {error}"
    finally:
        checkpoints.write_pieces = write_pieces  # type: ignore[attr-defined]
    return "nothing"


def signal_to_the_second(rank: int) -> int:
    with spoiled(stop_at=20 if rank == 1 else -1), pytest.raises(loop.Interrupted) as caught:
        train(tiny("run=signal", *OFTEN, "checkpoint.every=0"))
    return caught.value.signal_number


def damage_to_the_second(rank: int) -> None:
    if rank == 0:
        train_copy("shard", "hurt")
        path = Path("runs/hurt/checkpoints/step-0000012/weights-00002-of-00002.safetensors")
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
        Path("runs/hurt/checkpoints/step-0000009/optimizer-00001-of-00002.safetensors").unlink()
    dist.barrier()
    train(tiny("run=hurt", "parallel.shard=2", *OFTEN))


def wrong_data_on_the_second(rank: int) -> str:
    try:
        train(tiny("run=none", *OFTEN, f"data.path={'nowhere' if rank == 1 else tiny().data.path}"))
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


REFUSED = {
    (
        "parallel.tensor=2",
        "train.segment=9",
    ): "parallel.tensor = 2 does not divide train.segment = 9",
    ("parallel.context=2", "train.segment=8"): "train.segment = 8 needs linear attention",
    ("parallel.tensor=2", "lora.rank=2"): "parallel.tensor = 2 cannot cut adapted maps",
}


def evaluated(rank: int) -> list[float]:
    """Before and after half of every weight is gone, as after a recorded step, which runs none of
    FSDP's hooks; and anew."""
    config = ModelConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    ids = torch.arange(65).remainder(48).unsqueeze(0)
    mesh = make_mesh(Parallel(), torch.device("cpu"))

    def fresh() -> tuple[list[torch.nn.Parameter], Callable[[], float]]:
        model = LanguageModel(config)
        init_weights(model, 1)
        parallelize(model, mesh)
        measure = evaluation(model, [Batch(ids[:, :-1], ids[:, 1:])], mesh, "float32")
        assert measure is not None
        return list(model.parameters()), measure

    (parameters, measure), (others, anew) = fresh(), fresh()
    before = measure()
    for p in (*parameters, *others):
        local(p.detach()).mul_(0.5)
    return [before, measure(), anew()]


def refused(rank: int) -> list[str]:
    found = []
    for overrides in REFUSED:
        recipe = tiny("run=none", *OFTEN, *(x for x in overrides if "lora" not in x))
        if "lora.rank=2" in overrides:
            recipe = dataclasses.replace(recipe, model={"from": "runs/shard"}, lora=Lora(rank=2))
        try:
            train(recipe)
        except Exception as error:
            found.append(f"{type(error).__name__} {error}")
    return found


TASKS: tuple[Callable[[int], Any], ...] = (
    on_every_mesh,
    on_another_mesh,
    from_a_model,
    in_two_parts,
    not_finite_on_the_second,
    again_and_again_on_the_second,
    full_disk_of_the_second,
    signal_to_the_second,
    damage_to_the_second,
    wrong_data_on_the_second,
    evaluated,
    refused,
)


def train_copy(run: str, copy: str) -> None:
    shutil.copytree(f"runs/{run}", f"runs/{copy}")
    recipe = Path(f"runs/{copy}/recipe.toml")
    recipe.write_text(recipe.read_text().replace(f'run = "{run}"', f'run = "{copy}"'))


def back_to_step_6(run: str, copy: str) -> None:
    train_copy(run, copy)
    for folder in step_folders(Path(f"runs/{copy}/checkpoints")):
        if int(folder.name[5:]) > 6:
            shutil.rmtree(folder)


@contextmanager
def spoiled(
    *samples: int, only: str = "nothing", stop_at: int = -1, error: type[Exception] | None = None
) -> Iterator[None]:
    """The step that reads sample `stop_at` stops; those that read any of `samples` have a NaN in
    loss or gradients."""
    gradients = loop.gradients

    def damage(model: Any, loss: torch.Tensor) -> torch.Tensor:
        if only == "gradients":
            next(model.parameters()).grad.to_local().view(-1)[3] = float("inf")
        return loss * float("nan") if only == "loss" else loss

    loop.gradients = spoiling(gradients, damage, *samples, stop_at=stop_at, error=error)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loop.gradients = gradients  # type: ignore[attr-defined]


@contextmanager
def written_at_once() -> Iterator[None]:
    """Every step waits for what the threads are writing: the checkpoint of step 3 is sealed at the
    end of step 5."""
    flags = checkpoints.Checkpoints.flags

    def waited(saves: checkpoints.Checkpoints) -> tuple[int, int]:
        if saves._job is not None:
            saves._job.exception()
        return flags.__get__(saves)  # type: ignore[no-any-return]

    checkpoints.Checkpoints.flags = property(waited)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        checkpoints.Checkpoints.flags = flags  # type: ignore[method-assign]


def work_through(rank: int, folder: Path) -> None:
    """One of the two processes: every task in turn, its result or traceback into a file."""
    os.chdir(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

    loop.plot = lambda *_: None  # type: ignore[attr-defined]
    loop.start = lambda parallel, device: start(parallel, "cpu")  # type: ignore[attr-defined]
    for task in TASKS:
        try:
            found: dict[str, Any] = {"result": task(rank)}
        except BaseException:
            found = {"error": traceback.format_exc()}
        Path(f"{task.__name__}-{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def place(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_recipe(folder, prepared)
    run_processes(work_through, folder, count=2)
    return folder


@pytest.fixture
def told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[int], Any]], list[Any]]:
    """What the two processes found in a task."""
    monkeypatch.chdir(place)
    torch.set_num_threads(1)

    def results(task: Callable[[int], Any]) -> list[Any]:
        found = [json.loads(Path(f"{task.__name__}-{rank}.json").read_text()) for rank in (0, 1)]
        assert not any("error" in each for each in found), next(
            each["error"] for each in found if "error" in each
        )
        return [each["result"] for each in found]

    return results


def close(run: str, other: str = "one") -> bool:
    """Whether two runs' curves, validation included, differ by rounding alone."""
    one, two = ([[x or 0.0 for x in line] for line in curve(each)] for each in (run, other))
    return len(one) == 12 and all(
        a == pytest.approx(b, rel=1e-4) for a, b in zip(one, two, strict=True)
    )


def hashes(run: str, step: int, what: str) -> set[str]:
    return {
        sha256(path) for path in Path(f"runs/{run}/checkpoints/step-{step:07d}").glob(f"{what}-*")
    }


def test_every_mesh_does_what_one_process_does(told: Any) -> None:
    told(on_every_mesh)
    if not Path("runs/one").exists():
        train(tiny("run=one", *OFTEN))
    whole = transnormer.load("runs/one").state_dict()
    for name in MESHES:
        assert close(name), name
        model = transnormer.load(f"runs/{name}")
        torch.testing.assert_close(model.state_dict(), whole, rtol=1e-2, atol=1e-3)
        assert model.tokenizer is not None
    assert len(list(Path("runs/replicate/checkpoints/step-0000012").glob("weights-*"))) == 2


def test_every_mesh_trains_a_model_further(told: Any) -> None:
    told(from_a_model)
    train(after_shard("run=after-one"))
    assert curve("after-one")[0][1] < curve("one")[0][1] - 0.1  # type: ignore[operator]
    for name in MESHES:
        assert close(f"after-{name}", "after-one"), name


def test_any_mesh_goes_on_from_any_other_and_one_process_from_all(told: Any) -> None:
    told(on_another_mesh)
    for name, before in zip(MESHES, (MESHES[-1], *MESHES), strict=False):
        assert close(f"{before}-{name}"), name
    for name in MESHES:
        back_to_step_6(name, f"{name}-one")
        train(tiny(f"run={name}-one", *OFTEN))
        assert close(f"{name}-one"), name


def test_on_one_mesh_a_run_in_two_parts_is_exact(told: Any) -> None:
    told(in_two_parts)
    for name in PARTS:
        assert len(json.loads(Path(f"runs/{name}-again/run.json").read_text())["starts"]) == 2
        assert curve(f"{name}-again") == curve(name)
        for what in ("weights", "optimizer"):
            assert hashes(f"{name}-again", 12, what) == hashes(name, 12, what)


def test_pieces_become_one_folder_in_our_format(told: Any, tmp_path: Path) -> None:
    told(on_every_mesh)
    for name in MESHES:
        folder = Path(f"runs/{name}/checkpoints/step-0000012")
        export(folder, tmp_path / name)
        whole, assembled = transnormer.load(tmp_path / name).state_dict(), read_weights(folder)
        assert (tmp_path / name / "model.safetensors").is_file()
        assert whole.keys() == assembled.keys()
        assert all(torch.equal(whole[key], assembled[key]) for key in whole)
    shutil.copytree(folder, tmp_path / "lost")
    (tmp_path / "lost/weights-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"weights-00002-of-00002\.safetensors: no such file"
    ):
        transnormer.load(tmp_path / "lost")


def test_what_is_not_finite_on_one_process_reaches_no_weight_on_any(told: Any) -> None:
    told(not_finite_on_the_second)
    for run in (
        f"bad-{name}-{kind}" for name in ("shard", "tensor") for kind in ("loss", "gradients")
    ):
        lines = read_metrics(Path(f"runs/{run}/metrics.jsonl"))
        assert [line["step"] for line in lines if "refused" in line] == [5]
        assert lines[4]["samples"] == [16, 20]
        for what in ("weights", "optimizer"):
            assert hashes(run, 4, what) == hashes(run, 5, what)
            assert hashes(run, 5, what).isdisjoint(hashes(run, 6, what))


def test_all_go_back_together(told: Any) -> None:
    told(again_and_again_on_the_second)
    lines = read_metrics(Path("runs/back/metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "went_back" in line] == [4]
    record = json.loads(Path("runs/back/checkpoints/step-0000012/training.json").read_text())
    assert record["skipped"] == [[12, 28]]
    assert record["position"] == 4 * 12 + 16


def test_a_failed_write_on_one_process_stops_all_and_says_so_once(told: Any) -> None:
    first, second = told(full_disk_of_the_second)
    assert first == "FailedOnOtherRank "
    assert second.startswith(
        "OSError runs/full/checkpoints/.step-0000006.partial/weights-00002-of-00002.safetensors: "
        "cannot"
    )
    assert [path.name for path in Path("runs/full/checkpoints").glob("step-*")] == ["step-0000003"]


def test_a_signal_to_one_process_stops_all_at_one_step(told: Any) -> None:
    assert told(signal_to_the_second) == [signal.SIGTERM, signal.SIGTERM]
    assert [path.name for path in step_folders(Path("runs/signal/checkpoints"))] == ["step-0000006"]


def test_damage_to_one_piece_is_named_and_set_aside(told: Any) -> None:
    told(damage_to_the_second)
    assert sorted(path.name for path in Path("runs/hurt/checkpoints").glob("damaged-*")) == [
        "damaged-step-0000009", "damaged-step-0000012",
    ]  # fmt: skip
    assert curve("hurt") == curve("shard")


def test_a_mesh_that_does_not_fit_is_refused_once(told: Any) -> None:
    first, second = told(refused)
    assert second == ["FailedOnOtherRank "] * len(REFUSED)
    for found, wanted in zip(first, REFUSED.values(), strict=True):
        assert found.startswith(f"ValueError {wanted}")


def test_an_error_of_one_process_is_said_by_it_alone(told: Any) -> None:
    first, second = told(wrong_data_on_the_second)
    assert first == "FailedOnOtherRank "
    assert second.startswith("ValueError nowhere: not a prepared folder")


def test_an_evaluation_reads_the_weights_there_are(told: Any) -> None:
    for before, after, anew in told(evaluated):
        assert after == anew != before
