"""Recipes: what is read, what is refused and how the refusal reads."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from transnormer.config import ModelConfig
from transnormer.train.optim import learning_rate
from transnormer.train.parallel import Mesh, check, sizes
from transnormer.train.recipe import Optim, Recipe
from transnormer.train.setup import check_memory

from ..conftest import REPOSITORY


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text('[data]\npath = "d"\n[train]\nseq_len = 16\nbatch_tokens = 64\n[model]\nsize = "10m"\n')
    return path


def test_overrides_reach_every_table(recipe_file: Path) -> None:
    recipe = Recipe.load(
        recipe_file,
        ["run=second", "optim.lr=1", "optim.betas=[0.8, 0.9]", "train.recompute=true", "model.decay=paper",
         "model.position_layers=[0, 2]", "data.text=a.txt", "model.gate=False"],
    )  # fmt: skip
    assert (recipe.run, recipe.optim.lr, recipe.optim.betas) == ("second", 1.0, (0.8, 0.9))
    assert recipe.train.recompute is True
    assert recipe.data.text == ("a.txt",)
    config = recipe.model_config(300)
    assert (config.decay, config.position_layers, config.gate, config.vocab_size) == ("paper", (0, 2), False, 300)
    assert Recipe.load(recipe_file).run == "small"
    demo = Recipe.load(REPOSITORY / "recipes" / "demo.toml", ["model.size=1b", "model.num_hidden_layers=3"])
    config = demo.model_config(64_000)
    assert (config.hidden_size, config.num_hidden_layers, config.embed_scale) == (2_048, 3, True)
    assert recipe.rows == 4


def test_the_resolved_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(recipe_file, ["run=2024", 'data.text=["a \\"b\\".txt", "ü", "😀\x7f"]', "optim.eps=1e-12"])
    (tmp_path / "resolved.toml").write_text(recipe.to_toml())
    again = Recipe.load(tmp_path / "resolved.toml")
    assert again == recipe
    assert again.difference(recipe) is None
    assert Recipe.load(recipe_file, ["run=2024", "optim.lr=0.5"]).difference(recipe) is not None
    elsewhere = [
        "parallel.tensor=2",
        "train.accumulate=2",
        "train.recompute=true",
        "train.device=cpu",
        "checkpoint.keep=7",
    ]
    assert Recipe.load(recipe_file).difference(Recipe.load(recipe_file, elsewhere)) is None
    first = Recipe.load(recipe_file).difference(Recipe.load(recipe_file, ["train.steps=7"]))
    assert first == "train.steps was 1000 and is now 7"
    recipe_file.write_text(recipe_file.read_text().replace('size = "10m"', 'from = "runs/x"'))
    tuned = Recipe.load(recipe_file, ["lora.targets=out_proj", "train.reset_state=false", "lora.alpha=3"])
    (tmp_path / "resolved.toml").write_text(tuned.to_toml())
    assert Recipe.load(tmp_path / "resolved.toml").difference(tuned) is None
    assert (tuned.lora.rank, tuned.lora.targets, tuned.base) == (8, ("out_proj",), Path("runs/x"))
    assert Recipe.load(recipe_file).lora is Recipe.load(recipe_file).train.reset_state is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown key optim\.learning_rate; there are .*lr, betas"),
        ("optim.lr=inf", r"optim\.lr = inf, but must be a finite number"),
        ("optim.min_lr=-3", r"optim\.min_lr = -3\.0, but must be from 0 to 1"),
        ("train.seed=99999999999", r"train\.seed = 99999999999, but must be from 0"),
        ("optim.warmup_step=1", r"unknown key optim\.warmup_step; did you mean optim\.warmup_steps\?"),
        ("trian.steps=1", r"unknown key trian; did you mean train\?"),
        ("model.hiden_size=3", r"unknown key model\.hiden_size; did you mean model\.hidden_size\?"),
        ("model.size=7B", r"model\.size = '7B', but must be one of 10m, .*did you mean 7b\?"),
        ("train.steps=many", r"train\.steps = 'many', but must be a whole number"),
        ("train.steps=1.5", r"train\.steps = 1\.5, but must be a whole number"),
        ("train.recompute=1", r"train\.recompute = 1, but must be true or false"),
        ("train.steps=0", r"train\.steps = 0, but must be positive"),
        ("optim.warmup_steps=-1", r"optim\.warmup_steps = -1, but must be 0 or more"),
        ("train.seq_len=100", r"train\.batch_tokens = 64 is not a multiple of train\.seq_len"),
        ("optim.schedule=cosin", r"optim\.schedule = 'cosin', but must be one of cosine, .*did you mean cosine\?"),
        ("optim.betas=[0.9]", r"optim\.betas = \[0\.9\], but must be two numbers"),
        ("run=../away", r"run = '\.\./away', but must be a name"),
        ("data.path=''", r"data\.path is missing"),
        ("optim", "'optim' is not an override; write key=value"),
        ("run.name=x", "run.name: run is a setting, not a table"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(recipe_file: Path, override: str, message: str) -> None:
    recipe_file.write_text('run = "small"\n' + recipe_file.read_text())
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(recipe_file, [override])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        Recipe.load(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(ValueError, match=r"broken\.toml: not TOML"):
        Recipe.load(tmp_path / "broken.toml")


def test_every_recipe_of_the_repository_is_one() -> None:
    recipes = sorted((REPOSITORY / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        recipe = Recipe.load(path)
        if recipe.base is None:
            assert recipe.model_config(1).parameter_count() > 0
        else:
            assert recipe.base in {Path("runs") / other.stem for other in recipes}


@pytest.mark.parametrize(("size", "gpus", "rows_each"), [("385m", 8, 4), ("1b", 16, 4), ("7b", 64, 1)])
def test_the_papers_sizes_fit_the_gpus_that_their_recipes_name(
    size: str, gpus: int, rows_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / "recipes" / f"{size}.toml"
    assert f"on {gpus} GPUs of 80 GB" in path.read_text()
    recipe = Recipe.load(path)
    config, train, optim = recipe.model_config(64_000), recipe.train, recipe.optim
    assert config == ModelConfig.named(size, embed_scale=size != "7b")
    assert train.steps * train.batch_tokens == pytest.approx(300e9, rel=1e-4)
    assert (train.seq_len, optim.lr, optim.weight_decay, optim.schedule) == (8_192, 3e-4, 0.1, "constant")
    check(config, recipe.parallel, gpus, seq_len=train.seq_len, rows=recipe.rows)
    mesh = Mesh(torch.device("cuda"), *sizes(recipe.parallel, gpus))
    assert recipe.rows == rows_each * mesh.data_ranks
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30, 80 * 2**30))
    check_memory(recipe, config, mesh)


def test_a_vocabulary_too_small_for_the_data_is_refused(recipe_file: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size = 100, but the tokenizer of d has 300 words"):
        Recipe.load(recipe_file, ["model.vocab_size=100"]).model_config(300)


def test_schedules_start_peak_and_end_where_they_should() -> None:
    for schedule, middle in (("cosine", 0.55), ("constant", 1.0), ("wsd", 1.0)):
        optim = Optim(lr=1.0, schedule=schedule, warmup_steps=10, min_lr=0.1, decay_share=0.2)
        rates = [learning_rate(optim, step, 110) for step in range(1, 111)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9] == pytest.approx(1.0)
        assert rates[59] == pytest.approx(middle)
        assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(Optim(lr=2.0, warmup_steps=0, schedule="constant"), 1, 10) == 2.0
