"""The bench of experiments: arms that can be compared, statistics that can be trusted, one table run whole."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transnormer.config import ModelConfig
from transnormer.data.loader import TokenData
from transnormer.model.language_model import LanguageModel

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import arms  # noqa: E402
import corpus  # noqa: E402
import one  # noqa: E402
import report  # noqa: E402

VOCABULARY = 16_384


@pytest.mark.parametrize("size", ["toy", "10m", "45m"])
def test_all_arms_have_the_parameters_of_the_reference(size: str) -> None:
    def count(arm: str) -> int:
        model = arms.model_of(arm, size, VOCABULARY)
        fields = {key: value for key, value in model.items() if key != "size"}
        config = ModelConfig.named(model["size"], **fields) if "size" in model else ModelConfig(**fields)
        return config.parameter_count()

    wanted = count(arms.REFERENCE)
    for arm, words in arms.TABLES["arms"].items():
        if words.get("fewer"):
            assert count(arm) < (1 - arms.TOLERANCE) * wanted
        else:
            assert abs(count(arm) - wanted) <= arms.TOLERANCE * wanted, arm


def test_tables_name_only_arms_and_families_that_there_are() -> None:
    for name, table in arms.TABLES["tables"].items():
        assert set(table["arms"]) <= arms.TABLES["arms"].keys(), name
        assert table.get("paper", {}).keys() <= set(table["arms"]), name
    families = {arm["family"] for arm in arms.TABLES["arms"].values()}
    for rates in arms.TABLES["rates"].values():
        assert all(chosen.keys() <= families for chosen in rates.values())
    with pytest.raises(ValueError, match=r"'T33' is not among the tables of tables\.toml; there are spread, rates"):
        list(arms.runs("T33", "toy"))


def test_what_explores_and_what_confirms_share_no_seed() -> None:
    explored = {run.seed for run in arms.runs("spread", "45m")}
    confirmed = {run.seed for run in arms.runs("ladder", "45m")}
    assert max(explored) < arms.CONFIRMING_SEED <= min(confirmed)


def test_chosen_rates_are_the_best_of_their_grids() -> None:
    """Of every grid that results are there for; a rate without a grid run at this size is only a first guess."""
    results = [json.loads(path.read_text()) for path in (EXPERIMENTS / "results").glob("*.json")]
    complete = 0
    for size, optimizers in arms.TABLES["rates"].items():
        for optimizer, chosen in optimizers.items():
            for family, rate in chosen.items():
                grid = arms.TABLES["tables"]["rates"]["grid"].get(optimizer, {}).get(family, [])
                found = {
                    r["lr"]: r["valid_loss"] for r in results
                    if (r["size"], r["optimizer"], r["family"], r["seed"]) == (size, optimizer, family, 0)
                    and r["arm"] in arms.TABLES["tables"]["rates"]["arms"]
                }  # fmt: skip
                if found.keys() >= set(grid) and grid:
                    complete += 1
                    assert rate == min(found, key=lambda lr: found[lr]), (size, optimizer, family)
                    assert min(grid) < rate < max(grid), (size, optimizer, family)
    assert complete >= 2


def test_paired_differences_and_holm() -> None:
    # by hand: differences 1, 2, 3; mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303
    found = report.paired({1: 2.0, 2: 4.0, 3: 6.0, 4: 9.0}, {1: 1.0, 2: 2.0, 3: 3.0, 9: 0.0})
    assert found is not None
    assert (found.mean, found.pairs) == (2.0, 3)
    assert found.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert report.paired({1: 2.0}, {1: 1.0}) is None
    assert report.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0]


def test_scores_count_every_token_once(prepared: Path) -> None:
    data = TokenData(prepared, "valid")
    config = ModelConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = LanguageModel(config).eval()
    with torch.no_grad():
        model.embed_tokens.weight.zero_()  # every logit is 0: each token costs log(vocabulary)
    found = one.score(model, data, 64, rows=4)
    nats = torch.tensor(300.0).log().item()
    assert found["tokens"] == data.tokens
    assert found["loss"] == pytest.approx(nats, rel=1e-5)
    assert found["nats"] == pytest.approx(nats * data.tokens, rel=1e-5)
    assert statistics.fmean(found["loss_by_position"]) == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / 0.6931472 / data.bytes, rel=1e-6)


def test_windows_are_read_from_an_empty_state(prepared: Path) -> None:
    data = TokenData(prepared, "valid")
    config = ModelConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model, ids = LanguageModel(config).eval(), torch.from_numpy(data.window(0, 129))
    found = one.score(model, data, 64, rows=3)["loss_by_position"]
    rows = [[data.end_of_text, *ids[:63].tolist()], ids[63:127].tolist()]
    targets = [ids[:64], ids[64:128]]
    losses = [model.loss(torch.tensor([r]), t[None], reduction="none") for r, t in zip(rows, targets, strict=True)]
    assert len(found) == 64
    first, second = (float(loss.flatten()[0].detach()) for loss in losses)
    windows = -(-data.tokens // 64)
    alone = [first, second]
    for number in range(2, windows):
        start = 64 * number - 1
        row = torch.from_numpy(data.window(start, 2))
        alone.append(float(model.loss(row[None, :1], row[None, 1:], reduction="sum").detach()))
    assert found[0] == pytest.approx(statistics.fmean(alone), rel=1e-5)


def test_parts_do_not_depend_on_where_a_document_lies() -> None:
    texts = [f"document {number}" for number in range(20_000)]
    parts = [corpus.part_of(text, False) for text in texts]
    assert 60 < parts.count("valid") < 140
    assert 60 < parts.count("test") < 140
    assert {corpus.part_of(text, True) for text in texts} == {"valid", "test"}


@pytest.fixture(scope="module")
def documents(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 short documents of Shakespeare, and a file whose documents are all held out."""
    folder = tmp_path_factory.mktemp("documents")
    pieces = text_file.read_text().split("\n\n")
    for name, some in (("plays.jsonl", pieces[:-20]), ("plays.valid.jsonl", pieces[-20:])):
        (folder / name).write_text("".join(json.dumps({"text": piece}) + "\n" for piece in some if piece.strip()))
    return folder


def command(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_table_from_packed_files_to_results(documents: Path, tmp_path: Path) -> None:
    command(EXPERIMENTS / "corpus.py", documents, "--vocab-size", 300, "--pack", tmp_path / "pack")
    command(EXPERIMENTS / "corpus.py", tmp_path / "pack", "--out", tmp_path / "corpus")
    given: list[Any] = [
        EXPERIMENTS / "run.py",
        "T4",
        "--size",
        "toy",
        "--seeds",
        1,
        "--tokens",
        "9k",
        "--side-by-side",
        2,
    ]
    given += ["--corpus", tmp_path / "corpus", "--work", tmp_path / "work", "--out", tmp_path / "out"]
    assert "2 runs, 0 of them done" in command(*given, "--archive", tmp_path / "all.tar.gz")
    assert "2 runs, 2 of them done" in command(*given, "--dry")
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [(r["arm"], r["seed"], r["tokens"]) for r in found] == [
        ("no-temperature", 11, 8192),
        ("published", 11, 8192),
    ]
    for record in found:
        assert record["valid_loss"] < 5.8  # log(300) is 5.70; it has begun to learn
        assert record["test_loss"] is not None
        assert record["parameters_without_embeddings"] < record["parameters"]
        assert {"device", "versions", "commit", "command", "date", "bits_per_byte", "state_bytes"} <= record.keys()
    command(EXPERIMENTS / "run.py", "--merge", tmp_path / "all.tar.gz", "--out", tmp_path / "merged")
    assert sorted(p.name for p in (tmp_path / "merged").iterdir()) == sorted(
        p.name for p in (tmp_path / "out").iterdir()
    )
