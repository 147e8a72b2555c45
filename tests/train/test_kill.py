"""SIGKILL at random moments, saves included, on one process and on two; the same command again each time."""

from __future__ import annotations

import json
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import transnormer

from .runs import PATIENCE, curve, start


@pytest.mark.parametrize(("processes", "steps"), [(1, 240), (2, 160)])
def test_kills_at_random_moments_lose_nothing(work: Path, processes: int, steps: int) -> None:
    check_kills_lose_nothing(processes, kills=3, seed=1, steps=steps)


@pytest.mark.proof
@pytest.mark.parametrize(("processes", "steps"), [(1, 2_000), (2, 1_000)])
def test_many_kills_at_random_moments_lose_nothing(work: Path, processes: int, steps: int) -> None:
    check_kills_lose_nothing(processes, kills=25, seed=2, steps=steps)


def check_kills_lose_nothing(processes: int, kills: int, seed: int, steps: int) -> None:
    """The killed run's curve and weights must equal an undisturbed run's, bit for bit."""
    settings = ("checkpoint.keep=1", f"train.steps={steps}", "eval.every=50")
    finish(start("run=whole", *settings, processes=processes))
    draw, saves = random.Random(seed), 0
    for number in range(kills):
        process = start("run=killed", *settings, processes=processes)
        wait_for_work(process, steps=draw.randrange(4, 28))
        time.sleep(draw.random() * 0.1)
        strike(process, draw, alone=processes > 1 and number % 2 == 1)
        assert process.wait(PATIENCE) != 0, "it finished before it could be killed: give it more steps"
        saves += any(Path("runs/killed/checkpoints").glob(".step-*.partial"))
    finish(start("run=killed", *settings, processes=processes))
    assert curve("killed") == curve("whole")
    assert len(curve("whole")) == steps
    resumed = [each["after_step"] for each in json.loads(Path("runs/killed/run.json").read_text())["starts"]]
    assert sum(map(bool, resumed)) >= kills // 2, resumed
    assert saves or kills < 10, "none of so many kills fell into a save"
    one, other = (transnormer.load(f"runs/{run}").state_dict() for run in ("killed", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [path.name for path in Path("runs/killed/checkpoints").iterdir()] == [f"step-{steps:07d}"]


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said


def wait_for_work(process: subprocess.Popen[str], steps: int) -> None:
    """Until it has opened its metrics, and done so many steps more."""
    path = Path("runs/killed/metrics.jsonl")
    before = path.stat().st_ino if path.exists() else 0  # which is another when the lines are cut back
    wanted: int | None = None
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_ino != before:
            done = path.read_bytes().count(b"\n")
            wanted = done + steps if wanted is None else wanted
            if done >= wanted:
                return
        time.sleep(0.005)
    raise AssertionError(f"it did not get there: {process.stderr.read() if process.stderr else ''}")


def strike(process: subprocess.Popen[str], draw: random.Random, alone: bool) -> None:
    """SIGKILL to all of it at once, or to one worker alone, whose torchrun then ends the others."""
    agent = psutil.Process(process.pid)
    workers = agent.children()
    for each in [draw.choice(workers)] if alone else [agent, *workers]:  # the workers are no group with their agent
        with suppress(psutil.NoSuchProcess):
            each.kill()
