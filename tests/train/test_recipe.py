"""Recipes: what is read, what is refused and how the refusal reads."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.layer_config import SoftmaxSettings
from transnormer.planning.mesh_sizes import check_mesh, resolve
from transnormer.train.mesh import Mesh
from transnormer.train.optim import learning_rate
from transnormer.train.recipe import Optim, Recipe, model_overrides
from transnormer.train.validate import check_memory

from ..conftest import REPOSITORY


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(
        '[data]\npath = "d"\n[train]\nseq_len = 16\nbatch_tokens = 64\n[model]\nsize = "10m"\n'
    )
    return path


def test_overrides_reach_every_table(recipe_file: Path) -> None:
    recipe = Recipe.load(
        recipe_file,
        [
            "run=second",
            "optim.lr=1",
            "optim.betas=[0.8, 0.9]",
            "train.recompute=true",
            "model.decay=paper",
            "model.position_layers=[0, 2]",
            "data.text=a.txt",
            "model.gate=False",
        ],
    )
    assert (recipe.run, recipe.optim.lr, recipe.optim.betas) == ("second", 1.0, (0.8, 0.9))
    assert recipe.train.recompute is True
    assert recipe.data.text == ("a.txt",)
    config = recipe.model_config(300)
    assert (config.decay, config.position_layers, config.gate, config.vocab_size) == (
        "paper",
        (0, 2),
        False,
        300,
    )
    assert Recipe.load(recipe_file).run == "small"
    demo = Recipe.load(
        REPOSITORY / "recipes" / "demo.toml", ["model.size=1b", "model.num_hidden_layers=3"]
    )
    config = demo.model_config(64_000)
    assert (config.hidden_size, config.num_hidden_layers, config.embed_scale) == (2_048, 3, True)
    assert recipe.rows == 4


def test_the_resolved_recipe_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(
        recipe_file, ["run=2024", 'data.text=["a \\"b\\".txt", "ü", "😀\x7f"]', "optim.eps=1e-12"]
    )
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
        "train.steps=7",
        "eval.every=3",
        "eval.tokens=64",
        "train.patience=9",
        "train.tensorboard=true",
    ]
    assert Recipe.load(recipe_file).difference(Recipe.load(recipe_file, elsewhere)) is None
    first = Recipe.load(recipe_file).difference(Recipe.load(recipe_file, ["train.seed=7"]))
    assert first == "train.seed was 0 and is now 7"
    recipe_file.write_text(recipe_file.read_text().replace('size = "10m"', 'from = "runs/x"'))
    tuned = Recipe.load(
        recipe_file, ["lora.targets=out_proj", "train.reset_state=false", "lora.alpha=3"]
    )
    (tmp_path / "resolved.toml").write_text(tuned.to_toml())
    assert Recipe.load(tmp_path / "resolved.toml").difference(tuned) is None
    assert (tuned.lora.rank, tuned.lora.targets, tuned.base) == (8, ("out_proj",), Path("runs/x"))
    assert Recipe.load(recipe_file).lora is Recipe.load(recipe_file).train.reset_state is None


@pytest.mark.parametrize(
    "text", ["2024_05_01", "0x10", "1_000", "2024-05-01", "007", "1e3", "true", "None", "inf"]
)
def test_text_that_looks_like_something_else_stays_text(
    recipe_file: Path, text: str, tmp_path: Path
) -> None:
    keys = ("run", "data.path", "data.text", "data.tokenizer", "data.text_field", "train.device")
    recipe = Recipe.load(recipe_file, [f"{key}={text}" for key in keys])
    assert (recipe.run, recipe.data.path, recipe.data.text, recipe.data.tokenizer) == (
        text,
        text,
        (text,),
        text,
    )
    assert (recipe.data.text_field, recipe.train.device) == (text, text)
    quoted = Recipe.load(recipe_file, [f"run='{text}'", f'data.text=["{text}", "b"]'])
    assert (quoted.run, quoted.data.text) == (text, (text, "b"))
    (tmp_path / "resolved.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "resolved.toml") == recipe
    recipe_file.write_text(f'[data]\npath = "d"\n[model]\nfrom = "{text}"\n')
    for overrides in ([], [f"model.from={text}"]):
        assert Recipe.load(recipe_file, overrides).base == Path(text)
    with pytest.raises(ValueError, match=rf"mixer = '{text}', but must be one of"):
        model_overrides("7b", [f"model.mixer={text}"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run = 2024_05_01", r"run = 20240501, but must be text, in quotes"),
        ("run = 2024-05-01", r"run = 2024-05-01, but must be text, in quotes"),
        ("run = 07:32:00", r"run = 07:32:00, but must be text, in quotes"),
    ],
)
def test_a_file_puts_text_in_quotes(recipe_file: Path, line: str, message: str) -> None:
    recipe_file.write_text(f"{line}\n{recipe_file.read_text()}")
    with pytest.raises(ValueError, match=message):
        Recipe.load(recipe_file)


def test_the_baseline_is_one_word_beside_which_fields_may_change(recipe_file: Path) -> None:
    config = Recipe.load(
        recipe_file, ["model.kind=transformer", "model.norm=srmsnorm"]
    ).model_config(300)
    assert config == ModelConfig.named("10m", vocab_size=300, **TRANSFORMER | {"norm": "srmsnorm"})
    assert Recipe.load(recipe_file, ["model.kind=published"]).model_config(
        300
    ) == ModelConfig.named("10m", vocab_size=300)
    assert model_overrides("7b", ["model.kind=transformer"]) == ModelConfig.named(
        "7b", **TRANSFORMER
    )
    recipe_file.write_text(recipe_file.read_text() + 'kind = "transformer"\nglu = "sglu"\n')
    assert Recipe.load(recipe_file).model_config(300).glu == "sglu"
    # then the file's other words no longer count
    asked = Recipe.load(recipe_file, ["model.kind=published"])
    assert asked.model_config(300) == ModelConfig.named("10m", vocab_size=300)
    for call in (
        lambda: Recipe.load(recipe_file, ["model.kind=tranformer"]),
        lambda: model_overrides("7b", ["model.kind=tranformer"]),
    ):
        with pytest.raises(
            ValueError,
            match=r"model\.kind = 'tranformer', but must be one of published, transformer; did",
        ):
            call()


def test_names_in_a_recipe_are_those_of_the_working_folder_or_of_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "clone/recipes/a.toml",
        "clone/text.txt",
        "clone/tok/tokenizer.json",
        "clone/base/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "clone/recipes/a.toml").write_text(
        '[data]\npath = "data/new"\ntext = ["../text.txt", "lost.txt"]\ntokenizer = '
        '"../tok"\n[model]\nfrom = "../base"\n'
    )
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    away = Recipe.load("../clone/recipes/a.toml")
    there = tmp_path.resolve() / "clone"
    assert away.data.text == (str(there / "text.txt"), "lost.txt")
    assert (away.data.tokenizer, away.base, away.data.path) == (
        str(there / "tok"),
        there / "base",
        "data/new",
    )
    assert (
        Recipe.load("../clone/recipes/a.toml", ["data.tokenizer=../tok"]).data.tokenizer == "../tok"
    )
    monkeypatch.chdir(there)
    assert Recipe.load("recipes/a.toml").data.text == ("text.txt", "lost.txt")
    (there / "lost.txt").touch()
    (there / "recipes/lost.txt").touch()
    assert Recipe.load("recipes/a.toml").data.text == ("text.txt", "lost.txt")


def test_the_repositorys_recipes_find_their_text_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in sorted((REPOSITORY / "recipes").glob("*.toml")):
        assert all(Path(name).is_file() for name in Recipe.load(path).data.text)


def test_the_resolved_recipe_says_nothing_of_data_that_were_made_already(
    recipe_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe.load(recipe_file, ["data.vocab_size=1024", "data.split=0.05"])
    assert recipe == Recipe.load(recipe_file)
    assert '[data]\npath = "d"\n\n' in recipe.to_toml()
    assert 'format = "alpaca"' in Recipe.load(recipe_file, ["data.format=alpaca"]).to_toml()
    assert (
        "vocab_size = 1024"
        in Recipe.load(recipe_file, ["data.vocab_size=1024", "data.text=a"]).to_toml()
    )
    with pytest.raises(ValueError, match=r"data\.format = 'mesages', but must be one of"):
        Recipe.load(recipe_file, ["data.format=mesages"])


@pytest.mark.parametrize("overrides", [["run=a", "run=b"], ["optim.lr=1", " optim.lr = 1"]])
def test_a_setting_is_given_once(recipe_file: Path, overrides: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"(run|optim\.lr) is given twice, as '.' and '.'; write it once"
    ):
        Recipe.load(recipe_file, overrides)
    with pytest.raises(ValueError, match=r"model\.norm is given twice"):
        model_overrides("7b", ["model.norm=srmsnorm", "model.norm=rmsnorm"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown key optim\.learning_rate; there are .*lr, betas"),
        ("optim.lr=inf", r"optim\.lr = inf, but must be a finite number"),
        ("optim.min_lr=-3", r"optim\.min_lr = -3\.0, but must be from 0 to 1"),
        ("train.seed=99999999999", r"train\.seed = 99999999999, but must be from 0"),
        (
            "optim.warmup_step=1",
            r"unknown key optim\.warmup_step; did you mean optim\.warmup_steps\?",
        ),
        ("trian.steps=1", r"unknown key trian; did you mean train\?"),
        ("model.hiden_size=3", r"unknown key model\.hiden_size; did you mean model\.hidden_size\?"),
        ("model.size=7B", r"model\.size = '7B', but must be one of 5m, .*did you mean 7b\?"),
        ("train.steps=many", r"train\.steps = 'many', but must be a whole number"),
        ("train.steps=1.5", r"train\.steps = 1\.5, but must be a whole number"),
        ("train.recompute=1", r"train\.recompute = 1, but must be true or false"),
        ("train.steps=0", r"train\.steps = 0, but must be positive"),
        ("optim.warmup_steps=-1", r"optim\.warmup_steps = -1, but must be 0 or more"),
        ("train.seq_len=100", r"train\.batch_tokens = 64 is not a multiple of train\.seq_len"),
        (
            "optim.schedule=cosin",
            r"optim\.schedule = 'cosin', but must be one of cosine, .*did you mean cosine\?",
        ),
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


@pytest.mark.parametrize(
    ("size", "gpus", "rows_each"), [("385m", 8, 4), ("1b", 16, 4), ("7b", 64, 1)]
)
def test_the_papers_sizes_fit_the_gpus_that_their_recipes_name(
    size: str, gpus: int, rows_each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = REPOSITORY / "recipes" / f"{size}.toml"
    assert f"on {gpus} GPUs of 80 GB" in path.read_text()
    recipe = Recipe.load(path)
    config, train, optim = recipe.model_config(64_000), recipe.train, recipe.optim
    assert config == ModelConfig.named(size, embed_scale=size != "7b")
    assert train.steps * train.batch_tokens == pytest.approx(300e9, rel=1e-4)
    assert (train.seq_len, optim.lr, optim.weight_decay, optim.schedule) == (
        8_192,
        3e-4,
        0.1,
        "constant",
    )
    check_mesh(config, recipe.parallel, gpus, seq_len=train.seq_len, rows=recipe.rows)
    mesh = Mesh(torch.device("cuda"), **resolve(recipe.parallel, gpus).sizes)
    assert recipe.rows == rows_each * mesh.data_ranks
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30, 80 * 2**30))
    check_memory(recipe, config, mesh)


def test_a_vocabulary_too_small_for_the_data_is_refused(recipe_file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.vocab_size = 100, but the tokenizer of d has 300 words"
    ):
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


def test_a_stack_of_several_mixers_in_a_recipe(tmp_path) -> None:
    path = tmp_path / "mixed.toml"
    path.write_text(
        '[data]\npath = "somewhere"\n[model]\nsize = "10m"\nlayer_types = ['
        + ", ".join(['"linear_attention", "sliding_attention"'] * 3)
        + "]\nsoftmax = {window = 256, num_key_value_heads = 1}\n"
    )
    overrides = ["model.softmax.window=64", "model.softmax.decay=alibi", "model.softmax.gate=true"]
    recipe = Recipe.load(path, overrides)
    config = recipe.model_config(300)
    assert config.softmax == SoftmaxSettings(
        window=64, decay="alibi", gate=True, num_key_value_heads=1
    )
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    again = Recipe.load(tmp_path / "again.toml")
    assert again == recipe
    difference = Recipe.load(path, ["model.softmax.window=65", *overrides[1:]]).difference(recipe)
    assert difference == "model.softmax.window was 65 and is now 64"
    types = str(["linear_attention", "sliding_attention"] * 3)
    planned = model_overrides("10m", [f"model.layer_types={types}", *overrides])
    assert planned.layers[1].type == "sliding_attention"
    assert planned.layers[1].window == 64
    with pytest.raises(ValueError, match=r"'softmax.windows'; did you mean softmax.window\?"):
        Recipe.load(path, ["model.softmax.windows=64"]).model_config(300)
