"""Runs of the tiny recipe: in this process, as a command, under torchrun; and what they left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

STEPS = 40


def tiny(*overrides: str) -> Recipe:
    return Recipe.load("tiny.toml", overrides)


def start(*overrides: str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """`transnormer train`, by torchrun where there are several processes."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "transnormer", "train", "tiny.toml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *overrides], stderr=subprocess.PIPE, text=True, env=environment, **options)


def curve(run: str) -> list[tuple[int, float | None, float | None]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [(line["step"], line["loss"], line.get("valid_loss")) for line in lines]
