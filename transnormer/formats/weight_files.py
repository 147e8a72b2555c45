"""The weight files of a model's folder, whole or in shards: safetensors, and pickles of which only
tensors are ever unpickled."""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..files import DTYPE_NAMES, parse_json, read_tensors


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """A published folder's weight files, each with the tensors that an index lists there; of one
    file alone, none.

    Raises OSError where there are no weights, ValueError where the index is damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files: dict[Path, set[str]] = {}
            try:
                for tensor, shard in parse_json(index.read_bytes())["weight_map"].items():
                    files.setdefault(folder / Path(shard).name, set()).add(tensor)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{index.name}: damaged, or not an index of shards ({error})"
                ) from error
            return dict(sorted(files.items()))
        if (folder / name).is_file():
            return {folder / name: set()}
    raise FileNotFoundError(
        f"{folder}: neither model.safetensors nor pytorch_model.bin is there, whole or in shards"
    )


def check_index(path: Path, found: Iterable[str], listed: set[str]) -> None:
    """Raise ValueError where a shard does not hold the tensors that its index lists there."""
    for name in sorted(listed ^ set(found)) if listed else ():
        raise ValueError(
            f"{path.name} {'lacks' if name in listed else 'holds'} {name}, which its index says "
            "otherwise"
        )


def read_file(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """The named tensors of a safetensors or pickle file, and nothing but tensors.

    mapped: as pages of the file, read when they are touched. (Pickles of torch before 1.6 always
    come into memory.) Raises OSError or ValueError: damaged, or with anything in it that is not a
    tensor of plain numbers."""
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)[0]
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    else:
        tensors = _unpickle(path, mapped and zipfile.is_zipfile(path))
    for name, tensor in tensors.items():
        if (
            tensor.dtype not in DTYPE_NAMES
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
        ):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path.name}: {name} is no plain tensor of floating-point numbers ({kind})"
            )
    return tensors


def _unpickle(path: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle's protocol
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file can raise anything in there
        if (name := _first_object(path)) is not None:
            raise ValueError(
                f"{path.name} holds more than tensors: {name}; nothing of it was run"
            ) from error
        raise ValueError(f"{path.name} is truncated, damaged or no file of tensors") from error
    if not isinstance(tensors, dict):
        raise ValueError(
            f"{path.name} holds something else than named tensors ({type(tensors).__name__})"
        )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path.name} holds something else than named tensors ({name!r}: "
                f"{type(tensor).__name__})"
            )
    return tensors


# What the pickle of a dict of tensors names: the dict, the functions that build tensors, storages
# and dtypes.
_OF_TENSORS = re.compile(
    r"(__builtin__|builtins)\.(set|dict|list)|collections\.OrderedDict|torch\._utils\._rebuild_\w+"
    r"|torch\.(storage\.|serialization\.)?\w*Storage|torch\.(b?float\d+|u?int\d+|bool|Size|device|Tensor)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
)


def _first_object(path: Path) -> str | None:
    """The first thing that a pickle names and that makes no tensor, as "module.name"; None where
    none is found.

    The pickle is only taken apart, not run: this is for a message about what torch has refused
    already."""
    with suppress(Exception), ExitStack() as stack:  # a damaged file can raise anything in there
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(file))
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            file = stack.enter_context(archive.open(member))
        texts: list[str] = []  # of which the last two name an object, in pickles since protocol 4
        memo: list[str] = []
        for _ in range(5):  # torch before 1.6 wrote five, one after another
            for operation, argument, _ in pickletools.genops(file):
                name = None
                if operation.name == "GLOBAL":
                    name = str(argument).replace(" ", ".")
                elif operation.name == "STACK_GLOBAL":
                    name = ".".join(texts[-2:])
                elif operation.name == "MEMOIZE":
                    memo.append(texts[-1] if texts else "")
                elif operation.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                    texts.append(memo[argument] if argument < len(memo) else "")
                elif isinstance(argument, str):
                    texts.append(argument)
                if name is not None and not _OF_TENSORS.fullmatch(name):
                    return name
    return None
