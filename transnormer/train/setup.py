"""What is done before the first step: the run's folder is locked, its data are opened, and its
start is written down."""

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

from ..data.loader import Loader
from ..data.prepare import prepare
from ..data.shards import TokenData
from ..files import read_json, write_text
from ..formats.folders import find_model
from ..model.language_model import LanguageModel
from ..provenance import provenance
from ..run_folder import STARTS
from .mesh import Mesh
from .metrics import say
from .recipe import Recipe
from .validate import check_content


def open_data(recipe: Recipe) -> TokenData:
    """The training split, prepared first where data.text says from what."""
    wanted, path = recipe.data, Path(recipe.data.path)
    check_content(wanted)
    asked: dict[str, Any] = {
        "vocab_size": wanted.vocab_size or None,
        "tokenizer": wanted.tokenizer or None,
        "split": wanted.split,
        "seed": wanted.seed,
        "text_field": wanted.text_field,
        "format": wanted.format,
        "chat_template": wanted.chat_template or None,
    }
    if not path.exists():
        if not wanted.text:
            raise FileNotFoundError(
                f"data.path = {path}: no such folder; make it with `transnormer prepare`, or set "
                "data.text"
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
                    f"{path} was prepared {with_}, but the recipe {says}; choose another "
                    "data.path, or remove the "
                    f"folder to prepare it again"
                )
    return TokenData(path, "train")


def _same_files(some: list[str], others: list[str]) -> bool:
    """Whether two lists name the same files, relative to the working directory or from the root."""
    return [os.path.realpath(name) for name in some] == [os.path.realpath(name) for name in others]


def describe(
    recipe: Recipe, run: Path, model: LanguageModel, loader: Loader, mesh: Mesh, done: int
) -> None:
    """Say what is about to run, and add this start to run.json: command, versions, commit, device.
    The first process does it for all."""
    if not mesh.first:
        return
    epochs = recipe.train.steps * recipe.train.accumulate * recipe.rows / loader.count
    trained, all_of_them = (
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        model.parameter_count(),
    )
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
    # before the rate must fall
    whole = steps - int(optim.decay_share * steps) if optim.schedule == "wsd" else steps
    if optim.warmup_steps > whole:
        say(
            f"warning: optim.warmup_steps = {optim.warmup_steps:,} is longer than the {whole:,} "
            "steps that the run has "
            f"for it; the learning rate does not get beyond {whole / optim.warmup_steps:.0%} of "
            "optim.lr"
        )
    path = run / STARTS
    starts = _starts(path) if path.exists() and done else []
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    said = {"time": now, "after_step": done, "processes": mesh.world}
    starts.append(said | provenance(mesh.device, command=shlex.join(sys.argv)))
    write_text(
        path, json.dumps({"parameters": model.parameter_count(), "starts": starts}, indent=2) + "\n"
    )


def _starts(path: Path) -> list[Any]:
    """The starts that a run.json tells of. Raises ValueError where it is not one."""
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("starts"), list):
        raise ValueError(
            f"{path}: damaged, or not the record of a run's starts; remove it to begin a new one"
        )
    return list(record["starts"])


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Make the run's folder and hold its lock; the system lets go of it however the process ends.

    Raises ValueError where another process holds it, OSError naming the folder where nothing can be
    written there."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise OSError(
            f"{run}: nothing can be written there ({error.strerror}); train where you may write"
        ) from error
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
