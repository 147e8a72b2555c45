"""Files that are there whole or not at all, and JSON and safetensors with errors that name the
file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
FINGERPRINT = "fingerprint.json"  # what a converted model must be; of no use to other weights
# which of several files holds each tensor, as transformers writes it
INDEX = "model.safetensors.index.json"
# of a model trained by many processes: what each of them held
PIECES = "weights-{:05d}-of-{:05d}.safetensors"
LARGEST_JSON_BYTES = 2**26


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> Any:
    """What a JSON file holds. OSError or ValueError names the file: missing, too large, or not
    `parse_json`'s."""
    path = Path(path)
    try:
        if (size := path.stat().st_size) > LARGEST_JSON_BYTES:
            raise ValueError(
                f"{path}: {size:,} bytes are too many; at most {LARGEST_JSON_BYTES:,} are read"
            )
        content = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. ValueError where it is not JSON, or an object has a key twice: one
    would be lost."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return values

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors and text metadata to a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata,
            )
        except SafetensorError as error:  # what a full disk becomes in there
            raise OSError(str(error).replace(str(temporary), str(path))) from error

    replace_file(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, on the CPU. ValueError where the file is damaged
    or another kind."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated, damaged or not a safetensors file ({error})"
        ) from error


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """A model's tensors from WEIGHTS; without it from the shards that INDEX names; without that
    from PIECES.

    ValueError or OSError names the file that is missing or damaged, or the tensor that is not where
    INDEX says, or that holds no floating-point numbers."""
    folder = Path(folder)
    files = weights_in(folder)
    if next(iter(files)).startswith("weights-"):
        return _assemble(folder, list(files))
    if missing := [
        file for file, listed in files.items() if listed and not (folder / file).is_file()
    ]:
        raise FileNotFoundError(f"{folder / missing[0]}: no such file, though {INDEX} names it")
    tensors: dict[str, Tensor] = {}
    for shard, wanted in files.items():
        found, _ = _read_floats(folder / shard)
        if wrong := sorted(wanted ^ found.keys()) if wanted else ():
            word = "lacks" if wrong[0] in wanted else "also holds"
            raise ValueError(
                f"{folder / shard} {word} {wrong[0]}: it and {INDEX} are not of one model"
            )
        tensors.update(found)
    return tensors


def weights_in(folder: Path) -> dict[str, set[str]]:
    """The files that `read_weights` reads, in order, each with the tensors that INDEX lists in it
    (of others, none)."""
    if not (folder / WEIGHTS).is_file() and (
        first := sorted(folder.glob("weights-*-of-*.safetensors"))[:1]
    ):
        count = int(first[0].stem.rpartition("-")[2])
        return {PIECES.format(number, count): set() for number in range(1, count + 1)}
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {WEIGHTS: set()}
    shards: dict[str, set[str]] = {}
    for name, shard in _index(folder / INDEX).items():
        shards.setdefault(shard, set()).add(name)
    return dict(sorted(shards.items()))


def _read_floats(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, of a file of weights. ValueError also names a tensor that holds no
    floating-point numbers."""
    tensors, metadata = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} holds {kind}; weights are floating-point numbers")
    return tensors, metadata


def _assemble(folder: Path, files: Sequence[str]) -> dict[str, Tensor]:
    """Whole tensors from the pieces in these files, which must fill them and not overlap."""
    whole: dict[str, Tensor] = {}
    boxes: dict[str, list[tuple[slice, ...]]] = {}
    for path in [folder / file for file in files]:
        pieces, metadata = _read_floats(path)
        try:
            layout = parse_json(metadata[OFFSETS])
            for name, piece in pieces.items():
                begin, shape = layout[name]["saved_offsets"], layout[name]["shape"]
                box = tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))
                if not all(
                    side.start >= 0 and side.stop <= n for side, n in zip(box, shape, strict=True)
                ):
                    raise ValueError(f"a piece of {name} lies outside of it")
                if any(_overlap(box, other) for other in boxes.setdefault(name, [])):
                    raise ValueError(f"a piece of {name} lies over another")
                if name not in whole:
                    whole[name] = torch.empty(shape, dtype=piece.dtype)
                whole[name][box] = piece
                boxes[name].append(box)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: damaged, or not a piece of a checkpoint ({error})"
            ) from error
    for name, tensor in whole.items():
        filled = sum(math.prod(side.stop - side.start for side in box) for box in boxes[name])
        if filled != tensor.numel():
            raise ValueError(
                f"{folder}: {filled:,} of {tensor.numel():,} numbers of {name} are there"
            )
    return whole


def _overlap(one: Sequence[slice], other: Sequence[slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file of the same folder."""
    index = read_json(path)
    try:
        index = index["weight_map"]
        if not index:
            raise ValueError("it names no tensor")
        if not all(
            name == Path(name).name and name.endswith(".safetensors") for name in index.values()
        ):
            raise ValueError("a shard must be a .safetensors file of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not an index of shards ({error})") from error
    return dict(index)


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour, flush it to the disk and rename it to `path`. OSError
    names the path."""
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


def check_can_write(path: str | Path) -> None:
    """Try, before long work, what `replace_file` does after it. Raises OSError naming the path
    where it would fail."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: cannot be written: it is a folder; name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Weights too large to hold: written piece by piece, in as many files as wanted, with the hash of
# each file.

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
WHOLE_NAMES = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# the entry of a file's metadata in which torch.distributed.checkpoint looks for them
OFFSETS = "DCP_SHARDING_INFO"


def write_pieces(
    path: Path,
    pieces: Mapping[str, Tensor],
    layout: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> dict[str, object]:
    """Write tensors on the CPU to a safetensors file, hashed on the way; returns {"bytes": size,
    "sha256": hash}.

    layout: where they are pieces of larger tensors, each one's "saved_offsets" in it, and its whole
    "shape". Lets other threads run meanwhile. Raises OSError naming the file."""
    kinds = {name: (piece.dtype, piece.shape) for name, piece in pieces.items()}
    sizes = {name: piece.nbytes for name, piece in pieces.items()}
    metadata = {"format": "pt"} | ({} if layout is None else {OFFSETS: json.dumps(layout)})
    digest = _write_shard(path, kinds, sizes, lambda name: [pieces[name]], metadata)
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_shards(
    folder: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    read: Callable[[str], Iterable[Tensor]],
    shard_bytes: int,
) -> dict[str, dict[str, object]]:
    """Write tensors as WEIGHTS, or where that would pass `shard_bytes`, as shards with their INDEX.

    layout: name -> (dtype, shape); dtype is one of DTYPE_NAMES. read(name) gives the tensor in
    pieces that follow one another in memory order; one piece is held at a time. A tensor is never
    split over two shards. Returns file name -> {"bytes": size, "sha256": hash}. Raises OSError
    naming the file, and what `read` raises."""
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items()}
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
    record: dict[str, dict[str, object]] = {}
    for file, names in zip(files, shards, strict=True):
        digest = _write_shard(folder / file, {name: layout[name] for name in names}, sizes, read)
        record[file] = {"bytes": (folder / file).stat().st_size, "sha256": digest}
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return record


def _write_shard(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    sizes: Mapping[str, int],
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """One safetensors file: the header's length, the header (JSON padded to 8 bytes), the tensors.
    Returns its hash."""
    names_of = DTYPE_NAMES | WHOLE_NAMES
    # wide numbers first: all are then aligned
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = layout[name]
        spread = [offset, offset + sizes[name]]
        header[name] = {"dtype": names_of[dtype], "shape": list(shape), "data_offsets": spread}
        offset = spread[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:

            def put(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            put(len(text).to_bytes(8, "little") + text)
            for name in names:
                start = file.tell()
                for piece in read(name):
                    put(piece.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
                if file.tell() - start != sizes[name]:
                    raise ValueError(
                        f"{name} has {file.tell() - start:,} bytes, not {sizes[name]:,}"
                    )

    replace_file(path, write)
    return digest.hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, emptied of what a killed run left, that becomes `out` at the
    end or goes away.

    Parents that are missing are made, and go away with it. Raises ValueError where `out` exists and
    is not empty, or another process is writing it; OSError naming `out` where it cannot be made or
    written."""
    import fcntl  # not on Windows, where the rest of this module works

    out = out.resolve()
    folder = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{out} exists; remove it or choose another folder")
        made = [parent for parent in out.parents if not parent.exists()]  # innermost first
        if file := next(
            (parent for parent in out.parents if parent.exists() and not parent.is_dir()), None
        ):
            raise NotADirectoryError(f"{out}: cannot be made: {file} is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise (
            error if not error.errno else OSError(f"{out}: cannot be made: {error.strerror}")
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise ValueError(f"{out} is being written by another process")
        for entry in folder.iterdir():
            entry.unlink()
        try:
            yield folder
            flush(folder)
            os.replace(folder, out)
            flush(out.parent)
        except BaseException as error:
            shutil.rmtree(folder)
            with suppress(OSError):  # another process may use them by now
                for parent in made:
                    parent.rmdir()
            if isinstance(error, OSError) and (text := _names(error, folder, out)):
                raise OSError(text) from error
            raise
    finally:
        os.close(lock)


def _names(error: OSError, folder: Path, out: Path) -> str | None:
    """What an error of writing into `folder` says with `out` in its place; None for an error about
    another file."""
    if error.errno and not error.filename:  # a failed write does not say where
        return f"{out}: cannot be written: {error.strerror}"
    if str(folder) not in str(error):
        return None
    text = f"{error.filename}: cannot be written: {error.strerror}" if error.errno else str(error)
    return text.replace(str(folder), str(out))
