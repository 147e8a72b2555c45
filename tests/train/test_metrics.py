"""metrics.jsonl as a run finds it again, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transnormer.train.metrics import Metrics, plot, read_metrics

DAMAGES = [
    "",
    "{",
    "[1]",
    "7",
    "null",
    '{"step": 6}',
    '{"step": "6", "tokens": 1, "loss": 1.0}',
    "\udcff\x00",
]


def write(path: Path, steps: int, **changes: Any) -> list[str]:
    lines = [
        json.dumps({"step": n, "tokens": 64 * n, "loss": 5 / n, **changes})
        for n in range(1, steps + 1)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return lines


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_drops_itself_alone_and_is_mentioned(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 9)
    lines[5] = damage
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    Metrics(path, after_step=8).close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 7, 8]
    why = "line 6 is damaged" if damage else "the lines are not there"
    assert f"{path}: {why}; 1 of 8 steps are missing from the curve" in capfd.readouterr().err


def test_a_missing_or_short_file_is_mentioned_and_a_torn_last_line_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    Metrics(path, after_step=0).close()
    write(path, 4)
    path.write_text(path.read_text() + '{"step": 5, "lo')
    Metrics(path, after_step=4).close()
    assert capfd.readouterr().err == ""
    Metrics(path, after_step=6).close()
    assert "the lines are not there; 2 of 6 steps" in capfd.readouterr().err
    path.unlink()
    Metrics(path, after_step=4).close()
    assert "the file is missing; 4 of 4 steps" in capfd.readouterr().err


def test_the_picture_takes_losses_that_are_not_finite(tmp_path: Path) -> None:
    """And keeps its number away from the curves: the legend lies outside the axes."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Figure, "savefig", lambda figure, *_, **__: drawn.append(figure) or Path(_[0]).touch()
        )
        write(tmp_path / "one.jsonl", 1, loss=None, refused="loss nan", valid_loss=None)
        plot(tmp_path / "one.jsonl", tmp_path / "one.png", "one")
        write(tmp_path / "more.jsonl", 5, valid_loss=4.25)
        plot(tmp_path / "more.jsonl", tmp_path / "more.png", "more")
    texts = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in drawn]
    assert texts == [["training", "refused steps"], ["training", "validation, last 4.250"]]
    for figure in drawn:
        figure.canvas.draw()
        assert (
            not figure.legends[0].get_window_extent().overlaps(figure.axes[0].get_window_extent())
        )
