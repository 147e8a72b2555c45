"""Runs of the tiny recipe: in this process, as a command, under torchrun; and what they left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transnormer.train import loop
from transnormer.train.mesh import start as parallel_start
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

from ..children import run_processes
from ..conftest import PATIENCE, REPOSITORY
from .held.sitecustomize import heed

STEPS = 40
ENDLESS = "train.steps=1000000"  # for a run that something else is to end
RECIPE = """
[data]
path = "{data}"
[model]
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
[train]
steps = {steps}
seq_len = 32
batch_tokens = 128
[optim]
lr = 1e-2
warmup_steps = 4
[eval]
every = 10
tokens = 512
[checkpoint]
every = 3
"""


def write_recipe(folder: Path, data: Path) -> None:
    (folder / "tiny.toml").write_text(RECIPE.format(data=data, steps=STEPS))


def tiny(*overrides: str) -> Recipe:
    return load("tiny.toml", *overrides)


def load(path: str | Path, *overrides: str) -> Recipe:
    """A recipe with overrides, of which later ones stand for earlier ones: shared settings may be
    changed in a test."""
    return Recipe.load(
        path, list({override.partition("=")[0]: override for override in overrides}.values())
    )


def environment() -> dict[str, str]:
    """For training processes that a test starts: one thread, and they heed `held`."""
    paths = [
        str(Path(__file__).parent / "held"),
        str(REPOSITORY),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def train_on_two(*runs: Sequence[str], recipe: str = "tiny.toml", folder: Path = Path()) -> None:
    """`train` on two processes on the CPU, in the working folder or another one: run after run,
    each with its overrides."""
    with tempfile.TemporaryDirectory() as meeting:
        run_processes(_train, f"{meeting}/store", folder.resolve(), recipe, runs, count=2)


def _train(
    rank: int,
    store: str,
    folder: Path,
    recipe: str,
    runs: Sequence[Sequence[str]],
    world: int = 2,
) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world
        )
    loop.plot = lambda *_: None
    loop.start = lambda parallel, device: parallel_start(parallel, "cpu")  # type: ignore[attr-defined]
    for overrides in runs:
        loop.train(load(recipe, *overrides))
    if world > 1:
        dist.destroy_process_group()


def start(*overrides: str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """`transnormer train`, by torchrun where there are several processes."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [
        sys.executable,
        "-m",
        *(torchrun if processes > 1 else []),
        "transnormer",
        "train",
        "tiny.toml",
    ]
    return subprocess.Popen(
        [*command, *overrides], stderr=subprocess.PIPE, text=True, env=environment(), **options
    )


class Forked:
    """A run of the tiny recipe on one or several new processes, which have nothing left to import.

    An agent is above them: where one of them fails it kills the others, as torchrun does. The
    methods are those of `subprocess.Popen` that tests need."""

    stderr = None

    def __init__(self, *overrides: str, processes: int = 1):
        with tempfile.NamedTemporaryFile(
            prefix="store"
        ) as file:  # deleted at once: only its unused name is wanted
            arguments = (file.name, Path.cwd(), overrides, processes)
        context = multiprocessing.get_context("forkserver")
        self._agent = context.Process(target=_watch_over, args=arguments)
        self._agent.start()
        assert self._agent.pid is not None
        self.pid = self._agent.pid

    def poll(self) -> int | None:
        return self._agent.exitcode

    def wait(self, timeout: float) -> int | None:
        self._agent.join(timeout)
        return self._agent.exitcode


Process = subprocess.Popen[str] | Forked


def _watch_over(store: str, folder: Path, overrides: Sequence[str], processes: int) -> None:
    ranks = set()
    for rank in range(processes):
        if not (pid := os.fork()):
            with ending_the_process():
                heed()
                _train(rank, store, folder, "tiny.toml", [overrides], processes)
        ranks.add(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    os._exit(int(failed))


@contextmanager
def ending_the_process() -> Iterator[None]:
    """Within a forked process, which may not go on with what its parent does."""
    try:
        yield
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for its end with that exit code; returns what it wrote to standard error."""
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, said
    return said


@contextmanager
def held(sample: int, folder: Path = Path()) -> Iterator[None]:
    """Within, the step that reads this sample waits, in all processes that are started in the
    folder."""
    hold = folder / "hold"
    hold.write_text(str(sample))
    try:
        yield
    finally:
        hold.unlink()


def wait_until(happened: Callable[[], bool], *processes: Process) -> None:
    """Wait for what these processes are to bring about; fails where one of them ends before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        for process in processes:
            assert process.poll() is None, (
                process.stderr.read() if process.stderr else "a process ended too early"
            )
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)


def spoiling(
    gradients: Callable[..., Tensor],
    damage: Callable[[Any, Tensor], Tensor],
    *samples: int,
    stop_at: int = -1,
    error: type[Exception] | None = None,
) -> Callable[..., Tensor]:
    """`loop.gradients`, but the step that reads sample `stop_at` stops, and damage(model, loss) is
    done to those of `samples`."""

    def spoiled(runner: Any, batches: Any, *rest: Any) -> Tensor:
        loss = gradients(runner, batches, *rest)
        if stop_at in range(*batches.samples):
            if error is not None:
                raise error("as if it had been killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return (
            damage(runner.model, loss)
            if any(sample in range(*batches.samples) for sample in samples)
            else loss
        )

    return spoiled


def curve(run: str) -> list[tuple[int, float | None, float | None]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [(line["step"], line["loss"], line.get("valid_loss")) for line in lines]
