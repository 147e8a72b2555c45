"""Runs of the tiny recipe: in this process, as a command, under torchrun; and what they left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

STEPS = 40
PATIENCE = 900  # seconds after which what a test waits for is given up; nothing else depends on how fast a machine is
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
    """A recipe with overrides, of which later ones stand for earlier ones: shared settings may be changed in a test."""
    return Recipe.load(path, list({override.partition("=")[0]: override for override in overrides}.values()))


def start(*overrides: str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """`transnormer train`, by torchrun where there are several processes."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "transnormer", "train", "tiny.toml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *overrides], stderr=subprocess.PIPE, text=True, env=environment, **options)


def spoiling(
    gradients: Callable[..., Tensor], damage: Callable[[Any, Tensor], Tensor], *samples: int, stop_at: int = -1,
    error: type[Exception] | None = None,
) -> Callable[..., Tensor]:  # fmt: skip
    """`loop.gradients`, but the step that reads sample `stop_at` stops, and damage(model, loss) is done to those of `samples`."""

    def spoiled(passes: Any, share: Any, *rest: Any) -> Tensor:
        loss = gradients(passes, share, *rest)
        if stop_at in range(*share.samples):
            if error is not None:
                raise error("as if it had been killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return damage(passes.model, loss) if any(sample in range(*share.samples) for sample in samples) else loss

    return spoiled


def curve(run: str) -> list[tuple[int, float | None, float | None]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [(line["step"], line["loss"], line.get("valid_loss")) for line in lines]
