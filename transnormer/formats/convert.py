"""Published checkpoints into our format, and models out of it: a folder is written whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..data import chat
from ..files import new_folder, write_shards, write_text
from ..model.card import write_card
from .fingerprint import Fingerprint, last_logits, published_logits
from .folders import find_model, load
from .published import (
    HEAD_DIFFERS,
    check_shapes,
    config_from_published,
    is_published,
    own_name,
    own_rows,
    published_config,
    published_name,
    published_shapes,
    published_tensors,
    read_config,
)
from .tokenizers import read_tokenizer
from .weight_files import check_index, read_file, weight_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 2**20  # of a tensor, held at a time
WINDOW_BYTES = 2**23  # of a file, mapped and touched at a time
TOUCH_BYTES = 2**21  # that the system may map for a single byte
FORMATS = ("transnormer", "published")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass(frozen=True)
class Written:
    """What was written. files: the weights' names; dtypes: bytes of each; tokenizer: what it was
    read from."""

    folder: Path
    config: ModelConfig
    files: list[str]
    dtypes: dict[str, int]
    tokenizer: str | None
    fingerprint: bool


def convert(
    source: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> Written:
    """Write the model of a published folder in our format, every number and dtype as it was.

    Memory: a few pieces of PIECE_BYTES, whatever the model's size; for pickles of torch before 1.6,
    one shard.
    tokenizer: read the folder's (`tokenizers.read_tokenizer`), where it has one; False leaves it
    out. Raises ValueError or OSError naming the key, tensor or file that is wrong; `out` is then
    not there."""
    source, out = Path(source), Path(out)
    with new_folder(out) as folder, _one_thread():
        values = read_config(source)
        if not is_published(values):
            raise ValueError(
                f"{source}: not a published TransNormerLLM (config.json has no decoder_embed_dim)"
            )
        try:
            config = config_from_published(values)
            checkpoint = PublishedReader(source, config, progress)
            words, kind = read_tokenizer(source, config) if tokenizer else (None, None)
            layout = checkpoint.own_layout()
            files = write_shards(folder, layout, checkpoint.own_pieces, shard_bytes)
            checkpoint.check_head()
            Fingerprint.take(
                files,
                config.vocab_size,
                lambda *asked: published_logits(checkpoint.pieces, config, *asked),
            ).write(folder)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        _finish(folder, config, config.to_dict(), words, source)
    return Written(out, config, list(files), _bytes_by_dtype(layout), kind, True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces are so small that threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "transnormer",
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write the model of any folder that `transnormer.load` reads, with its tokenizer, in our or
    the published format.

    dtype: of the weights; None keeps the stored one. Memory: the model, for our format once more in
    float32. Raises ValueError or OSError, for "published" also where that format has no word for
    the model; `out` is then not there."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; there are {', '.join(FORMATS)}")
    with new_folder(Path(out)) as folder:
        loaded = load(model, dtype=dtype)
        config, tensors, values = loaded.config, loaded.state_dict(), loaded.config.to_dict()
        if format == "published":
            stored = str(loaded.head_weight.dtype).removeprefix("torch.")
            values = {**published_config(config), "torch_dtype": stored}

        def turned(named: dict[str, Tensor]) -> dict[str, Tensor]:
            return published_tensors(named, config) if format == "published" else named

        shapes = turned({name: tensor.to("meta") for name, tensor in tensors.items()})
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shapes.items()}
        ours = dict(zip(layout, tensors, strict=True))  # by the name that is written

        def read(name: str) -> Iterator[Tensor]:
            tensor = tensors[ours[name]]
            if not tensor.isfinite().all():
                raise ValueError(f"{model}: {ours[name]} holds a number that is not finite")
            yield turned({ours[name]: tensor})[name]

        files = write_shards(folder, layout, read, shard_bytes)
        if format == "transnormer":
            with torch.no_grad():
                Fingerprint.take(
                    files,
                    config.vocab_size,
                    lambda ids, words, kind: last_logits(loaded.to(kind), ids, words),
                ).write(folder)
        _finish(folder, config, values, loaded.tokenizer, find_model(Path(model)))
    kind = None if loaded.tokenizer is None else "tokenizer.json"
    return Written(
        Path(out), config, list(files), _bytes_by_dtype(layout), kind, format == "transnormer"
    )


def _finish(
    folder: Path,
    config: ModelConfig,
    values: dict[str, Any],
    tokenizer: Tokenizer | None,
    source: Path,
) -> None:
    """What stands beside the weights; config.json is last, because a folder without it is not a
    model."""
    if tokenizer is not None:
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
        if (template := chat.find_template(source, tokenizer)) is not None:
            write_text(folder / chat.FILE, template)
    write_card(folder, config, config.parameter_count())
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")


def _bytes_by_dtype(layout: Layout) -> dict[str, int]:
    found: dict[str, int] = {}
    for dtype, shape in layout.values():
        name = str(dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + dtype.itemsize * math.prod(shape)
    return found


class PublishedReader:
    """Reads the tensors of a published folder piece by piece, through maps that are renewed before
    they fill the memory.

    Raises ValueError or OSError that names a tensor which is missing, unknown, stored twice,
    misshapen or not plain."""

    def __init__(self, folder: Path, config: ModelConfig, progress: Progress | None = None):
        self.config = config
        self.layout: Layout = {}  # published name -> (dtype, published shape)
        self._files: dict[str, Path] = {}
        self._path: Path | None = None
        self._tensors: dict[str, Tensor] = {}
        self._left = 0  # bytes that may yet be touched through this map
        for path, listed in weight_files(folder).items():
            found = {
                name: (tensor.dtype, tuple(tensor.shape))
                for name, tensor in self._open(path).items()
            }
            for name in found:
                if name in self._files:
                    raise ValueError(
                        f"{name} is in {self._files[name].name} and again in {path.name}"
                    )
                self._files[name] = path
            check_index(path, found, listed)
            self.layout.update(found)
        check_shapes({name: shape for name, (_, shape) in self.layout.items()}, config)
        self._progress, self._done = progress, 0
        # to write, and twice for the fingerprint
        self._total = 3 * sum(_bytes_by_dtype(self.own_layout()).values())

    def own_layout(self) -> Layout:
        """Our name -> (dtype, our shape), in the order of our modules."""
        layout = {}
        for name, shape in published_shapes(self.config).items():
            ours = (shape[0], shape[2]) if name.endswith(".theta") else shape
            layout[own_name(name)] = self.layout[name][0], ours
        return layout

    def own_pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of ours, in pieces. Raises ValueError where a number in it is not finite."""
        theirs = published_name(name)
        for start, stop in own_rows(theirs, self.layout[theirs][1][0], self.config):
            for piece in self.pieces(theirs, start, stop):
                if not all(bound.isfinite() for bound in piece.aminmax()):  # which keep NaN
                    raise ValueError(
                        f"{theirs} in {self._files[theirs].name} holds a number that is not finite"
                    )
                yield piece

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Rows start to stop of a published tensor, in pieces of at most PIECE_BYTES or one row."""
        dtype, shape = self.layout[name]
        step = max(1, PIECE_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
        stop = shape[0] if stop is None else stop
        for first in range(start, stop, step):
            # A copy: what is still looked at would keep the map, or a whole shard, in memory.
            piece = (
                self._open(self._files[name])[name][first : min(first + step, stop)]
                .detach()
                .clone()
            )
            self._left -= max(piece.nbytes, TOUCH_BYTES)
            self._done += piece.nbytes
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)
            yield piece

    def check_head(self) -> None:
        """Raise ValueError where a copy of the tied head is stored and is not the embedding."""
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if not self.config.tie_word_embeddings or names[0] not in self.layout:
            return
        # not side by side: they may lie in different shards
        head, embedding = map(self._hash, names)
        if head != embedding:
            raise ValueError(HEAD_DIFFERS)

    def _hash(self, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self.pieces(name):
            digest.update(piece.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _open(self, path: Path) -> dict[str, Tensor]:
        """The file's tensors. The pages that were read through a map stay in memory until there is
        a new one."""
        if path != self._path or self._left <= 0:
            self._path, self._tensors = path, {}
            self._tensors = read_file(path, mapped=True)
            can_map = path.suffix == ".safetensors" or zipfile.is_zipfile(path)
            self._left = WINDOW_BYTES if can_map else sys.maxsize
        return self._tensors
