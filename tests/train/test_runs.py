"""What `info` and `compare` tell of runs, from folders written by hand."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from transnormer.cli import app
from transnormer.train.recipe import Recipe
from transnormer.train.runs import RunReport, compare, describe_run, read_run, spoken


def write_run(folder: Path, *lines: dict[str, Any], **settings: dict[str, Any]) -> Path:
    """A run's folder without checkpoints: steps of 100 tokens at 50 tokens/s."""
    values = {"run": folder.name, "data": {"path": "data/mine", "text": ["book.txt"]}, **settings}
    values["train"] = {
        "batch_tokens": 100,
        "seq_len": 10,
        "steps": 200,
        **settings.get("train", {}),
    }
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(Recipe.from_dict(values).to_toml())
    start = {"time": "2026-11-27T20:00:00+00:00", "device": "cpu"}
    (folder / "run.json").write_text(json.dumps({"parameters": 1_234, "starts": [start]}))
    known = {"gradient_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 50.0}
    record = [{"step": n, "tokens": 100 * n, **known, **line} for n, line in enumerate(lines, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    return folder


def losses(count: int, first: float) -> list[dict[str, Any]]:
    """Losses that fall by 0.01 a step, the last but ninth refused, and two validations of which the
    first is lower."""
    lines: list[dict[str, Any]] = [{"loss": first - 0.01 * n} for n in range(count)]
    lines[count // 2] |= {"valid_loss": first - 0.5, "valid_bits_per_byte": 2.0}
    lines[-1] |= {"valid_loss": first - 0.25, "valid_bits_per_byte": 2.5}
    lines[-9] |= {"loss": None, "refused": "loss nan", "samples": [0, 10]}
    return lines


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = write_run(tmp_path / "runs/first", *losses(200, 5.0))
    return [first, write_run(tmp_path / "runs/second", *losses(100, 4.5), optim={"lr": 1e-2})]


def text_of(table: object) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_info_says_steps_losses_data_and_time(runs: list[Path]) -> None:
    steps, training, valid, data, time = describe_run(read_run(runs[0]))
    assert steps.endswith("runs/first: 200 of 200 steps, 1 of them refused")
    assert re.search(r"training loss   3\.0200 nats", training)  # the mean of the last three
    assert (
        valid
        == "validation loss 4.7500 (2.5000 bits per byte) at step 200; lowest 4.5000 at step 101"
    )
    assert data == "data            data/mine, from book.txt; 20,000 tokens read"
    assert "6 min 40 s of training at 50 tokens/s; started 2026-11-27T20:00:00+00:00 on cpu" in time
    shown = CliRunner().invoke(app, ["info", str(runs[0])], catch_exceptions=False).stdout
    assert shown.splitlines() == [
        steps,
        training,
        valid,
        data,
        time,
        "model           no checkpoint yet",
    ]


def test_runs_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    options = ["compare", *map(str, runs), "--out", str(tmp_path / "both.png")]
    shown = CliRunner().invoke(app, options, catch_exceptions=False).stdout
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    figures, settings = shown.split("settings that differ")
    for row in (
        "steps │ 200 of 200 (1 refused) │ 100 of 200 (1 refused)",
        "lowest validation loss │ 4.5000 │ 4.0000",
        "bits per byte │ 2.5000 │ 2.5000",
        "tokens/s │ 50 │ 50",
        "training time │ 6 min 40 s │ 3 min 20 s",
    ):
        assert row in re.sub(" +", " ", figures)
    assert re.sub(" +", " ", settings).count("│") == 4
    assert "optim.lr │ 0.0003 │ 0.01" in re.sub(" +", " ", settings)


def test_tables_keep_their_names_at_80_columns(runs: list[Path]) -> None:
    shown = text_of(compare(runs)[0])
    for name in ("first", "second", "lowest validation loss", "training time"):
        assert name in shown


def test_runs_without_a_step_and_runs_of_one_name(runs: list[Path], tmp_path: Path) -> None:
    new = write_run(tmp_path / "other/first")
    (new / "metrics.jsonl").unlink()
    (new / "run.json").unlink()
    assert describe_run(read_run(new))[0].endswith("other/first: 0 of 200 steps")
    assert compare([new])[1] is None
    figures, settings = compare([runs[0], new], tmp_path / "a.png")
    headers = [str(column.header) for column in figures.columns]
    assert headers == ["", str(runs[0]), str(new)]
    assert settings is None
    with pytest.raises(ValueError, match="nothing to draw, because no step of first is recorded"):
        compare([new], tmp_path / "b.png")
    diverged = write_run(tmp_path / "nan", *[{"loss": None}] * 3)
    assert read_run(diverged).loss is None


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "nothing",
            (
                "nothing: no such run; runs are folders that `transnormer train` makes, such as "
                "runs/demo"
            ),
        ),
        (".", "not a run, because it has no recipe.toml"),
        ("runs/first", r"recipe.toml: damaged"),
    ],
)
def test_what_is_no_run_is_one_line(
    folder: str, message: str, runs: list[Path], tmp_path: Path
) -> None:
    (runs[0] / "recipe.toml").write_text("run = [")
    with pytest.raises((OSError, ValueError), match=message):
        read_run(tmp_path / folder)


def test_a_picture_that_cannot_be_is_refused_before_the_work(
    runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"curves.pdf: the picture is a PNG; name it so, e.g. .*curves.png"
    ):
        compare(runs, tmp_path / "curves.pdf")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"both.png: cannot be written: Not a directory"):
        compare(runs, tmp_path / "file" / "both.png")


def test_times_are_spoken() -> None:
    known = {0: "0 s", 59.6: "1 min 0 s", 61: "1 min 1 s", 7_322: "2 h 2 min", 90_000: "1 d 1 h"}
    assert {seconds: spoken(seconds) for seconds in known} == known
    assert RunReport(Path(), {}, [], [], None).seconds == 0
