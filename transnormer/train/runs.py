"""What runs tell of themselves, for `transnormer info` and `transnormer compare`: steps, losses,
data, time, settings."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_can_write
from ..run_folder import METRICS, RECIPE, STARTS
from .metrics import draw_runs, read_metrics

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class RunReport:
    """A run's folder as it stands. Losses are nats a token, None where there is none yet; times are
    seconds."""

    folder: Path
    settings: dict[str, Any]  # "optim.lr" -> 0.006, every setting of the recipe
    lines: list[dict[str, Any]]  # of metrics.jsonl
    starts: list[dict[str, Any]]  # of run.json
    parameters: int | None

    @property
    def steps(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def tokens(self) -> int:
        return self.lines[-1]["tokens"] if self.lines else 0

    @property
    def refused(self) -> int:
        """Steps that did not reach the weights."""
        return sum("refused" in line for line in self.lines)

    @property
    def loss(self) -> float | None:
        """The mean over the last fiftieth of the steps that reached the weights: there the
        picture's line ends."""
        losses = [
            line["loss"]
            for line in self.lines
            if line["loss"] is not None and "refused" not in line
        ]
        return statistics.fmean(losses[-max(1, len(losses) // 50) :]) if losses else None

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The lines with a validation loss that is a number."""
        return [line for line in self.lines if line.get("valid_loss") is not None]

    @property
    def tokens_per_second(self) -> float | None:
        """The median over all steps: the first ones compile, and some wait for an evaluation or a
        checkpoint."""
        speeds = [line["tokens_per_second"] for line in self.lines if line.get("tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def seconds(self) -> float:
        """The time of all steps together, without evaluations and pauses."""
        speeds = [line["tokens_per_second"] for line in self.lines if line.get("tokens_per_second")]
        return sum(self.settings["train.batch_tokens"] / speed for speed in speeds)


def read_run(folder: str | Path) -> RunReport:
    """Read what a run's folder says. Raises OSError or ValueError in one line where it is no run,
    or a file is damaged."""
    folder = Path(folder)
    if not is_run(folder):
        wrong = "not a run, because it has no recipe.toml" if folder.is_dir() else "no such run"
        raise FileNotFoundError(
            f"{folder}: {wrong}; runs are folders that `transnormer train` makes, such as runs/demo"
        )
    try:
        tables = tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RECIPE}: damaged ({error})") from error
    settings: dict[str, Any] = {}
    for key, value in tables.items():
        settings |= (
            {f"{key}.{name}": x for name, x in value.items()}
            if isinstance(value, dict)
            else {key: value}
        )
    metrics, record = folder / METRICS, folder / STARTS
    lines = read_metrics(metrics) if metrics.is_file() else []
    started: dict[str, Any] = {"starts": [], "parameters": None}
    if record.is_file():
        try:
            started |= json.loads(record.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{record}: damaged ({error})") from error
    return RunReport(folder, settings, lines, started["starts"], started["parameters"])


def is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def describe_run(run: RunReport) -> list[str]:
    """What `transnormer info` says of a run: one line each for steps, losses, data and time."""
    settings = run.settings
    refused = f", {run.refused:,} of them refused" if run.refused else ""
    done = (
        f"run             {run.folder}: {run.steps:,} of {settings['train.steps']:,} steps{refused}"
    )
    said = [done]
    if run.loss is not None:
        said.append(f"training loss   {run.loss:.4f} nats per token, the mean of the last steps")
    if run.validations:
        last, best = run.validations[-1], min(run.validations, key=lambda line: line["valid_loss"])
        lowest = (
            "" if best is last else f"; lowest {best['valid_loss']:.4f} at step {best['step']:,}"
        )
        bits = (
            f" ({last['valid_bits_per_byte']:.4f} bits per byte)"
            if "valid_bits_per_byte" in last
            else ""
        )
        said.append(
            f"validation loss {last['valid_loss']:.4f}{bits} at step {last['step']:,}{lowest}"
        )
    text = ", ".join(settings.get("data.text", []))
    said.append(
        f"data            {settings['data.path']}{f', from {text}' if text else ''}; "
        f"{run.tokens:,} tokens read"
    )
    if run.tokens_per_second is not None:
        speed = f"{run.tokens_per_second:,.0f} tokens/s"
        started = (
            f"; started {run.starts[-1]['time']} on {run.starts[-1]['device']}"
            if run.starts
            else ""
        )
        said.append(f"time            {spoken(run.seconds)} of training at {speed}{started}")
    return said


def compare(
    folders: Sequence[str | Path], picture: str | Path | None = None
) -> tuple[Table, Table | None]:
    """(losses and speeds, the settings that differ or None where none does) of runs, one column a
    run.

    picture: a PNG to draw the runs' losses into. Raises OSError or ValueError as `read_run` does.
    """
    from rich.table import Table
    from rich.text import Text

    if picture is not None:
        if Path(picture).suffix.lower() != ".png":
            raise ValueError(
                f"{picture}: the picture is a PNG; name it so, e.g. "
                f"{Path(picture).with_suffix('.png')}"
            )
        check_can_write(picture)
    runs = [read_run(folder) for folder in dict.fromkeys(map(Path, folders))]
    names = _names(runs)
    if picture is not None:
        draw_runs({name: run.lines for name, run in zip(names, runs, strict=True)}, Path(picture))

    def table(title: str, rows: dict[str, list[str]]) -> Table:
        shown = Table(title=title, title_justify="left")
        for name in ("", *names):
            shown.add_column(Text(name), overflow="fold")
        for name, cells in rows.items():
            shown.add_row(Text(name), *map(Text, cells))
        return shown

    figures = table(
        "losses and speed", {name: [_cell(run, name) for run in runs] for name in FIGURES}
    )
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run")
    settings = {key: [_toml(run.settings.get(key)) for run in runs] for key in keys}
    differing = {key: cells for key, cells in settings.items() if len(set(cells)) > 1}
    return figures, table("settings that differ", differing) if differing else None


FIGURES = (
    "steps",
    "tokens",
    "training loss",
    "validation loss",
    "lowest validation loss",
    "bits per byte",
    "parameters",
    "tokens/s",
    "training time",
    "device",
)


def _cell(run: RunReport, figure: str) -> str:
    valid = run.validations
    speed, refused = run.tokens_per_second, f" ({run.refused:,} refused)" if run.refused else ""
    found: dict[str, str | None] = {
        "steps": f"{run.steps:,} of {run.settings['train.steps']:,}{refused}",
        "tokens": f"{run.tokens:,}",
        "training loss": None if run.loss is None else f"{run.loss:.4f}",
        "validation loss": f"{valid[-1]['valid_loss']:.4f}" if valid else None,
        "lowest validation loss": f"{min(line['valid_loss'] for line in valid):.4f}"
        if valid
        else None,
        "bits per byte": f"{valid[-1]['valid_bits_per_byte']:.4f}" if valid else None,
        "parameters": None if run.parameters is None else f"{run.parameters:,}",
        "tokens/s": None if speed is None else f"{speed:,.0f}",
        "training time": spoken(run.seconds),
        "device": run.starts[-1]["device"] if run.starts else None,
    }
    return found[figure] or "-"


def _names(runs: Sequence[RunReport]) -> list[str]:
    """What the runs are called: the names of their folders, or their paths where two have the same
    name."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _toml(value: object) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def spoken(seconds: float) -> str:
    """A time in its two largest units: 41 s, 3 min 20 s, 5 h 2 min, 12 d 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((n for n, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])
