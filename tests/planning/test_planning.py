"""Which meshes are found for a model, what the errors advise where none fits, and the verb."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transnormer.cli import app
from transnormer.cli.plan import _count
from transnormer.config import SIZES, TRANSFORMER, ModelConfig
from transnormer.planning.check import check_plan
from transnormer.planning.memory import Layout
from transnormer.planning.search import BATCH_TOKENS, Job, compare_tensor, saving, spelled
from transnormer.train.recipe import Recipe, model_overrides

ROOT = Path(__file__).parents[2]
TRILLION = ["model.num_hidden_layers=128", "model.hidden_size=25600",
            "model.num_attention_heads=200",
            "model.intermediate_size=68096"]  # fmt: skip
LONG = ("13b", "65b")
EVERY = [pytest.param(size, marks=[pytest.mark.proof] * (size in LONG)) for size in [*SIZES, "1t"]]


@pytest.mark.parametrize("size", EVERY)
def test_every_size_on_many_gpus(size: str) -> None:
    config = model_overrides("175b", TRILLION) if size == "1t" else ModelConfig.named(size)
    gpus = {"65b": 128, "175b": 512, "1t": 2_048}.get(size, 16)
    job = Job(config=config, gpus=gpus, gpu_name="h200", tokens=2e12, seq_len=8_192)
    plans = job.best()
    assert len(plans) == 3
    assert len({plan.layout.mesh for plan in plans}) == 3
    assert all(job.fits(plan) and plan.layout.world == gpus for plan in plans)
    for plan in plans:
        check_plan(config, plan)
    wrong = replace(plans[0].memory, weights=plans[0].memory.weights + 4)
    if size == "10m":
        with pytest.raises(RuntimeError, match="planned"):
            check_plan(config, replace(plans[0], memory=wrong))


def test_tensor_parallelism_saves_what_the_page_says() -> None:
    page = (ROOT / "docs/planning.md").read_text()
    models = [ModelConfig.named("7b"), ModelConfig.named("7b", **TRANSFORMER)]
    ours, theirs = (compare_tensor(config) for config in models)
    assert saving(ours) > 0.623  # the paper's, from 1 to 8
    assert saving(ours) > saving(theirs)
    rows = json.loads((ROOT / "benchmarks/results/plan_tensor_h100_2026-11-27.json").read_text())[
        "rows"
    ]
    found = {(row["model"], row["tensor"]): row["measured_bytes"] for row in rows}
    line = ["saved"]
    for plans, model in ((ours, "transnormer"), (theirs, "softmax")):
        for each in plans:
            assert each.memory.allocated == pytest.approx(
                found[model, each.layout.tensor], rel=0.01
            )
        line += [f"{saving(plans):.1%}", f"{1 - found[model, 8] / found[model, 1]:.1%}"]
    assert f"| {' | '.join(line)} |".replace("%", " %") in page
    for a, b in zip(ours, theirs, strict=True):
        each = a.layout.tensor
        cells = (
            a.memory.allocated,
            found["transnormer", each],
            b.memory.allocated,
            found["softmax", each],
        )
        assert f"| {each} | {' | '.join(f'{x / 1e9:.1f}' for x in cells)} |" in page


def test_more_of_everything_costs_what_it_must() -> None:
    job = Job(config=ModelConfig.named("7b"), gpus=64, seq_len=8_192)
    plain = job.plan(Layout(shard=64, accumulate=8))
    again = job.plan(Layout(shard=64, accumulate=8, recompute=True))
    assert again.memory.activations < plain.memory.activations / 5
    assert again.tokens_per_second <= plain.tokens_per_second
    cut = job.plan(Layout(shard=16, context=4, accumulate=32))
    assert cut.memory.weights == plain.memory.weights
    assert cut.memory.activations < plain.memory.activations / 3
    assert cut.bytes_per_step["context"]
    assert not plain.bytes_per_step["context"]
    hours = 24 * plain.days
    assert plain.tokens_per_second * hours * 3_600 == pytest.approx(job.tokens)
    assert plain.megawatt_hours == pytest.approx(hours * 64 * 700 / 1e6)


@pytest.mark.parametrize(
    ("command", "message", "advice"),
    [
        (
            "--size 175b --gpus 8",
            "nothing fits 8 x h100: at best .* of which optimizer .*; --gpus 64 would fit",
            "--gpus 64",
        ),
        (
            "--size 7b --gpus 8 --no-recompute --tensor 1 --accumulate 1",
            "of which activations .* would fit",
            None,
        ),
        (
            "--size 175b --gpus 2 --replicate 2",
            "; --gpus 64 without --replicate 2 would fit",
            "--gpus 64 --replicate 1",
        ),
        (
            "--size 10m --gpus 8 --batch-tokens 16K --seq 16384 --tensor 1 --context 1 "
            "--replicate 8",
            "; --batch-tokens 128K",
            "--batch-tokens 128K",
        ),
        (
            "--size 7b --gpus 8 --tensor 3",
            "--tensor 3 does not divide --gpus 8; 1, 2, 4 or 8 would",
            "--tensor 4",
        ),
        (
            "--size 7b --gpus 64 --replicate 3",
            "--replicate 3 does not divide --gpus 64; 1, 2, 4,",
            "--replicate 2",
        ),
        (
            "--size 7b --gpus 8 --tensor 4 --context 4",
            "--context 4 does not divide the 2 GPUs that are left for it; 1 or 2 would",
            "--context 2",
        ),
        (
            "--size 385m --gpus 16 --tensor 16",
            "--tensor 16 does not divide model.num_attention_heads = 8; 1, 2, 4 or 8 would",
            "--tensor 8",
        ),
        (
            "--size 10m --gpus 2 --context 2 model.decay=gated",
            "--context 2 needs a decay that is the same for all tokens, not model.decay=gated",
            None,
        ),
        (
            "--size 10m --gpus 2 --context 2 model.kind=transformer",
            "--context 2 is planned for linear attention alone, model.mixer=gla in every layer",
            "--context 1",
        ),
        (
            "--size 10m --gpus 3 --context 3",
            "--context 3 does not divide rows of --seq 2048",
            "--context 1",
        ),
        (
            "--size 45m --gpus 7 --batch-tokens 4M",
            "2,048 rows of 2,048 tokens cannot be shared by 7 GPUs; --batch-tokens 3.9375M",
            "--batch-tokens 3.9375M",
        ),
        (
            "--size 10m --gpus 8 --accumulate 3 --batch-tokens 4M",
            "--accumulate 3 does not divide the 2,048 rows of a step; --batch-tokens",
            None,
        ),
        ("--size 7b --tensor 2", "--tensor 2 needs at least 2 GPUs; --gpus is 1", "--gpus 2"),
        ("--size 7b --gpu v100", "no GPU 'v100'; there are a100, h100", "--gpu h200"),
        (
            "--size 10m --seq 3000 --batch-tokens 4M",
            "is not whole rows of 3,000; --batch-tokens 4194000 would be",
            "--batch-tokens 4194000",
        ),
        (
            "--size 10m model.num_hidden_layers=1000000",
            "model.num_hidden_layers = 1,000,000, but a plan has at most 4,096",
            None,
        ),
        (
            "--size 10m --batch-tokens 1T",
            "--batch-tokens is 1,099,511,627,776, but must be from 0 to 17,179,869,184",
            None,
        ),
        (
            "--size 10m --gpus 720720 --seq 8388608 --batch-tokens 8192M",
            "more than 50,000 layouts .* fix some factors, e.g. --context 1 --accumulate 1",
            None,
        ),
    ],
)
def test_errors_say_what_would_fit(command: str, message: str, advice: str | None) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run(*command.split())
    assert "\n" not in str(error.value)
    assert not re.search("parallel|train|process|launch", str(error.value))
    if advice is None and "; --" in str(error.value):
        advice = str(error.value).rpartition("; ")[2].partition(" would")[0].partition(" could")[0]
    if advice is not None:
        assert "best" in run(*command.split(), *advice.split())


@pytest.mark.parametrize("gpus", [1, 3, 7, 24, 100, 1_000, 6_144])
def test_by_default_a_step_is_one_that_the_gpus_can_share(gpus: int) -> None:
    job = Job(config=ModelConfig.named("10m"), gpus=gpus)
    assert job.layouts()
    assert job.rows == 2_048 if 2_048 % gpus == 0 else 0.9 < job.rows / max(2_048, gpus) < 1.1
    assert Job(config=job.config, gpus=gpus, seq_len=3_000).layouts()


def test_numbers_of_tokens_are_spelled_as_they_are_read() -> None:
    for tokens in (1, 1_000, 1_024, 3_000_000, 3_932_160, 4_194_304, 2**30, 2**40, 2**34 + 2_048):
        assert _count(spelled(tokens), 1_024) == tokens
    assert [spelled(2**22), spelled(3_932_160), spelled(2_560)] == ["4M", "3.75M", "2.5K"]


def run(*arguments: str) -> str:
    """What the verb prints; what it raises is raised here."""
    return CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False).stdout


def test_the_verb() -> None:
    found = json.loads(
        run(
            "--size", "385m", "--gpus", "2", "--tokens", "2B", "--json", "model.num_hidden_layers=4"
        )
    )
    assert (found["tokens"], found["batch_tokens"], found["model"]["num_hidden_layers"]) == (
        2e9,
        2**22,
        4,
    )
    memory = found["plans"][0]["memory"]
    assert memory.pop("total") == sum(memory.values())
    shown = run("--size", "45m", "--gpus", "2")
    assert "tokens/s a GPU" in shown
    *lines, settings = shown.splitlines()
    assert all(len(line) <= 100 for line in lines)
    overrides = settings.partition(": ")[2].split()
    assert len(overrides) == 10
    recipe = Recipe.load(ROOT / "recipes/385m.toml", overrides)
    assert recipe.rows * recipe.train.accumulate * recipe.train.seq_len == BATCH_TOKENS
    assert "saved" in run("--size", "1b", "--gpus", "8", "--compare-tensor")
    # five heads: tensor 2 and 4 are left out
    assert "saved" in run("--size", "10m", "--gpus", "4", "--compare-tensor")
    with pytest.raises(
        ValueError,
        match=r"'optim.lr=1' is no field of the model; write e.g. model.hidden_size=4096",
    ):
        run("optim.lr=1")
