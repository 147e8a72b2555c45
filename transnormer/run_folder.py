"""What a run folder holds, and how its checkpoints are found and known to be whole.

A folder is sealed when it was written completely: the file SEAL is written last and lists the size
and hash of every other file. A checkpoint gets its name step-N only after it was sealed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .files import flush, read_json, sha256, write_text

RECIPE = "recipe.toml"  # every setting of the run
STARTS = "run.json"  # each start: time, command, versions, commit, device
METRICS = "metrics.jsonl"  # a line for each step
CURVE = "loss.png"  # the losses as a picture
CHECKPOINTS = "checkpoints"  # the folder of the folders step-N
SEAL = "complete.json"


def seal(folder: Path, known: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """Flush every file of the folder to the disk, then write SEAL. known: what `write_pieces`
    returned of some."""
    record = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            record[name] = (known or {}).get(name) or {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
    flush(folder)
    write_text(folder / SEAL, json.dumps(record, indent=2) + "\n")


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a sealed folder, or with the named files of it; None where all is as it
    was written.

    Weights that SEAL does not list are wrong too, because nobody could say whether they are the
    right ones."""
    try:
        record = read_seal(folder)
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except ValueError:
        return f"{SEAL} is damaged"
    for name in record if names is None else names:
        if name not in record:
            return f"{name} is not listed in {SEAL}"
        path, wanted = folder / name, record[name]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} is truncated ({path.stat().st_size:,} of {wanted['bytes']:,} bytes)"
        if sha256(path) != wanted["sha256"]:
            return f"{name} is damaged (its hash differs)"
    weights = (
        path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.safetensors"))
    )
    unlisted = next((name for name in weights if name not in record), None)
    return None if unlisted is None else f"{unlisted} is not listed in {SEAL}"


def read_seal(folder: Path) -> dict[str, dict[str, Any]]:
    """File -> {"bytes": size, "sha256": hash} as SEAL lists them, at least one. OSError or
    ValueError names SEAL."""
    record = read_json(folder / SEAL)
    whole = isinstance(record, dict) and bool(record)
    for name, entry in record.items() if whole else ():
        whole &= not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        whole &= (
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
        )
    if not whole:
        raise ValueError(
            f"{folder / SEAL}: damaged, or not a list of files with their sizes and hashes"
        )
    return dict(record)


def step_folders(parent: Path) -> list[Path]:
    """The folders step-N under `parent`, newest first. They got their names sealed; `damage` says
    what became of them."""
    found = [path for path in parent.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
