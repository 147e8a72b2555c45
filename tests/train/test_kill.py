"""SIGKILL at random moments, saves included, on one process and on two; the same command again each
time."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import transnormer
from transnormer.train.loop import train

from .runs import PATIENCE, Forked, Process, curve, held, start, tiny, train_on_two, wait_until


@pytest.mark.usefixtures("single_thread")
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_lose_nothing(work: Path, processes: int) -> None:
    check_kills_lose_nothing(Forked, processes, kills=3, seed=1, steps=80)


@pytest.mark.usefixtures("single_thread")
@pytest.mark.proof
@pytest.mark.parametrize(("processes", "steps"), [(1, 2_000), (2, 1_000)])
def test_many_kills_at_random_moments_lose_nothing(work: Path, processes: int, steps: int) -> None:
    check_kills_lose_nothing(start, processes, kills=25, seed=2, steps=steps)


def check_kills_lose_nothing(
    begin: Callable[..., Process], processes: int, kills: int, seed: int, steps: int
) -> None:
    """The killed run's curve and weights must equal an undisturbed run's, bit for bit."""
    settings = ("checkpoint.keep=1", f"train.steps={steps}", "eval.every=50")
    undisturbed("run=whole", *settings, processes=processes)
    draw, saves = random.Random(seed), 0
    with held(4 * (steps - 1)):  # the last step, so that no run ends before it is killed
        for number in range(kills):
            process = begin("run=killed", *settings, processes=processes)
            wait_for_work(process, steps=draw.randrange(4, 28), most=steps - 1)
            time.sleep(draw.random() * 0.1)
            struck = strike(process, draw, alone=processes > 1 and number % 2 == 1)
            assert process.wait(PATIENCE) != 0
            # the run's lock is held until the last has ended
            assert not psutil.wait_procs(struck, PATIENCE)[1]
            saves += any(Path("runs/killed/checkpoints").glob(".step-*.partial"))
    undisturbed("run=killed", *settings, processes=processes)
    assert curve("killed") == curve("whole")
    assert len(curve("whole")) == steps
    resumed = [
        each["after_step"]
        for each in json.loads(Path("runs/killed/run.json").read_text())["starts"]
    ]
    assert sum(map(bool, resumed)) >= kills // 2, resumed
    assert saves or kills < 10, "none of so many kills fell into a save"
    one, other = (transnormer.load(f"runs/{run}").state_dict() for run in ("killed", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert [path.name for path in Path("runs/killed/checkpoints").iterdir()] == [
        f"step-{steps:07d}"
    ]


def undisturbed(*settings: str, processes: int) -> None:
    if processes == 1:
        train(tiny(*settings))
    else:
        train_on_two(settings)


def wait_for_work(process: Process, steps: int, most: int) -> None:
    """Until it has opened its metrics and done so many steps more, but not beyond step `most`."""
    path = Path("runs/killed/metrics.jsonl")
    # which is another when the lines are cut back
    before = path.stat().st_ino if path.exists() else 0
    wait_until(lambda: path.exists() and path.stat().st_ino != before, process)
    wanted = min(path.read_bytes().count(b"\n") + steps, most)
    wait_until(lambda: path.read_bytes().count(b"\n") >= wanted, process)


def strike(process: Process, draw: random.Random, alone: bool) -> list[psutil.Process]:
    """SIGKILL to all of it at once, or to one worker alone, whose agent then ends the others.
    Returns them all."""
    agent = psutil.Process(process.pid)
    workers = agent.children()
    # the workers are no group with their agent
    for each in [draw.choice(workers)] if alone else [agent, *workers]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    return [agent, *workers]
