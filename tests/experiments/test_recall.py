"""Runs of recall: every arm can be asked, and a run that is there is not run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .test_experiments import arms  # which puts experiments/ on the path

import recall  # isort: skip
import recall_report  # isort: skip


@pytest.mark.parametrize("arm", arms.TABLES["tables"]["search"]["arms"])
def test_every_arm_of_the_search_has_a_small_model(arm: str) -> None:
    config = recall.model_of(arm, 128)
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    assert config.linear == (not arm.startswith(("hybrid", "llama")))


@pytest.mark.parametrize("task", ["associations", "copies"])
def test_a_run_leaves_its_answers_once(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "SCORED_ROWS": 2,
        "LONGER": 64,
        "LENGTH": 32,
        "COPY": 9,
        "VOCAB": 50,
    }.items():
        monkeypatch.setattr(recall, name, value)
    monkeypatch.setattr(recall, "PAIRS", (2, 4))
    words = f"recall.py {task} --arms hybrid-conv --widths 64 --rates 3e-3 --steps 3 --rows 2"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--out", str(tmp_path)])
    recall.main()
    record = json.loads((tmp_path / f"{task}-hybrid-conv-64-0.003.json").read_text())
    assert record["steps"] == 3
    assert len(record["curve"]) == 3
    assert record["command"].startswith(f"python experiments/recall.py {task} --arms hybrid-conv")
    assert len(record["accuracy"]) == (1 if task == "copies" else 4)
    assert all(0 <= share <= 1 for share in record["accuracy"].values())
    assert "worst accuracy" in capsys.readouterr().out
    recall.main()
    assert not capsys.readouterr().out
    (title, says, picture, table, source) = recall_report.sections(tmp_path, tmp_path)
    assert title.startswith("## Recall: ")
    assert "The Transformer has not been asked" in says
    assert picture == f"![{title[3:]}](results-recall-{task}.png)"
    assert len(table.splitlines()) == 3
    assert table.count(" wide: ") == (2 if task == "copies" else 3)
    assert "1 runs" in source


def test_of_several_rates_the_best_counts() -> None:
    runs = [{"accuracy": {"4 pairs, 9 tokens": share}} for share in (0.2, 0.9, 0.5)]
    assert recall_report.best(runs) is runs[1]
    record = {"accuracy": {f"{n} pairs, {t} tokens": 1.0 for t in (9, 99) for n in (4, 8)}}
    assert recall_report.asked(record) == ["8 pairs, 9 tokens", "8 pairs, 99 tokens"]
