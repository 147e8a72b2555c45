"""What is looked at before the first step: the run's folder, its data, whether all fits; and what is written of a start."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from ..config import ModelConfig
from ..data.loader import Loader
from ..data.prepare import prepare
from ..data.shards import TokenData
from ..data.tokenizer import SMALLEST, load_tokenizer
from ..files import read_json, write_text
from ..formats.folders import find_model
from ..model.language_model import LanguageModel
from ..provenance import provenance
from ..run_folder import RECIPE, STARTS
from . import lora
from .metrics import say
from .parallel import Mesh
from .recipe import Data, Recipe


def check_content(wanted: Data) -> None:
    """Refuse settings that say of a folder prepared elsewhere what it does not hold; defaults say nothing."""
    path = Path(wanted.path)
    if wanted.text or not path.exists():  # then the folder is made, or compared, as a whole
        return
    source = {"format": "text"} | TokenData(path, "train").source
    for key, value, nothing in (("format", wanted.format, "text"), ("chat_template", wanted.chat_template, "")):
        if value != nothing and value != (made := source.get(key)):
            with_ = f"without data.{key}" if made is None else f"with data.{key} = {made!r}"
            raise ValueError(
                f"{path} was prepared {with_}, but the recipe says {value!r}; choose another data.path, or remove the setting"
            )


def open_data(recipe: Recipe) -> TokenData:
    """The training split, prepared first where data.text says from what."""
    wanted, path = recipe.data, Path(recipe.data.path)
    check_content(wanted)
    asked: dict[str, Any] = {
        "vocab_size": wanted.vocab_size or None, "tokenizer": wanted.tokenizer or None, "split": wanted.split,
        "seed": wanted.seed, "text_field": wanted.text_field, "format": wanted.format,
        "chat_template": wanted.chat_template or None,
    }  # fmt: skip
    if not path.exists():
        if not wanted.text:
            raise FileNotFoundError(
                f"data.path = {path}: no such folder; make it with `transnormer prepare`, or set data.text"
            )
        if recipe.base is not None and not wanted.tokenizer:
            asked["tokenizer"] = find_model(recipe.base)
        say(f"preparing {path} from {', '.join(wanted.text)}")
        prepare(wanted.text, path, **asked)
    elif wanted.text:
        # what folders of text do not say; the tokenizer of model.from is looked at, not its name
        source = {"format": "text", "chat_template": None} | TokenData(path, "train").source
        for key, value in (asked | {"text": list(wanted.text)}).items():
            made = source["inputs" if key == "text" else key]
            taken = key == "tokenizer" and recipe.base is not None and value is None
            if not taken and made != value and not (key == "text" and _same_files(made, value)):
                with_ = f"without data.{key}" if made is None else f"with data.{key} = {made!r}"
                says = "does not set it" if value is None else f"says {value!r}"
                raise ValueError(
                    f"{path} was prepared {with_}, but the recipe {says}; choose another data.path, or remove the "
                    f"folder to prepare it again"
                )
    return TokenData(path, "train")


def _same_files(some: list[str], others: list[str]) -> bool:
    """Whether two lists name the same files, relative to the working directory or from the root."""
    return [os.path.realpath(name) for name in some] == [os.path.realpath(name) for name in others]


def check_vocabulary(recipe: Recipe) -> None:
    """Refuse a model that cannot be, or has too few words for any tokenizer, before text is prepared for it."""
    words = recipe.model.get("vocab_size", SMALLEST)
    if type(words) is int and 0 < words < SMALLEST and not Path(recipe.data.path).exists():
        raise ValueError(
            f"model.vocab_size = {words}, but a tokenizer has at least {SMALLEST} words: every byte and the end of text"
        )
    recipe.model_config(1)


def check_tokenizer(recipe: Recipe, base: LanguageModel, data: TokenData) -> None:
    """Refuse data that were encoded otherwise than the model's were."""
    path, folder = recipe.data.path, recipe.base
    if data.vocab_size > base.config.vocab_size:
        sizes = f"{path} has {data.vocab_size:,} words, {folder} {base.config.vocab_size:,}"
        if base.tokenizer is None:
            raise ValueError(f"{sizes}; prepare its text again with a smaller --vocab-size and another --out")
        raise ValueError(f"{sizes}; prepare its text again with --tokenizer {folder} and another --out")
    if base.tokenizer is not None and base.tokenizer.to_str() != load_tokenizer(path).to_str():
        raise ValueError(
            f"{path} was not encoded with the tokenizer of {folder}; prepare its text again with --tokenizer {folder} "
            f"and another --out"
        )


def check_same(run: Path, recipe: Recipe, begun: bool) -> None:
    """Refuse to go on with other settings. A start that saved nothing binds nobody."""
    path = run / RECIPE
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file, where the run's folder should be; give another run=NAME or remove it")
    if path.exists():
        before = Recipe.load(path)
        if begun and (difference := before.difference(recipe)):
            raise ValueError(
                f"{run} was started with other settings: {difference}; give another run=NAME or remove {run}"
            )
        if begun and before.train.steps != recipe.train.steps:
            say(f"train.steps was {before.train.steps} and is now {recipe.train.steps}; so is the schedule's length")
    elif run.exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ValueError(f"{run} exists and is not a run of ours; give another run=NAME or remove it")


def check_memory(recipe: Recipe, config: ModelConfig, mesh: Mesh) -> None:
    """Refuse, before allocating, what cannot fit this process.

    Counted are weights, of those that are trained gradients and AdamW's two moments, all float32 (on a CPU again what a
    checkpoint copies of them), and of the activations only those that no implementation can do without: what the
    projections read and wrote.
    """
    trained = weights = config.parameter_count()
    if recipe.lora is not None:
        with torch.device("meta"):
            maps = lora.targets(LanguageModel(config), recipe.lora).values()
        trained = sum(recipe.lora.rank * (each.in_features + each.out_features) for each in maps)
    kept = 1 if recipe.train.recompute else config.num_hidden_layers
    floats = kept * (4 * config.inner_size + 2 * config.intermediate_size + 2 * config.hidden_size)
    tokens = recipe.rows * (recipe.train.segment or recipe.train.seq_len) // mesh.data_ranks
    activations = tokens * floats * (2 if recipe.train.dtype == "bfloat16" else 4) // (mesh.context * mesh.tensor)
    device, share = mesh.device, mesh.world // mesh.replicate
    there = recipe.base is not None and device.type == "cpu" and mesh.world == 1  # the weights are, then
    copied = 4 * weights + 8 * trained if device.type == "cpu" else 0
    needed = ((0 if there else 4 * weights) + 12 * trained + copied) // share + activations
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    if needed > free:
        raise ValueError(
            f"training {trained:,} parameters with {tokens:,} tokens at a time needs more than "
            f"{needed / 2**30:,.1f} GiB, {activations / 2**30:,.1f} of them for activations; {free / 2**30:,.1f} GiB of "
            f"{device.type} memory are free. Choose a smaller model or batch, train.accumulate or train.recompute"
        )


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or less where a container (cgroup v2) allows less."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def describe(recipe: Recipe, run: Path, model: LanguageModel, loader: Loader, mesh: Mesh, done: int) -> None:
    """Say what is about to run, and add this start to run.json: command, versions, commit, device."""
    epochs = recipe.train.steps * recipe.train.accumulate * recipe.rows / loader.count
    trained, all_of_them = sum(p.numel() for p in model.parameters() if p.requires_grad), model.parameter_count()
    count = f"{all_of_them:,}" if trained == all_of_them else f"{trained:,} of {all_of_them:,}"
    where = f"on {mesh.device}" if mesh.world == 1 else f"on {mesh.world} processes"
    say(
        f"run {recipe.run}: {count} parameters {where}, {loader.data.tokens:,} training tokens "
        + (f"({loader.data.learned:,} of them to learn) " if loader.data.flags else "")
        + f"read {epochs:.2g} times"
        + (f"; going on after step {done} of {recipe.train.steps}" if done else "")
    )
    if (cut := loader.cut_warning()) is not None:
        say(f"warning: {loader.data.name}: {cut}")
    optim, steps = recipe.optim, recipe.train.steps
    whole = steps - int(optim.decay_share * steps) if optim.schedule == "wsd" else steps  # before the rate must fall
    if optim.warmup_steps > whole:
        say(
            f"warning: optim.warmup_steps = {optim.warmup_steps:,} is longer than the {whole:,} steps that the run has "
            f"for it; the learning rate does not get beyond {whole / optim.warmup_steps:.0%} of optim.lr"
        )
    device, path = mesh.device, run / STARTS
    starts = _starts(path) if path.exists() and done else []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    said = {"time": now, "after_step": done, "processes": mesh.world}
    starts.append(said | provenance(device.type, command=shlex.join(sys.argv)))
    write_text(path, json.dumps({"parameters": model.parameter_count(), "starts": starts}, indent=2) + "\n")


def _starts(path: Path) -> list[Any]:
    """The starts that a run.json tells of. Raises ValueError where it is not one."""
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("starts"), list):
        raise ValueError(f"{path}: damaged, or not the record of a run's starts; remove it to begin a new one")
    return list(record["starts"])


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Make the run's folder and hold its lock; the system lets go of it however the process ends.

    Raises ValueError where another process holds it, OSError naming the folder where nothing can be written there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise OSError(f"{run}: nothing can be written there ({error.strerror}); train where you may write") from error
    with file:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run} is being trained by another process") from None
        yield
