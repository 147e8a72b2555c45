"""Fits of the loss to parameters and tokens: made-up runs whose law is known, and the way from
results to what `transnormer plan` reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from transnormer.config import ModelConfig
from transnormer.planning import scaling as planned

from .test_experiments import EXPERIMENTS, arms, bench, called, report

import scaling  # isort: skip

LAW = np.array([1.8, np.log(30), 0.22, np.log(2_500), 0.4])  # E, ln A, alpha, ln B, beta
NOISE = 0.0025  # of ln L, as much as a seed changes
PLACES = [(n, d) for n in (4e6, 8e6, 16e6, 35e6) for d in (12e6, 35e6, 100e6)]


def made_up(seed: int, noise: float = NOISE) -> np.ndarray:
    """Runs that follow LAW: N, D and L, [12, 3]."""
    random = np.random.default_rng(seed)
    return np.array(
        [(*at, planned.loss(LAW, *at) * np.exp(random.normal(0, noise))) for at in PLACES]
    )


def test_without_noise_the_law_is_found() -> None:
    for start in (scaling.STARTS, scaling.STARTS[:1]):
        assert scaling.fit(made_up(0, 0.0), start) == pytest.approx(LAW, rel=1e-3)


def test_intervals_cover_the_truth_of_most_draws() -> None:
    """Between the runs, and at ten times their parameters and tokens."""
    covered, places = 0, [(2e7, 5e7), (35e7, 1e9)]
    for seed in range(4):
        points = made_up(seed)
        fitted = scaling.fit(points, scaling.STARTS[:1])
        drawn = scaling.bootstrap(points, draws=15, seed=seed)
        for place, away in zip(places, (0.01, 0.1), strict=True):
            losses = [planned.loss(each, *place) for each in drawn]
            truth = planned.loss(LAW, *place)
            covered += min(losses) <= truth <= max(losses)
            assert planned.loss(fitted, *place) == pytest.approx(truth, rel=away)
    assert covered >= 6  # of 8


def test_too_few_runs_are_refused() -> None:
    points = made_up(0)
    assert scaling.refusal(points) is None
    assert (
        scaling.refusal(np.concatenate([points[:8], points[:8]]))
        == "8 distinct pairs of parameters and tokens, and 9 are needed"
    )
    two = [(n, d, 3.0) for n in (1e6, 2e6) for d in range(1, 6)]
    assert scaling.refusal(np.array(two)) == "2 distinct numbers of parameters, and 3 are needed"
    assert scaling.refusal(scaling.points_of([])) is not None


def test_the_table_has_every_size_at_every_budget(tmp_path: Path) -> None:
    runs = list(arms.runs("scaling"))
    sizes, budgets = ("5m", "10m", "20m", "45m"), (12_500_000, 35_000_000, 100_000_000)
    for arm in ("published", "base-conv", "hybrid-conv", "llama-scaled"):
        of_arm = [run for run in runs if run.arm == arm]
        assert [(run.size, run.tokens) for run in of_arm] == [
            (size, budget) for size in sizes for budget in budgets
        ]
        assert {run.lr for run in of_arm} == {arms.rate("45m", "adamw", of_arm[0].family)}
    said = called(bench, "scaling", "--dry", "--out", tmp_path)
    assert said.startswith("48 runs, 0 of them done")
    assert "20m-35000k-adamw-0.004-hybrid-conv-11" in said.split()
    said = called(bench, "scaling", "--dry", "--out", tmp_path, "--size", "5m", "--tokens", "1M")
    assert said.startswith("4 runs, 0 of them done")


def test_runs_of_several_sizes_make_no_settings_of_other_tables() -> None:
    def record(size: str, table: str) -> dict[str, object]:
        return {"seed": 11, "arm": "published", "table": table, "size": size, "tokens": 1} | {
            "optimizer": "adamw",
            "lr": 4e-3,
        }

    results = [record("5m", "scaling"), record("45m", "scaling"), record("45m", "T4")]
    found = report.of_table("T4", results)
    assert {setting: len(runs["published"]) for setting, runs in found.items()} == {
        ("45m", 1, "adamw"): 2
    }


def write_results(folder: Path) -> None:
    """Results of the whole table but for one arm, of which the runs at 45m are missing and one more
    diverged."""
    random = np.random.default_rng(0)
    for run in arms.runs("scaling"):
        if run.arm == "base-conv" and run.size == "45m":
            continue
        model = arms.model_of(run.arm, run.size, 16_384)
        config = ModelConfig.named(model.pop("size"), **model)
        parameters = planned.counted_parameters(config)
        found = planned.loss(LAW, parameters, run.tokens) * np.exp(random.normal(0, NOISE))
        record = {
            "arm": run.arm,
            "tokens": run.tokens,
            "optimizer": run.optimizer,
            "parameters_without_embeddings": parameters,
            "scores": {"test": {"loss": found}},
            "model": config.to_dict(),
            "data": "hashes",
        }
        if run.arm == "base-conv" and (run.size, run.tokens) == ("5m", 12_500_000):
            record["diverged"] = "the run diverged"
        (folder / f"{run.name}.json").write_text(json.dumps(record))


def test_from_results_to_what_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path)
    monkeypatch.setattr(planned, "FITS", tmp_path / "fits.json")
    options = ("--results", tmp_path, "--out", planned.FITS, "--draws", 4)
    said = called(scaling, *options)
    assert "base-conv is not fitted: 8 distinct pairs of parameters and tokens, and 9" in said
    fits = planned.read_fits()
    assert fits is not None
    assert [*fits["architectures"]] == ["published", "hybrid-conv", "llama-scaled"]
    assert fits["architectures"]["published"]["architecture"] == {"embed_scale": True}
    assert fits["architectures"]["hybrid-conv"]["architecture"]["softmax_every"] == 5
    assert fits["tokenizer"] == "byte-level BPE of 16,384"
    for arm in ("published", "hybrid-conv"):
        model = arms.model_of(arm, "45m", 16_384)
        config = ModelConfig.named(model.pop("size"), **model)
        found = planned.predict_model(config, 50e6, fits)
        assert found is not None
        assert found.architecture == arm
        assert found.loss == pytest.approx(
            planned.loss(LAW, planned.counted_parameters(config), 50e6), rel=0.01
        )
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    title, image, table, says = report.fitted("Loss")
    assert title == "## Loss"
    assert "results-scaling.png" in image
    assert "| published | 12 |" in table
    assert "on the test part, in nats a token" in says.replace("\n", " ")
    assert (tmp_path / "results-scaling.png").stat().st_size > 1000


def test_without_fits_nothing_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "FITS", tmp_path / "fits.json")
    assert report.fitted("Loss") == []
    with pytest.raises(SystemExit, match="error: no arm has enough runs"):
        called(scaling, "--results", tmp_path, "--out", planned.FITS)
    assert not planned.FITS.exists()


def test_parameters_are_counted_as_in_results() -> None:
    paths = sorted((EXPERIMENTS / "results").glob("*-published-*.json"))
    records = [json.loads(path.read_text()) for path in (paths[0], paths[-1])]
    assert len({record["size"] for record in records}) == 2
    for record in records:
        counted = planned.counted_parameters(ModelConfig.from_dict(record["model"]))
        assert counted == record["parameters_without_embeddings"]
