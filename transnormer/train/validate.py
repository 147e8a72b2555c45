"""Refusals of settings that do not fit the data, the model, the mesh, the machine or each other,
before a run allocates.

`recipe.py` says what a single value may be. What only a library can tell is refused where the
library is called: `float8.py`, `lora.py`, 8-bit optimizers in `optim.py`. Each refusal is a
ValueError of one line that says what would fit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ..config import ModelConfig
from ..data.shards import TokenData
from ..data.tokenizer import SMALLEST, load_tokenizer
from ..model.language_model import LanguageModel
from ..planning.memory import Layout, least_memory
from ..planning.mesh_sizes import check_mesh, decays_by_token
from ..run_folder import RECIPE
from . import lora
from .mesh import Mesh
from .metrics import say
from .recipe import Data, Recipe


def check_settings(recipe: Recipe, config: ModelConfig, data: TokenData, mesh: Mesh) -> None:
    """Refuse settings that do not fit the model, the data, the mesh or each other."""
    settings, length, resets = recipe.train, recipe.train.seq_len, resets_state(recipe, data)
    check_mesh(config, recipe.parallel, mesh.world, seq_len=length, rows=recipe.rows)
    if config.position == "ape" and config.max_position_embeddings < length:
        raise ValueError(
            f"model.max_position_embeddings = {config.max_position_embeddings} is below "
            f"train.seq_len = {length}"
        )
    if recipe.lora is not None and mesh.tensor > 1:
        raise ValueError(
            f"parallel.tensor = {mesh.tensor} cannot cut adapted maps; with lora it must be 1"
        )
    if settings.segment and (not config.bounded or mesh.context > 1 or resets):
        raise ValueError(
            f"train.segment = {settings.segment} needs linear attention (model.mixer = gla), "
            "or a window, in every layer, whole rows (parallel.context = 1) and "
            "train.reset_state = false"
        )
    if settings.segment % mesh.tensor:
        raise ValueError(
            f"parallel.tensor = {mesh.tensor} does not divide train.segment = {settings.segment}"
        )
    if settings.compile and resets and decays_by_token(config):
        raise ValueError(
            "train.compile = true cannot take rows of several texts where model.decay = "
            f"{config.decay}; write false"
        )
    if settings.graph and resets:
        raise ValueError(
            "train.graph = true needs microbatches of one shape; conversations and "
            "train.reset_state = true give several"
        )
    if settings.graph and mesh.device.type != "cuda":
        raise ValueError(
            f"train.graph = true needs a GPU, and the device is {mesh.device.type}; write false"
        )


def resets_state(recipe: Recipe, data: TokenData) -> bool:
    """Whether the state begins anew where a document begins: as the recipe says, otherwise for
    conversations alone."""
    return bool(data.flags) if recipe.train.reset_state is None else recipe.train.reset_state


def check_same(run: Path, recipe: Recipe, begun: bool) -> None:
    """Refuse to go on with other settings. A start that saved nothing binds nobody."""
    path = run / RECIPE
    if run.exists() and not run.is_dir():
        raise ValueError(
            f"{run} is a file, where the run's folder should be; give another run=NAME or remove it"
        )
    if path.exists():
        before = Recipe.load(path)
        if begun and (difference := before.difference(recipe)):
            raise ValueError(
                f"{run} was started with other settings: {difference}; give another run=NAME or "
                f"remove {run}"
            )
        if begun and before.train.steps != recipe.train.steps:
            say(
                f"train.steps was {before.train.steps} and is now {recipe.train.steps}; so is the "
                "schedule's length"
            )
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ValueError(
            f"{run} exists and is not a run of ours; give another run=NAME or remove it"
        )


def check_vocabulary(recipe: Recipe) -> None:
    """Refuse an impossible config, and a vocabulary smaller than any tokenizer's, before text is
    prepared."""
    size = recipe.model.get("vocab_size", SMALLEST)
    if type(size) is int and 0 < size < SMALLEST and not Path(recipe.data.path).exists():
        raise ValueError(
            f"model.vocab_size = {size}, but a tokenizer has at least {SMALLEST} words: every "
            "byte and the end of text"
        )
    recipe.model_config(1)


def check_content(wanted: Data) -> None:
    """Refuse a data.format or data.chat_template that is not that of a folder which `prepare` made
    earlier.

    Defaults are not compared.
    """
    path = Path(wanted.path)
    if wanted.text or not path.exists():  # then the folder is made, or compared, as a whole
        return
    source = {"format": "text"} | TokenData(path, "train").source
    for key, value, nothing in (
        ("format", wanted.format, "text"),
        ("chat_template", wanted.chat_template, ""),
    ):
        if value != nothing and value != (made := source.get(key)):
            with_ = f"without data.{key}" if made is None else f"with data.{key} = {made!r}"
            raise ValueError(
                f"{path} was prepared {with_}, but the recipe says {value!r}; choose another "
                "data.path, or remove the setting"
            )


def check_tokenizer(recipe: Recipe, base: LanguageModel, data: TokenData) -> None:
    """Refuse data that were encoded otherwise than the model's were."""
    path, folder = recipe.data.path, recipe.base
    if data.vocab_size > base.config.vocab_size:
        sizes = f"{path} has {data.vocab_size:,} words, {folder} {base.config.vocab_size:,}"
        if base.tokenizer is None:
            raise ValueError(
                f"{sizes}; prepare its text again with a smaller --vocab-size and another --out"
            )
        raise ValueError(
            f"{sizes}; prepare its text again with --tokenizer {folder} and another --out"
        )
    if base.tokenizer is not None and base.tokenizer.to_str() != load_tokenizer(path).to_str():
        raise ValueError(
            f"{path} was not encoded with the tokenizer of {folder}; prepare its text again with "
            f"--tokenizer {folder} "
            f"and another --out"
        )


def check_memory(recipe: Recipe, config: ModelConfig, mesh: Mesh) -> None:
    """Refuse, before allocating, what cannot fit this process (`planning.memory.least_memory`)."""
    trained, device = config.parameter_count(), mesh.device
    if recipe.lora is not None:
        with torch.device("meta"):
            maps = lora.targets(LanguageModel(config), recipe.lora).values()
        trained = sum(recipe.lora.rank * (each.in_features + each.out_features) for each in maps)
    layout = Layout(**mesh.sizes, recompute=recipe.train.recompute)
    tokens = recipe.rows * (recipe.train.segment or recipe.train.seq_len) // mesh.data_ranks
    least = least_memory(
        config,
        layout,
        tokens,
        trained=trained,
        itemsize=2 if recipe.train.dtype == "bfloat16" else 4,
        copied=device.type == "cpu",
        loaded=recipe.base is not None and device.type == "cpu" and mesh.world == 1,
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if least.total > free:
        raise ValueError(
            f"training {trained:,} parameters with {tokens:,} tokens at a time needs more than "
            f"{least.total / 2**30:,.1f} GiB, {least.activations / 2**30:,.1f} of them for "
            f"activations; {free / 2**30:,.1f} GiB of {device.type} memory are free. "
            "Choose a smaller model or batch, a larger train.accumulate, or train.recompute = true"
        )


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a container (cgroup v2)
    allows less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
