"""Token shards on disk, and a loader over them whose whole state is one number.

`prepare` turns documents into a prepared folder: `tokenizer.json`; the ids of the splits `train` and `valid` in
`train-00000.bin`, `valid-00000.bin`, ..., each document followed by the end-of-text id; and `data.json`, which says
what they hold and how they were made. Of conversations, whose template lies beside them, each id carries two flags.
`TokenData` opens a split, `Loader` shuffles its windows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..files import new_folder, read_json, sha256
from . import chat
from .corpus import documents
from .tokenizer import check_vocab_size, encodes_in_pieces, load_tokenizer, pieces, require_end_of_text, train_tokenizer

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from tokenizers import Tokenizer

FORMATS = (1, 2)  # of data.json and the shards: of text, and of conversations, whose ids carry flags
LEARNED, BEGINS = 1 << 31, 1 << 30  # the flags, in uint32: to be predicted; the first token of a document
SPLITS = ("train", "valid")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARD_TOKENS = 2**28  # 512 MiB of uint16
SAMPLE_BYTES = 2**29  # of training text that a new tokenizer is trained on
BATCH_CHARS = 2**21  # encoded at a time: some 100 bytes of memory each
BAR_AFTER_S = 2.0

Progress = Callable[[str, int, int], None]  # (what is being done, bytes of text done, bytes in all or 0 if not known)


# Preparing a folder.


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    split: float = 0.01,
    seed: int = 0,
    text_field: str = "text",
    format: str = "text",
    chat_template: str | Path | None = None,
    shard_tokens: int = SHARD_TOKENS,
    valid: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize documents into the prepared folder `out`; returns what its data.json holds.

    inputs, text_field: as in `corpus.documents`; read three times, streamed.
    format: "text", or how records hold conversations, as in `chat.conversations`; these need a tokenizer.
    chat_template: the file with the conversations' template. By default that of the folder `tokenizer`, if it has one,
        else `chat.DEFAULT`; of prompts with their completions, `chat.PLAIN`.
    vocab_size: train byte-level BPE of this size on the first SAMPLE_BYTES of the training documents; or
    tokenizer: the path of one to load. Exactly one of the two.
    split: share of the documents held out as `valid`, chosen by a hash of `seed` and the document's number: at least
        one and never all. Of a single document the tail is held out, from the line end nearest to that share.
    valid: files or folders whose documents are the split `valid`; then all documents of `inputs` are for training.
    shard_tokens: tokens a file. progress: called now and then, see `Progress`; by default `progress_bar`'s.

    The folder is written under another name and renamed at the end, so that it is whole or absent.
    Raises ValueError in one line where an argument, a document or `out` does not fit; OSError where the disk is full.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise ValueError("give either vocab_size, to train a tokenizer, or tokenizer, the path of one")
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if tokenizer is not None:
        bpe = load_tokenizer(tokenizer)
        require_end_of_text(bpe, str(tokenizer))  # before the documents are read
    if not 0 <= split < 1:
        raise ValueError(f"split must be a share of the documents, at least 0 and below 1; got {split}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive; got {shard_tokens}")
    if format not in ("text", *chat.FORMATS):
        raise ValueError(f"format {format!r} is unknown; there are text, {', '.join(chat.FORMATS)}")
    flags = format != "text"
    if not flags and chat_template is not None:
        raise ValueError(f"a chat template needs a format of conversations: {', '.join(chat.FORMATS)}")
    if flags and text_field != "text":
        raise ValueError(f"text_field = {text_field!r} is for text alone; format {format!r} says which fields it reads")

    def read(sources: Sequence[str | Path]) -> Iterator[str]:
        return chat.conversations(sources, format) if flags else documents(sources, text_field=text_field)

    texts = [read(sources) for sources in (inputs, valid) if sources]  # looks them up before anything is written
    if flags and tokenizer is None:
        raise ValueError(f"format {format!r} needs the tokenizer of the model that is to be tuned")
    source = chat.choose_template(bpe, format, Path(str(tokenizer)), chat_template) if flags else ""

    with new_folder(Path(out)) as folder, nullcontext(progress) if progress else progress_bar() as report:
        count, total_bytes, fingerprint = _survey(texts, report)
        held_out = _held_out(seed, 0.0 if valid else split, count)

        def labelled() -> Iterator[tuple[str, str]]:
            yield from _label(read(inputs), held_out, split if count == 1 and not flags else 0.0)
            if valid:
                yield from (("valid", text) for text in read(valid))

        if vocab_size is not None:
            train_texts = (text for name, text in labelled() if name == "train")
            bpe = train_tokenizer(_first(train_texts, SAMPLE_BYTES, total_bytes, report), vocab_size)
        end = require_end_of_text(bpe)
        size = 1 + max(bpe.get_vocab().values())
        (folder / "tokenizer.json").write_text(bpe.to_str(pretty=True) + "\n", encoding="utf-8")
        dtype = "uint32" if flags or size > 2**16 else "uint16"
        shards = {name: _Shards(folder, name, DTYPES[dtype], shard_tokens, flags) for name in SPLITS}
        if flags:
            (folder / chat.FILE).write_text(source, encoding="utf-8")
            encoded = _encode_chats(source, bpe, labelled(), report, total_bytes)
        else:
            encoded = _encode(bpe, end, labelled(), report, total_bytes)
        for name, text_bytes, ids, ends in encoded:
            shards[name].append(np.asarray(ids, DTYPES[dtype]), text_bytes, ends)
        splits = {name: shards[name].close() for name in SPLITS}
        record: dict[str, Any] = {
            "format": 1,
            "dtype": dtype,
            "vocab_size": size,
            "end_of_text": end,
            "tokenizer_sha256": sha256(folder / "tokenizer.json"),
            "source": {
                "inputs": [str(given) for given in inputs],
                **({"valid": [str(given) for given in valid]} if valid else {}),
                "text_field": text_field,
                "documents_sha256": fingerprint,
                "vocab_size": vocab_size,
                "tokenizer": None if tokenizer is None else str(tokenizer),
                "split": split,
                "seed": seed,
            },
            "splits": splits,
        }
        if flags:
            record |= {"format": 2, "flags": True, "chat_template_sha256": sha256(folder / chat.FILE)}
            template_file = None if chat_template is None else str(chat_template)
            record["source"] |= {"format": format, "chat_template": template_file}
        (folder / "data.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


@contextmanager
def progress_bar(amount: ProgressColumn | None = None) -> Iterator[Progress]:
    """A `Progress` that draws a bar on standard error once the work has taken BAR_AFTER_S, if that is a terminal.

    amount: the column that says how much is done; by default it counts bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), amount or DownloadColumn(), TimeRemainingColumn())
    bars = RichProgress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    started = drawn = time.monotonic()
    tasks: dict[str, TaskID] = {}

    def report(task: str, done: int, total: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if task in tasks and now - drawn < 0.1:
            return
        drawn = now
        if task not in tasks:
            for finished in tasks.values():
                bars.update(finished, visible=False)
            tasks[task] = bars.add_task(task, total=total or None)
        bars.update(tasks[task], completed=done)
        if now - started > BAR_AFTER_S and not bars.live.is_started:
            bars.start()

    try:
        yield report
    finally:
        bars.stop()


def _survey(texts: Sequence[Iterable[str]], report: Progress) -> tuple[int, int, str]:
    """How many documents, how many bytes in UTF-8, and a SHA-256 over the documents' contents."""
    count, total, digest = 0, 0, hashlib.sha256()
    for text in chain.from_iterable(texts):
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
        count += 1
        total += len(content)
        report("reading", total, 0)
    return count, total, digest.hexdigest()


def _held_out(seed: int, split: float, count: int) -> Callable[[int], bool]:
    """Which document numbers below `count` are held out; of two documents or more some are and some are not."""

    def draw(number: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "little")

    if split == 0 or count < 2:
        return lambda number: False
    below = int(split * 2**64)
    if not any(draw(number) < below for number in range(count)):
        lowest = min(range(count), key=draw)
        return lambda number: number == lowest
    if all(draw(number) < below for number in range(count)):
        highest = max(range(count), key=draw)
        return lambda number: number != highest
    return lambda number: draw(number) < below


def _label(texts: Iterable[str], held_out: Callable[[int], bool], tail: float) -> Iterator[tuple[str, str]]:
    """(split, text) of every document; the only document is cut in two where `tail` > 0."""
    for number, text in enumerate(texts):
        if tail:
            stop = _tail_start(text, tail)
            yield "train", text[:stop]
            yield "valid", text[stop:]
        else:
            yield "valid" if held_out(number) else "train", text


def _tail_start(text: str, share: float) -> int:
    """The index after the line end nearest to the last `share` of the text that leaves words on both sides."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
    wanted = min(max(len(text) - round(len(text) * share), first + 1), last)
    ends = [end for end in (text.rfind("\n", first, wanted), text.find("\n", wanted, last)) if end >= 0]
    if not ends:
        raise ValueError("the only document is one line and cannot be split; set split to 0, or give more documents")
    return 1 + min(ends, key=lambda end: abs(end + 1 - wanted))


def _first(texts: Iterable[str], limit: int, total: int, report: Progress) -> Iterator[str]:
    """The first `limit` bytes of the texts."""
    done = 0
    for text in texts:
        for piece in pieces(text):
            yield piece
            done += len(piece.encode())
            report("training the tokenizer", done, min(limit, total))
            if done >= limit:
                return


def _encode(
    tokenizer: Tokenizer, end: int, labelled: Iterable[tuple[str, str]], report: Progress, total: int
) -> Iterator[tuple[str, int, list[int], bool]]:
    """(split, bytes of text, ids, whether the document ends) of every document's pieces, in order; `end` ends it."""
    cut = pieces if encodes_in_pieces(tokenizer) else (lambda text: iter((text,)))
    batch: list[tuple[str, str, bool]] = []
    chars = done = 0

    def encoded() -> Iterator[tuple[str, int, list[int], bool]]:
        nonlocal done
        texts = [piece for _, piece, _ in batch]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # type: ignore[arg-type]
        for (name, piece, ends), encoding in zip(batch, found, strict=True):
            text_bytes = len(piece.encode())
            done += text_bytes
            yield name, text_bytes, [*encoding.ids, end] if ends else encoding.ids, ends
        report("tokenizing", done, total)

    for name, text in labelled:
        left = len(text)
        for piece in cut(text):
            left -= len(piece)
            batch.append((name, piece, left == 0))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield from encoded()
                batch, chars = [], 0
    yield from encoded()
    _check_unchanged(done, total)


def _encode_chats(
    source: str, tokenizer: Tokenizer, labelled: Iterable[tuple[str, str]], report: Progress, total: int
) -> Iterator[tuple[str, int, list[int], bool]]:
    """(split, bytes of what is learned, ids with their flags, True) of every conversation, in order."""
    done = 0
    with chat.Template(source, tokenizer) as template:
        for number, (name, text) in enumerate(labelled, start=1):
            try:
                parts = template.parts(json.loads(text))
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
            words = [token | LEARNED * part.learned for part in parts for token in part.ids]
            words[0] |= BEGINS
            done += len(text.encode())
            yield name, sum(part.bytes for part in parts if part.learned), words, True
            report("tokenizing", done, total)
    _check_unchanged(done, total)


def _check_unchanged(done: int, total: int) -> None:
    if done != total:
        raise ValueError("the inputs changed while they were read; prepare them again")


class _Shards:
    """The files of one split while they are written; `close` returns their record."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, flags: bool):
        self._folder, self._name, self._dtype, self._most = folder, name, dtype, shard_tokens
        self._flags, self._learned = flags, 0
        self._file: Any = None
        self._sizes: list[int] = []
        self._bytes = self._documents = 0

    def append(self, ids: np.ndarray, text_bytes: int, ends: bool) -> None:
        self._bytes += text_bytes
        self._documents += ends
        self._learned += int((ids >= LEARNED).sum()) if self._flags else 0
        while len(ids):
            if self._file is None:
                self._file = open(self._folder / _shard_name(self._name, len(self._sizes)), "wb")  # noqa: SIM115
                self._sizes.append(0)
            fit = ids[: self._most - self._sizes[-1]]
            self._file.write(fit.tobytes())
            self._sizes[-1] += len(fit)
            ids = ids[len(fit) :]
            if self._sizes[-1] == self._most:
                self._finish()

    def close(self) -> dict[str, Any]:
        self._finish()
        shards = [{"file": _shard_name(self._name, n), "tokens": size} for n, size in enumerate(self._sizes)]
        record = {"tokens": sum(self._sizes), "bytes": self._bytes, "documents": self._documents, "shards": shards}
        return record | {"learned": self._learned} if self._flags else record

    def _finish(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


# Reading a folder.


class TokenData:
    """One split of a prepared folder, read-only and mapped into memory: one run of ids over all its shards.

    tokens, documents; learned: tokens to be predicted (all, of text); bytes: of the learned text in UTF-8, for bits
    per byte; vocab_size: above every id; end_of_text: the id after each document; flags: whether the documents are
    conversations; chat_template: theirs, or None; source: how the folder was made, as `prepare` was asked.
    Raises ValueError in one line where the folder is not one, or is not as its record says.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        folder = Path(folder)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        record = _read_record(folder)
        found = record["splits"][split]
        self.tokens: int = found["tokens"]
        self.learned: int = found.get("learned", self.tokens)
        self.bytes: int = found["bytes"]
        self.documents: int = found["documents"]
        self.vocab_size: int = record["vocab_size"]
        self.end_of_text: int = record["end_of_text"]
        self.flags: bool = record["format"] == 2
        self.chat_template = chat.read_template(folder / chat.FILE) if self.flags else None
        self.fingerprint: str = f"{record['source']['documents_sha256']} {record['tokenizer_sha256']}"
        if self.flags:
            self.fingerprint += f" {record['chat_template_sha256']}"
        self.source: dict[str, Any] = record["source"]
        self.name = f"{folder} {split}"
        self._files = [folder / shard["file"] for shard in found["shards"]]
        self._shards = [_map(folder / shard["file"], record["dtype"], shard["tokens"]) for shard in found["shards"]]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])  # [shards + 1]

    def window(self, start: int, length: int) -> np.ndarray:
        """The ids from `start` on as int64 [length]. Raises ValueError where it reaches beyond the split."""
        words = self._words(start, length)
        return words & (BEGINS - 1) if self.flags else words

    def marks(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of these tokens are learned, and which begin a document: two of bool [length]."""
        if self.flags:
            words = self._words(start, length)
            return words & LEARNED != 0, words & BEGINS != 0
        before = self._words(max(start, 1) - 1, length - (start == 0))
        begins = before == self.end_of_text
        return np.ones(length, bool), np.concatenate([[True], begins]) if start == 0 else begins

    def document_ends(self) -> np.ndarray:
        """The index after each document's last token, int64 [documents]. Of conversations alone."""
        starts = [
            at + np.flatnonzero(shard & BEGINS) for at, shard in zip(self._starts, self._shards, strict=False)
        ]  # fmt: skip
        return np.concatenate([*starts, [self.tokens]])[1:].astype(np.int64)

    def _words(self, start: int, length: int) -> np.ndarray:
        """Ids with their flags as int64 [length]. ValueError names the shard that holds an id past the vocabulary."""
        stop = start + length
        if start < 0 or length < 0 or stop > self.tokens:
            raise ValueError(f"{self.name} has {self.tokens} tokens; there is no window from {start} to {stop}")
        words = np.empty(length, np.int64)
        at = start
        while at < stop:
            n = int(np.searchsorted(self._starts, at, side="right")) - 1
            end = min(stop, int(self._starts[n + 1]))
            part = words[at - start : end - start]
            part[:] = self._shards[n][at - self._starts[n] : end - self._starts[n]]
            ids = part & (BEGINS - 1) if self.flags else part
            if (largest := int(ids.max())) >= self.vocab_size:
                raise ValueError(
                    f"{self._files[n]}: damaged; it has the token {largest:,}, and the vocabulary {self.vocab_size:,} "
                    f"words; prepare the folder again"
                )
            at = end
        return words


def _read_record(folder: Path) -> dict[str, Any]:
    """What data.json holds, known to be complete and to fit the folder's tokenizer."""
    path, tokenizer = folder / "data.json", folder / "tokenizer.json"
    if not path.is_file():
        what = "has no data.json" if folder.is_dir() else "is a file" if folder.exists() else "is not there"
        raise ValueError(f"{folder}: not a prepared folder, for it {what}; make one with transnormer prepare")
    record = read_json(path)
    try:
        if record["format"] not in FORMATS:
            raise ValueError(f"{path}: has format {record['format']}, not 1 or 2; prepare the folder again")
        whole = _is_whole(record)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged, or not of a prepared folder")
    if not tokenizer.is_file() or sha256(tokenizer) != record["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer}: is not the tokenizer that made these tokens")
    template = folder / chat.FILE
    if record["format"] == 2 and (not template.is_file() or sha256(template) != record["chat_template_sha256"]):
        raise ValueError(f"{template}: is not the template that made these tokens")
    return record


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether data.json says all that is read of it, in numbers that fit one another. May raise what a gap raises."""

    def count(value: object) -> bool:
        return type(value) is int and value >= 0

    flags = record["format"] == 2
    whole = record["dtype"] in (("uint32",) if flags else DTYPES) and {"tokenizer_sha256", "source"} <= record.keys()
    whole &= "documents_sha256" in record["source"]
    whole &= count(record["vocab_size"]) and count(record["end_of_text"])
    whole &= record["end_of_text"] < record["vocab_size"]
    if flags:
        whole &= "chat_template_sha256" in record
    for found in (record["splits"][name] for name in SPLITS):
        counts = ["tokens", "bytes", "documents", *(["learned"] if flags else [])]
        whole &= all(count(found[key]) for key in counts) and all(count(each["tokens"]) for each in found["shards"])
        whole &= found["tokens"] == sum(each["tokens"] for each in found["shards"])
        whole &= all(each["file"] == Path(each["file"]).name for each in found["shards"])
    return bool(whole)


def _map(path: Path, dtype: str, tokens: int) -> np.ndarray:
    kind = DTYPES[dtype]
    if not path.is_file():
        raise ValueError(f"{path}: this shard is missing")
    size = path.stat().st_size
    if size != tokens * kind.itemsize:
        raise ValueError(f"{path}: damaged; it has {size} bytes, not {tokens * kind.itemsize}")
    return np.memmap(path, kind, mode="r")


class Batch(NamedTuple):
    """What a step reads: ids and targets, int64 [B, T], target -100 where nothing is learned.

    With cu_seqlens, int64 [N + 1], ids and targets are [1, B * T], N documents one after another, each to be read
    from a fresh state.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None

    @property
    def learned(self) -> int:
        """Targets that count."""
        return int((self.targets != -100).sum())

    def to(self, device: torch.device) -> Batch:
        """A copy there; from pinned memory it is on its way when this returns."""
        return Batch(*(None if part is None else part.to(device, non_blocking=True) for part in self))  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        return Batch(*(None if part is None else part.pin_memory() for part in self))  # type: ignore[arg-type]


class Loader:
    """Endless shuffled batches of a split, for this rank.

    Windows of text start at multiples of seq_len and share one token, the last target and next first input; what is
    left at the end is dropped. A window of conversations holds as many whole ones as fit, and after them nothing that
    is learned; one that is longer is cut as text is. reset_state: the state begins anew with every document, and
    nothing is predicted across a border (`Batch`).

    Sample g of the run is window `window_index(seed, g // count, g % count, count)`, and a step takes the next
    ranks * batch_size samples, of which rank r has the r-th batch_size: what a step sees depends on how many rows it
    has, not on how many ranks share them. `position` is all that need be saved; `seek` goes there.
    Raises ValueError where the split has no whole window or a number does not fit.
    """

    def __init__(
        self, data: TokenData, *, seq_len: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1,
        reset_state: bool = False,
    ):  # fmt: skip
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("ranks", ranks)):
            if value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be at least 0 and below ranks {ranks}; got {rank}")
        self._windows = _whole_documents(data, seq_len) if data.flags else None  # [count, 2]
        # windows, so samples an epoch
        self.count = (data.tokens - 1) // seq_len if self._windows is None else len(self._windows)
        if self.count < 1:
            raise ValueError(
                f"{data.name} has {data.tokens} tokens, and one window of seq_len {seq_len} needs {seq_len + 1}"
            )
        self.data, self._seq_len, self._batch_size, self._seed = data, seq_len, batch_size, seed
        self._rank, self._ranks, self._reset_state = rank, ranks, reset_state
        self._position = 0

    def cut(self) -> str | None:
        """Says how many conversations are longer than a window, and so are cut; None where none is."""
        if not self.data.flags:
            return None
        lengths = np.diff(self.data.document_ends(), prepend=0)
        longer = int((lengths > self._seq_len + 1).sum())
        if not longer:
            return None
        return (
            f"{longer:,} of {len(lengths):,} conversations do not fit into seq_len {self._seq_len} and are cut: what "
            f"stands behind a cut is learned without what came before; seq_len {lengths.max() - 1} would cut none"
        )

    @property
    def position(self) -> int:
        """Samples handed out so far, over all ranks."""
        return self._position

    def seek(self, position: int) -> None:
        """Go on from this `position`, whatever the ranks and batch size were when it was read."""
        if position < 0:
            raise ValueError(f"position must be 0 or more; got {position}")
        self._position = position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._position + self._rank * self._batch_size
        samples = range(first, first + self._batch_size)
        self._position += self._ranks * self._batch_size
        return self.batch(window_index(self._seed, g // self.count, g % self.count, self.count) for g in samples)

    def batch(self, windows: Iterable[int]) -> Batch:
        """The windows of these numbers, each below `count`, as rows."""
        rows = [self._row(number) for number in windows]
        ids, targets, begins = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
        if not self._reset_state:
            return Batch(ids, targets)
        begins[:, 0] = True
        bounds = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([begins.numel()])])
        return Batch(ids.flatten()[None], targets.flatten()[None], bounds)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids and targets int64 [T], begins bool [T]."""
        start = stop = number * self._seq_len
        length = self._seq_len + 1
        if self._windows is None and not self._reset_state:  # then all is learned, and borders are nothing
            ids = self.data.window(start, length)
            return ids[:-1], ids[1:], np.zeros(self._seq_len, bool)
        if self._windows is not None:
            start, stop = self._windows[number].tolist()
        read = min(length, self.data.tokens - start)
        ids = np.pad(self.data.window(start, read), (0, length - read), constant_values=self.data.end_of_text)
        learned, begins = (np.pad(marks, (0, length - read)) for marks in self.data.marks(start, read))
        if self._windows is not None:
            learned[stop - start :] = False
        if self._reset_state:
            learned &= ~begins
        return ids[:-1], np.where(learned[1:], ids[1:], -100), begins[:-1]


def _whole_documents(data: TokenData, seq_len: int) -> np.ndarray:
    """Windows of at most seq_len + 1 tokens as (start, stop), int64 [count, 2]: whole documents as many as fit."""
    ends = data.document_ends()
    windows: list[tuple[int, int]] = []
    start = 0
    while start < data.tokens - 1:
        fit = int(np.searchsorted(ends, start + seq_len + 1, side="right"))
        whole = int(ends[fit - 1]) if fit else 0
        if whole > start + 1:
            windows.append((start, whole))
            start = whole
        else:  # longer than a window
            windows.append((start, start + seq_len + 1))
            start += seq_len
    return np.array(windows, np.int64).reshape(-1, 2)


_MASK = 2**64 - 1


def window_index(seed: int, epoch: int, position: int, count: int) -> int:
    """Where a random permutation of range(count), one for each seed and epoch, sends `position`.

    A Feistel network permutes the smallest range(2^bits) that holds the count; a number that falls outside walks on
    until one falls inside, which keeps it a permutation. Constant memory, and the same on every machine and version.
    """
    if not 0 <= position < count:
        raise ValueError(f"position must be at least 0 and below count {count}; got {position}")
    bits = (count - 1).bit_length()
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = _round_keys(seed, epoch)
    index = position
    while True:
        high, low = index >> low_bits, index & low_mask
        for n in range(0, len(keys), 2):
            low ^= _mix(high, keys[n]) & low_mask
            high ^= _mix(low, keys[n + 1]) & high_mask
        index = high << low_bits | low
        if index < count:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Eight keys of 64 bits."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8))


def _mix(value: int, key: int) -> int:
    """64 bits, each of which depends on every bit of the value and the key."""
    x = ((value ^ key) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 32) * 0xD6E8FEB86659FD93) & _MASK
    return x ^ x >> 32
