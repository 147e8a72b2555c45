"""Files that are there whole or not at all, and safetensors with errors that name the file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata to a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # what a full disk becomes in there
            raise OSError(str(error).replace(str(temporary), str(path))) from error

    replace_file(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU. ValueError where the file is damaged or another kind."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, damaged or not a safetensors file ({error})") from error


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, flush it to the disk and rename it to `path`. OSError names the path."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# A sealed folder is one that was completely written: its last file, SEAL, holds the size and hash of all others.

SEAL = "complete.json"


def seal(folder: Path) -> None:
    """Flush every file of the folder to the disk, then write SEAL."""
    record = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        record[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    flush(folder)
    write_text(folder / SEAL, json.dumps(record, indent=2) + "\n")


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a sealed folder, or with the named files of it; None where all is as it was written."""
    try:
        record = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name in names or record:
            path, wanted = folder / name, record[name]
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} is truncated ({path.stat().st_size:,} of {wanted['bytes']:,} bytes)"
            if sha256(path) != wanted["sha256"]:
                return f"{name} is damaged (its hash differs)"
    except FileNotFoundError:
        return f"{SEAL} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{SEAL} is damaged"
    return None


def step_folders(parent: Path) -> list[Path]:
    """The folders step-N under `parent`, newest first. They got their names sealed; `damage` says what became of them."""
    found = [path for path in parent.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
