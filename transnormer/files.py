"""Files that are there whole or not at all, and safetensors with errors that name the file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

WEIGHTS = "model.safetensors"
FINGERPRINT = "fingerprint.json"  # what a converted model must be; of no use to other weights
INDEX = "model.safetensors.index.json"  # which of several files holds each tensor, as transformers writes it
PIECES = "weights-{:05d}-of-{:05d}.safetensors"  # of a model trained by many processes: what each of them held
LARGEST_INDEX_BYTES = 2**26


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


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """A model's tensors from WEIGHTS; without it from the shards that INDEX names; without that from PIECES.

    ValueError or OSError names the file that is missing or damaged, or the tensor that is not where INDEX says.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file() and (first := sorted(folder.glob("weights-*-of-*.safetensors"))[:1]):
        return _assemble(folder, count=int(first[0].stem.rpartition("-")[2]))
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return read_tensors(folder / WEIGHTS)[0]
    shards: dict[str, set[str]] = {}
    for name, shard in _index(folder / INDEX).items():
        shards.setdefault(shard, set()).add(name)
    if missing := [shard for shard in sorted(shards) if not (folder / shard).is_file()]:
        raise FileNotFoundError(f"{folder / missing[0]}: no such file, though {INDEX} names it")
    tensors: dict[str, Tensor] = {}
    for shard, wanted in sorted(shards.items()):
        found, _ = read_tensors(folder / shard)
        if wrong := sorted(wanted ^ found.keys()):
            word = "lacks" if wrong[0] in wanted else "also holds"
            raise ValueError(f"{folder / shard} {word} {wrong[0]}: it and {INDEX} are not of one model")
        tensors.update(found)
    return tensors


def _assemble(folder: Path, count: int) -> dict[str, Tensor]:
    """Whole tensors from PIECES, of which there must be `count` files."""
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for number in range(1, count + 1):
        path = folder / PIECES.format(number, count)
        pieces, metadata = read_tensors(path)
        try:
            layout = json.loads(metadata[OFFSETS])
            for name, piece in pieces.items():
                begin, shape = layout[name]["saved_offsets"], layout[name]["shape"]
                if name not in whole:
                    whole[name] = torch.empty(shape, dtype=piece.dtype)
                whole[name][tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))] = piece
                filled[name] = filled.get(name, 0) + piece.numel()
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged, or not a piece of a checkpoint ({error})") from error
    for name, tensor in whole.items():
        if filled[name] != tensor.numel():
            raise ValueError(f"{folder}: {filled[name]:,} of {tensor.numel():,} numbers of {name} are there")
    return whole


def _index(path: Path) -> dict[str, str]:
    """Tensor -> file of the same folder."""
    if path.stat().st_size > LARGEST_INDEX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are too many for an index of shards")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(name == Path(name).name and name.endswith(".safetensors") for name in index.values()):
            raise ValueError("a shard must be a .safetensors file of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not an index of shards ({error})") from error
    return dict(index)


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


def seal(folder: Path, known: Mapping[str, Mapping[str, object]] | None = None) -> None:
    """Flush every file of the folder to the disk, then write SEAL. known: what `write_pieces` returned of some of them."""
    record = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            record[name] = (known or {}).get(name) or {"bytes": path.stat().st_size, "sha256": sha256(path)}
    flush(folder)
    write_text(folder / SEAL, json.dumps(record, indent=2) + "\n")


def damage(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """What is wrong with a sealed folder, or with the named files of it; None where all is as it was written."""
    try:
        record = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        for name in record if names is None else names:
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


# Weights too large to hold: written piece by piece, in as many files as wanted, with the hash of each file.

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WHOLE_NAMES = {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
OFFSETS = "DCP_SHARDING_INFO"  # the entry of a file's metadata in which torch.distributed.checkpoint looks for them


def write_pieces(
    path: Path, pieces: Mapping[str, Tensor], layout: Mapping[str, Mapping[str, Sequence[int]]] | None = None
) -> dict[str, object]:
    """Write tensors on the CPU to a safetensors file, hashed on the way; returns {"bytes": size, "sha256": hash}.

    layout: where they are pieces of larger tensors, each one's "saved_offsets" in it, and its whole "shape".
    Lets other threads run meanwhile. Raises OSError naming the file.
    """
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

    layout: name -> (dtype, shape); dtype is one of DTYPE_NAMES. read(name) gives the tensor in pieces that follow
    one another in memory order; one piece is held at a time. A tensor is never split over two shards.
    Returns file name -> {"bytes": size, "sha256": hash}. Raises OSError naming the file, and what `read` raises.
    """
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
        files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    record: dict[str, dict[str, object]] = {}
    for file, names in zip(files, shards, strict=True):
        digest = _write_shard(folder / file, {name: layout[name] for name in names}, sizes, read)
        record[file] = {"bytes": (folder / file).stat().st_size, "sha256": digest}
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
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
    """One safetensors file: the header's length, the header (JSON padded to 8 bytes), the tensors. Returns its hash."""
    names_of = DTYPE_NAMES | WHOLE_NAMES
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)  # wide numbers first: all are then aligned
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
                    raise ValueError(f"{name} has {file.tell() - start:,} bytes, not {sizes[name]:,}")

    replace_file(path, write)
    return digest.hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, emptied of what a killed run left, that becomes `out` at the end or goes away.

    Parents that are missing are made, and go away with it. Raises ValueError where `out` exists and is not empty, or
    another process is writing it.
    """
    import fcntl  # not on Windows, where the rest of this module works

    out = out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists; remove it or choose another folder")
    folder = out.with_name(f".{out.name}.partial")
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
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
            if isinstance(error, OSError) and error.errno and not error.filename:  # a failed write does not say where
                error.filename = str(out)
            elif isinstance(error, OSError) and str(folder) in str(error):
                raise OSError(str(error).replace(str(folder), str(out))) from error
            raise
    finally:
        os.close(lock)
