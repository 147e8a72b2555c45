"""The picture of a loss curve: every curve that a run may leave can be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from transnormer.train.metrics import plot


def line(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 128 * step, "loss": loss, **more}


CURVES = {
    "one step": [line(1, 5.0)],
    "validation after one step": [line(1, 5.0, valid_loss=4.9)],
    "refused steps": [
        line(step, None if step in (1, 30, 60) else 5 - step / 60) for step in range(1, 61)
    ],
    "refused steps alone": [
        line(step, None, refused="the loss is not finite") for step in (1, 2, 3)
    ],
    "refused, validated and gone back": [
        line(1, 5.0), line(2, None, went_back={"after_step": 1}), line(3, 4.0, valid_loss=4.5),
        line(4, 3.0),
    ],
    "from a later step on": [line(step, 3.0, valid_loss=3.5) for step in range(7_000, 7_120)],
}  # fmt: skip


@pytest.mark.parametrize("curve", CURVES)
def test_a_curve_is_drawn(curve: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in CURVES[curve])
    )
    plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png", curve)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list


def test_no_curve_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
