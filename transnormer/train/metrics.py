"""What a run reports: a line a step in metrics.jsonl, progress on the terminal, the loss curve as a
picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..files import replace_file

console = Console(stderr=True, highlight=False, markup=False)


def say(text: str) -> None:
    """One line on standard error, never wrapped: a log is there to be searched."""
    console.print(text, soft_wrap=True)


class Metrics:
    """metrics.jsonl: one JSON object a line, each step once, appended and never rewritten but on
    going back.

    Numbers that are not finite are written as null. write: whether this process writes; only the
    first of several does. It is said how many of the steps up to `after_step` have no line, because
    the file was damaged or lost."""

    def __init__(self, path: Path, after_step: int, tensorboard: bool = False, write: bool = True):
        self._path, self._tensorboard, self._writes = path, tensorboard, write
        self._file: TextIO | None = None
        self._board: Any = None
        self.cut(after_step)

    def cut(self, after_step: int) -> None:
        """Open the file with the lines up to `after_step` alone; a torn last line goes too."""
        if not self._writes:
            return
        self.close()
        damaged: list[int] = []
        found = read_metrics(self._path, damaged) if self._path.exists() else []
        kept = [line for line in found if line["step"] <= after_step]
        if lost := after_step - len({line["step"] for line in kept}):
            lines = (
                f"line {', '.join(map(str, damaged))} is damaged"
                if damaged
                else "the lines are not there"
            )
            why = lines if self._path.exists() else "the file is missing"
            say(f"{self._path}: {why}; {lost:,} of {after_step:,} steps are missing from the curve")
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        self._file = self._path.open("a", encoding="utf-8")
        folder = self._path.parent / "tensorboard"
        self._board = _tensorboard(folder, after_step) if self._tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        line = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in line.items()
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._file.name}: cannot be written: {error.strerror}; the last checkpoint stays"
            ) from error
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path, damaged: list[int] | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that are damaged, whose numbers (from 1) are
    added to `damaged`.

    Every line returned has `step` and `tokens`, whole numbers, and `loss`, a float, or None where
    it was not finite."""
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line = json.loads(text)
            whole = type(line["step"]) is type(line["tokens"]) is int and type(line["loss"]) in (
                float,
                NoneType,
            )
        except (ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if whole:
            lines.append(line)
        elif text and damaged is not None:
            damaged.append(number)
    return lines


def _tensorboard(folder: Path, after_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "train.tensorboard needs tensorboard: pip install 'transnormer[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder), purge_step=after_step + 1)


@contextmanager
def progress_bar(steps: int, done: int) -> Iterator[Any]:
    """A function (step, loss, tokens_per_second) that shows where a run is: a bar, or a line now
    and then without one."""
    if console.is_terminal:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=steps, completed=done, loss=float("nan"), speed=0.0)
            yield lambda step, loss, speed: bar.update(task, completed=step, loss=loss, speed=speed)
        return
    last, start = time.monotonic(), time.monotonic()

    def show(step: int, loss: float, speed: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            left = (now - start) / max(1, step - done) * (steps - step)
            say(f"step {step}/{steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  ETA {left:,.0f} s")

    yield show


def running_mean(losses: Any) -> Any:
    """The mean of each fiftieth of so many losses; losses that are no number (None, NaN) count as
    the mean of all.

    losses: N numbers, as a list or an array [N]. Returns [M] float64 with M <= N, the last of which
    is that of the end."""
    import numpy as np

    loss = np.array(losses, float)
    window = max(1, len(loss) // 50)
    known = np.where(np.isnan(loss), np.nanmean(loss) if np.isfinite(loss).any() else 0, loss)
    return np.convolve(known, np.ones(window) / window, mode="valid") if len(loss) else loss


def plot(metrics: Path, picture: Path, title: str) -> None:
    """The loss curve of a metrics.jsonl as a PNG: training loss, its running mean, validation loss;
    nats a token.

    Steps that were refused are red lines. The last validation loss that is a number stands in the
    legend."""
    import numpy as np

    # not pyplot, which chooses how all figures of the process are drawn
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    lines = read_metrics(metrics)
    if not lines:
        return
    tokens = np.array([line["tokens"] for line in lines])
    loss = np.array([line["loss"] for line in lines], float)  # of None, which is no number, NaN
    mean = running_mean(loss)
    valid = [
        (line["tokens"], line["valid_loss"]) for line in lines if line.get("valid_loss") is not None
    ]
    refused = [line["tokens"] for line in lines if "refused" in line]
    # fixed margins: laying out by what the text takes draws everything twice
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.add_axes((0.09, 0.21, 0.88, 0.7))
    axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(tokens[len(tokens) - len(mean) :], mean, color="tab:blue", label="training")
    if valid:
        label = f"validation, last {valid[-1][1]:.3f}"
        axes.plot(
            *zip(*valid, strict=True), color="tab:orange", marker="o", markersize=4, label=label
        )
    if refused:
        # from the lower to the upper edge, whatever the losses are
        edges = axes.get_xaxis_transform()
        axes.vlines(
            refused, 0, 1, transform=edges, color="tab:red", linewidth=0.8, label="refused steps"
        )
    axes.set(xlabel="tokens read", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    figure.legend(loc="lower center", ncols=3, frameon=False)  # below the curves
    try:
        replace_file(picture, lambda temporary: figure.savefig(temporary, format="png"))
    except OSError as error:  # a picture must not cost a run
        say(f"warning: {error}")


def draw_runs(runs: Mapping[str, list[dict[str, Any]]], picture: Path) -> None:
    """The losses of several runs in one PNG: running means as lines, validation losses as dots of
    the same colour.

    runs: name -> the lines of its metrics.jsonl. Raises ValueError where no run has any, OSError
    naming the picture."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    if not any(runs.values()):
        raise ValueError(
            f"{picture}: there is nothing to draw, because no step of {', '.join(runs)} is recorded"
        )
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (name, lines) in enumerate(runs.items()):
        if not lines:
            continue
        tokens, mean = (
            np.array([line["tokens"] for line in lines]),
            running_mean([line["loss"] for line in lines]),
        )
        # Ten colours, then the same dashed: so that more than ten runs can still be told apart.
        color, style = f"C{number % 10}", ["-", "--", ":", "-."][number // 10 % 4]
        valid = [
            (line["tokens"], line["valid_loss"])
            for line in lines
            if line.get("valid_loss") is not None
        ]
        label = f"{name}, validation {valid[-1][1]:.3f}" if valid else name
        axes.plot(
            tokens[len(tokens) - len(mean) :],
            mean,
            color=color,
            linestyle=style,
            linewidth=1.2,
            label=label,
        )
        if valid:
            axes.plot(
                *zip(*valid, strict=True), color=color, linestyle="none", marker="o", markersize=4
            )
    axes.set(xlabel="tokens read", ylabel="loss (nats per token)")
    axes.set_title("lines: training, running mean; dots: validation", fontsize="medium")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    # where no curve runs through it
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    replace_file(picture, lambda temporary: figure.savefig(temporary, format="png"))
