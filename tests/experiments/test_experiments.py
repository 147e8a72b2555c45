"""The bench of experiments: arms that can be compared, statistics that can be trusted, one table
run whole."""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from transnormer.config import ModelConfig
from transnormer.data.loader import Loader
from transnormer.data.shards import TokenData
from transnormer.inference.sampling import Sampling, SamplingBatch, sample
from transnormer.model.language_model import LanguageModel

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import arms  # noqa: E402
import corpus  # noqa: E402
import one  # noqa: E402
import report  # noqa: E402
import run as bench  # noqa: E402
import sequences  # noqa: E402

VOCABULARY = 16_384


def test_the_time_of_a_run_that_was_stopped_is_that_of_what_is_left(tmp_path: Path) -> None:
    run = arms.Run("T4", "published", 11, "toy", 1_000_000, "adamw", 3e-3)
    options = argparse.Namespace(out=tmp_path / "out", work=tmp_path / "work", side_by_side=1)
    options.out.mkdir()
    assert bench.seconds_of(run, options) == 0
    # of a run that was stopped once, "seconds" are those of its second call
    timed = {"seconds": 7.0, "tokens": 500_000, "tokens_per_second": 5_000, "side_by_side": 1}
    (options.out / "toy-500k-adamw-0.003-lrpe-11.json").write_text(json.dumps(timed))
    assert bench.seconds_of(run, options) == 200 + bench.START_SECONDS
    (options.work / run.name).mkdir(parents=True)
    lines = [{"step": n, "tokens": 250_000 * n, "loss": 3.0} for n in (1, 2, 3)]
    (options.work / run.name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert bench.seconds_of(run, options) == 200 + bench.START_SECONDS  # it was killed
    (options.work / run.name / "checkpoints" / "step-2").mkdir(parents=True)
    assert bench.seconds_of(run, options) == 100 + bench.START_SECONDS


@pytest.mark.parametrize(
    ("size", "vocabulary"),
    [(size, VOCABULARY) for size in ("toy", "5m", "10m", "20m", "45m")] + [("10m", 257)],
)
def test_all_arms_have_the_parameters_of_the_reference(size: str, vocabulary: int) -> None:
    def count(arm: str) -> int:
        model = arms.model_of(arm, size, vocabulary)
        fields = {key: value for key, value in model.items() if key != "size"}
        config = (
            ModelConfig.named(model["size"], **fields) if "size" in model else ModelConfig(**fields)
        )
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
    with pytest.raises(
        ValueError, match=r"'T33' is not among the tables of tables\.toml; there are spread, rates"
    ):
        list(arms.runs("T33", "toy"))


def test_what_explores_and_what_confirms_share_no_seed() -> None:
    explored = {run.seed for run in arms.runs("spread", "45m")}
    confirmed = {run.seed for run in arms.runs("ladder", "45m")}
    assert max(explored) < arms.CONFIRMING_SEED <= min(confirmed)


def test_names_of_results_are_those_of_their_runs() -> None:
    """A run whose name changed would be run again."""
    for path in (EXPERIMENTS / "results").glob("*.json"):
        record = json.loads(path.read_text())
        fields = {key: record[key] for key in ("table", "arm", "seed", "size", "optimizer", "lr")}
        asked = re.search(r"-(\d+)k-", path.name)
        assert asked is not None
        run = arms.Run(
            **fields,
            tokens=1000 * int(asked[1]),
            dataset=record.get("dataset", "text"),
            dtype=record.get("dtype", "bfloat16"),
        )
        assert run.name == path.stem
    assert [run.name for run in arms.runs("rates-digits", "10m", arms=["published"])] == [
        f"digits-10m-172000k-adamw-{lr}-published-0" for lr in (0.002, 0.004, 0.008)
    ]


def test_rates_of_other_data_are_their_own() -> None:
    with pytest.raises(
        ValueError,
        match=r"no learning rate for toy, adamw, linear; run the table `rates-speech` and",
    ):
        list(arms.runs("speech-long", "toy"))


def test_chosen_rates_are_the_best_of_their_grids() -> None:
    """Of every grid that results are there for; a rate without a grid run at this size is only a
    first guess."""
    results = [json.loads(path.read_text()) for path in (EXPERIMENTS / "results").glob("*.json")]
    complete = 0
    for name, optimizers in arms.TABLES["rates"].items():
        size, _, folder = name.partition("-")
        table = arms.TABLES["tables"][f"rates-{folder}" if folder else "rates"]
        for optimizer, chosen in optimizers.items():
            for family, rate in chosen.items():
                grid = table["grid"].get(optimizer, {}).get(family, [])
                found = {
                    r["lr"]: r["valid_loss"]
                    for r in results
                    if (r["size"], r["optimizer"], r["family"], r["seed"])
                    == (size, optimizer, family, 0)
                    and r["arm"] in table["arms"]
                    and r.get("dataset", "text") == (folder or "text")
                    and r["valid_loss"] is not None
                    and "dtypes" not in arms.TABLES["tables"].get(r["table"], {})
                }
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


def test_conclusions_follow_from_intervals_and_say_what_the_paper_says() -> None:
    def runs(*losses: float) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "scores": {"test": {"loss": loss}}} for seed, loss in enumerate(losses)
        ]

    by_arm = {
        "published": runs(3.0, 3.1, 3.2),
        "ape": runs(3.5, 3.61, 3.7),
        "lrpe-d": runs(3.03, 3.08, 3.21),
    }
    assert report.conclusion("T3", report.verdicts("T3", by_arm, "test")) == (
        "`ape` is worse than `published` (+16.2 %; as in the paper, +6.2 %). "
        "`lrpe-d` is not distinguishable from `published` (+0.2 %; in the paper -0.5 %)."
    )
    by_arm = {
        "plain": runs(3.5, 3.61, 3.7),
        "plain-rope": runs(3.0, 3.1, 3.2),
        "published": runs(3.0, 3.1, 3.2),
    }
    found = report.conclusion("ladder", report.verdicts("ladder", by_arm, "test"))
    assert found == (
        "`plain` is worse than `published` (+16.2 %). `plain-rope` is better than `plain` "
        "(-14.0 %)."
    )


def test_a_rate_at_which_a_run_diverged_is_never_the_best() -> None:
    losses = {0.5e-3: 3.9, 1e-3: 3.7, 2e-3: 3.8, 4e-3: None}
    runs = [{"lr": lr, "seed": 0, "valid_loss": loss} for lr, loss in losses.items()]
    table = report.rates("rates", {("45m", 100_000_000, "adamw"): {"plain": runs}})
    assert "| 0.0005: 3.9000, 0.001: **3.7000**, 0.002: 3.8000, 0.004: diverged | inside |" in table


def test_scores_count_every_token_once(prepared: Path) -> None:
    data = TokenData(prepared, "valid")
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
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
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model, ids = LanguageModel(config).eval(), torch.from_numpy(data.window(0, 129))
    found = one.score(model, data, 64, rows=3)["loss_by_position"]
    rows = [[data.end_of_text, *ids[:63].tolist()], ids[63:127].tolist()]
    targets = [ids[:64], ids[64:128]]
    losses = [
        model.loss(torch.tensor([r]), t[None], reduction="none")
        for r, t in zip(rows, targets, strict=True)
    ]
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
        (folder / name).write_text(
            "".join(json.dumps({"text": piece}) + "\n" for piece in some if piece.strip())
        )
    return folder


def called(module: ModuleType, *arguments: object) -> str:
    """What a script prints when it is called with these arguments, in this process."""
    words = [f"{module.__name__}.py", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", words)
        module.main()
    return printed.getvalue()


def test_a_table_from_packed_files_to_results(documents: Path, tmp_path: Path) -> None:
    called(corpus, documents, "--vocab-size", 300, "--pack", tmp_path / "pack")
    called(corpus, tmp_path / "pack", "--out", tmp_path / "corpus")
    table = ["T4", "--size", "toy", "--seeds", "1", "--tokens", "9k", "--side-by-side", "2"]
    for folder in ("corpus", "work", "out"):
        table += [f"--{folder}", str(tmp_path / folder)]
    command = [sys.executable, EXPERIMENTS / "run.py", *table, "--archive", tmp_path / "all.tar.gz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 0 of them done" in done.stdout
    assert "2 runs, 2 of them done" in called(bench, *table, "--dry")
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [(r["arm"], r["seed"], r["tokens"]) for r in found] == [
        ("no-temperature", 11, 8192),
        ("published", 11, 8192),
    ]
    noted = ("device", "versions", "commit", "command", "date", "bits_per_byte", "state_bytes")
    for record in found:
        assert record["valid_loss"] < 5.8  # log(300) is 5.70; it has begun to learn
        assert record["test_loss"] is not None
        assert record["parameters_without_embeddings"] < record["parameters"]
        assert record.keys() >= set(noted)
    called(bench, "--merge", tmp_path / "all.tar.gz", "--out", tmp_path / "merged")
    merged, out = (sorted(p.name for p in (tmp_path / x).iterdir()) for x in ("merged", "out"))
    assert merged == out


def test_mu_law_is_exact_within_half_a_level() -> None:
    levels = np.arange(256)
    amplitudes = sequences.decode(levels)
    assert (sequences.encode(amplitudes) == levels).all()
    every = np.arange(-(2**15), 2**15).astype(np.int16)
    error = np.abs(sequences.decode(sequences.encode(every)).astype(int) - every)
    steps = np.diff(amplitudes.astype(int))
    assert error[1000:-1000].max() <= steps.max() / 2 + 2
    assert error[2**15 - 100 : 2**15 + 100].max() <= 5  # near silence, where the steps are finest


def test_speech_from_wav_files_to_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, random = tmp_path / "wav", np.random.default_rng(0)
    (source / "words").mkdir(parents=True)
    wanted = {
        f"words/{n}.wav": random.integers(256, size=100 + n).astype(np.uint8) for n in range(60)
    }
    for name, levels in wanted.items():
        sequences.write_wav(source / name, levels)
    packed = tmp_path / "speech.npz"
    monkeypatch.setattr(sys, "argv", ["sequences.py", "speech", str(source), "--pack", str(packed)])
    sequences.main()
    found = sequences.recordings(packed)
    assert found.keys() == wanted.keys()
    assert all((found[name] == levels).all() for name, levels in wanted.items())
    parts = sequences.speech(packed)
    assert sum(map(len, parts.values())) == 60
    sequences.build(parts, tmp_path / "speech")
    test, bits = TokenData(tmp_path / "speech" / "test"), parts["test"]
    ids = test.window(0, test.tokens)
    assert (test.documents, test.tokens, test.vocab_size) == (
        len(bits),
        1 + sum(len(text) + 1 for text in bits),
        257,
    )
    assert "".join(
        chr(sequences.FIRST + level) for level in ids[1:][ids[1:] != test.end_of_text] - 1
    ) == "".join(bits)


def test_drawn_speech_becomes_a_wav_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = np.random.default_rng(0).integers(256, size=(4, 50)).astype(np.uint8)
    np.savez_compressed(tmp_path / "run.npz", drawn=levels)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    assert (
        "(results-speech-published.wav)"
        in report.drawn("speech", {"published": [{"path": tmp_path / "run.json"}]})[0]
    )
    assert (sequences.read_wav(tmp_path / "results-speech-published.wav") == levels.flatten()).all()
    assert report.drawn("speech", {"published": [{"path": tmp_path / "other.json"}]}) == []


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's files with 30 and 12 images of one bright column each."""
    folder = tmp_path_factory.mktemp("vision")
    for part, count in (("train", 30), ("t10k", 12)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[np.arange(count), :, np.arange(count) % 28] = 255
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        (folder / f"mnist-{part}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header + pixels.tobytes())
        )
    return folder


@pytest.fixture(scope="module")
def digits(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with the folder digits: 24 images for training, 6 for validation, 12 for the
    test."""
    corpus = tmp_path_factory.mktemp("beyond")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "VALID_IMAGES", 6)
        sequences.build(sequences.digits(images), corpus / "digits")
    return corpus


def test_a_row_of_digits_is_an_image(images: Path, digits: Path) -> None:
    wanted = 1 + sequences.read_images(images / "mnist-train-images-idx3-ubyte.gz").astype(int)
    for split, some in (("train", wanted[:24]), ("valid", wanted[24:])):
        data = TokenData(digits / "digits" / "train", split)
        loader = Loader(data, seq_len=785, batch_size=1, seed=0)
        assert loader.count == data.documents == len(some)
        batch = loader.batch(range(loader.count))
        assert (batch.ids[:, 1:].numpy() == some).all()
        assert (batch.targets[:, :-1].numpy() == some).all()
        assert batch.targets[:, -1].tolist() == [data.end_of_text] * len(some)
        # the first one is no data
        assert batch.ids[:, 0].tolist() == [1] + [data.end_of_text] * (len(some) - 1)


def test_digits_from_runs_to_report(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(arms.TABLES["datasets"]["digits"]["recipe"], "train.batch_tokens", 4 * 785)
    monkeypatch.setitem(arms.TABLES["datasets"]["digits"], "draw", [4, 784])
    # eight columns of the GLU are 2.5 % of so small a model
    monkeypatch.setattr(arms, "TOLERANCE", 0.02)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    for arm in ("published", "llama-scaled"):
        run = arms.Run("digits", arm, 11, "toy", 12 * 785, "adamw", 3e-3, "digits")
        given = {
            "run": vars(run),
            "corpus": str(digits),
            "work": str(tmp_path / "work"),
            "out": str(tmp_path),
        }
        given |= {"side_by_side": 1, "commit": None, "command": ""}
        monkeypatch.setattr(sys, "argv", ["one.py", json.dumps(given)])
        one.main()
        record = json.loads((tmp_path / f"digits-toy-9k-adamw-0.003-{arm}-11.json").read_text())
        scored = record["scores"]["test"]
        assert (scored["tokens"], scored["documents"], len(scored["loss_by_position"])) == (
            12 * 785,
            12,
            64,
        )
        assert scored["bits_per_sample"] == pytest.approx(
            scored["loss"] / 0.6931472 * 785 / 784, rel=1e-6
        )
        assert record["bits_per_sample"] < 8
        assert record["valid_curve"][-1][1] == pytest.approx(record["valid_loss"], rel=0.02)
        # one arm is enough, and faster
        monkeypatch.delitem(arms.TABLES["datasets"]["digits"], "draw", raising=False)
    found = np.load(tmp_path / "digits-toy-9k-adamw-0.003-published-11.npz")
    assert found["drawn"].shape == (4, 784)
    assert found["drawn"].dtype == np.uint8
    assert (found["real"].reshape(4, 28, 28)[range(4), :, range(4)] == 255).all()
    report.main()
    text = (tmp_path / "results.md").read_text()
    assert "| arm | seeds | parameters | rate | valid | test | bits a sample | tokens/s |" in text
    assert "results-digits-drawn.png" in text
    assert (tmp_path / "results-digits-drawn.png").stat().st_size > 1000


def test_a_run_that_diverges_is_a_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train").symlink_to(prepared)
    monkeypatch.setattr("transnormer.train.loop.plot", lambda *_: None)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    for arm, lr in (("published", 3e-3), ("published", 1e18), ("no-position", 3e-3)):
        run = arms.Run("stability", arm, 0, "toy", 20_000, "adamw", lr, dtype="float32")
        given = {
            "run": vars(run),
            "corpus": str(tmp_path / "corpus"),
            "work": str(tmp_path / "work"),
            "out": str(tmp_path),
        }
        given |= {"side_by_side": 1, "commit": None, "command": ""}
        monkeypatch.setattr(sys, "argv", ["one.py", json.dumps(given)])
        one.main()
        record = json.loads((tmp_path / f"{run.name}.json").read_text())
        assert ("diverged" in record) == (lr > 1)
        assert (record["valid_loss"] is None) == (lr > 1)
        if lr < 1:
            assert [len(found) for found in record["by_layer"].values()] == [2, 2]
            assert min(itertools.chain(*record["by_layer"].values())) > 0
    report.main()
    text = (tmp_path / "results.md").read_text()
    assert re.search(r"\| published \| float32 \| \d\.\d{3} \(\d+\.\d\) \| diverged \|", text)
    assert re.search(r"\| no-position \| float32 \| \d\.\d{3} \(\d+\.\d\) \| – \|", text)
    assert (tmp_path / "results-stability-toy-adamw.png").stat().st_size > 1000


def test_what_is_drawn_token_by_token_follows_the_whole_text() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=9,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model = LanguageModel(config).eval()
    samplings = SamplingBatch.of(
        [Sampling(temperature=1.0, top_p=1.0, seed=5 + row) for row in range(5)], model.device
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20)  # so that logits differ, and with all tokens before
    drawn = torch.from_numpy(one.draw(model, 5, 40, 0, 1)).long()
    logits, _ = model(torch.cat([torch.zeros(5, 1, dtype=torch.long), drawn + 1], 1))
    for place in range(40):
        number = torch.full((5,), place)
        assert sample(logits[:, place, 1:], samplings, number).tolist() == drawn[:, place].tolist()
    assert len(drawn.unique()) == 8
