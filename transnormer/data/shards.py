"""The files of a prepared folder: `FolderWriter` writes them, and `TokenData` reads one split.

A prepared folder holds `tokenizer.json`; the ids of the splits `train` and `valid`, in shards named
`train-00000.bin`, `valid-00000.bin` and so on; and `data.json`, the record of what the shards hold
and how they were made. In shards of text, the end-of-text id follows every document. A folder of
conversations also holds their chat template, and two bits of each of its ids are flags.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..files import read_json, sha256
from . import chat
from .tokenizer import require_end_of_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT, CONVERSATIONS = 1, 2  # the field "format" of data.json: plain ids, or ids with flags
LEARNED = 1 << 31  # flag in uint32: the token is a target of the loss
BEGINS = 1 << 30  # flag in uint32: the token is the first of its document
ID_BITS = BEGINS - 1
SPLITS = ("train", "valid")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARD_TOKENS = 2**28  # 512 MiB of uint16


# Writing a folder.


class EncodedText(NamedTuple):
    """The ids of a document, or of one piece of a long document, and the split that they belong to.

    text_bytes: the bytes, in UTF-8, of the text that is learned.
    """

    split: str
    ids: list[int]
    text_bytes: int
    ends_document: bool


class FolderWriter:
    """Writes the tokenizer and the template at once, then ids as they come, and at last data.json.

    template: the chat template where the documents are conversations, whose ids carry flags.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, template: str | None, shard_tokens: int):
        self._folder, self._flags = folder, template is not None
        self._end_of_text = require_end_of_text(tokenizer)
        self._vocab_size = 1 + max(tokenizer.get_vocab().values())
        self._dtype = "uint32" if self._flags or self._vocab_size > 2**16 else "uint16"
        content = tokenizer.to_str(pretty=True) + "\n"
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        if template is not None:
            (folder / chat.FILE).write_text(template, encoding="utf-8")
        dtype = DTYPES[self._dtype]
        writers = (_SplitWriter(folder, name, dtype, shard_tokens, self._flags) for name in SPLITS)
        self._splits = dict(zip(SPLITS, writers, strict=True))

    def append(self, encoded: EncodedText) -> None:
        self._splits[encoded.split].append(encoded)

    def finish(self, source: dict[str, Any]) -> dict[str, Any]:
        """Close the shards, write data.json and return what it holds.

        source: how the folder was made, as data.json should say it.
        """
        splits = {name: self._splits[name].finish() for name in SPLITS}
        record: dict[str, Any] = {
            "format": CONVERSATIONS if self._flags else TEXT,
            "dtype": self._dtype,
            "vocab_size": self._vocab_size,
            "end_of_text": self._end_of_text,
            "tokenizer_sha256": sha256(self._folder / "tokenizer.json"),
            "source": source,
            "splits": splits,
        }
        if self._flags:
            record["flags"] = True
            record["chat_template_sha256"] = sha256(self._folder / chat.FILE)
        content = json.dumps(record, indent=2) + "\n"
        (self._folder / "data.json").write_text(content, encoding="utf-8")
        return record


class _SplitWriter:
    """The shards of one split while they are written."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shard_tokens: int, flags: bool):
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shard_tokens, self._flags = shard_tokens, flags
        self._file: Any = None
        self._shard_sizes: list[int] = []  # in tokens
        self._text_bytes = self._documents = self._learned = 0

    def append(self, encoded: EncodedText) -> None:
        self._text_bytes += encoded.text_bytes
        self._documents += encoded.ends_document
        ids = np.asarray(encoded.ids, self._dtype)  # [N]
        if self._flags:
            self._learned += int((ids >= LEARNED).sum())
        while len(ids):
            if self._file is None:
                self._open_next_shard()
            fitting = ids[: self._shard_tokens - self._shard_sizes[-1]]
            self._file.write(fitting.tobytes())
            self._shard_sizes[-1] += len(fitting)
            ids = ids[len(fitting) :]
            if self._shard_sizes[-1] == self._shard_tokens:
                self._close_shard()

    def finish(self) -> dict[str, Any]:
        """Close the last shard, and return what data.json says about this split."""
        self._close_shard()
        record: dict[str, Any] = {
            "tokens": sum(self._shard_sizes),
            "bytes": self._text_bytes,
            "documents": self._documents,
            "shards": [
                {"file": _shard_name(self._name, number), "tokens": size}
                for number, size in enumerate(self._shard_sizes)
            ],
        }
        if self._flags:
            record["learned"] = self._learned
        return record

    def _open_next_shard(self) -> None:
        path = self._folder / _shard_name(self._name, len(self._shard_sizes))
        self._file = open(path, "wb")  # noqa: SIM115
        self._shard_sizes.append(0)

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


# Reading a folder.


class TokenData:
    """One split of a prepared folder: the ids of all its shards in a row, mapped into memory.

    tokens, documents: how many the split holds.
    learned: the number of tokens that are targets of the loss; in text, every token is one.
    bytes: the bytes of the learned text in UTF-8, by which bits per byte are computed.
    vocab_size: a bound above every id. end_of_text: the id that ends a document.
    flags: whether the documents are conversations. chat_template: their template, or None.
    source: the arguments that `prepare` was called with.
    fingerprint: hashes of the documents, of the tokenizer and of the template.

    Raises ValueError with one line where the folder is not prepared or differs from its record.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        folder = Path(folder)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        record = _read_record(folder)
        sizes = record["splits"][split]
        self.name = f"{folder} {split}"
        self.tokens: int = sizes["tokens"]
        self.learned: int = sizes.get("learned", self.tokens)
        self.bytes: int = sizes["bytes"]
        self.documents: int = sizes["documents"]
        self.vocab_size: int = record["vocab_size"]
        self.end_of_text: int = record["end_of_text"]
        self.flags: bool = record["format"] == CONVERSATIONS
        self.chat_template = chat.read_template(folder / chat.FILE) if self.flags else None
        self.source: dict[str, Any] = record["source"]
        self.fingerprint = f"{self.source['documents_sha256']} {record['tokenizer_sha256']}"
        if self.flags:
            self.fingerprint += f" {record['chat_template_sha256']}"
        self._files = [folder / shard["file"] for shard in sizes["shards"]]
        self._shards = [
            _map_shard(file, record["dtype"], shard["tokens"])
            for file, shard in zip(self._files, sizes["shards"], strict=True)
        ]
        self._starts = np.cumsum([0, *map(len, self._shards)])  # [shards + 1]

    def window(self, start: int, length: int) -> np.ndarray:
        """The ids from index `start` on, int64 [length].

        Raises ValueError where the window reaches beyond the split.
        """
        stored = self._stored_ids(start, length)
        return stored & ID_BITS if self.flags else stored

    def marks(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a window are learned and which begin a document: bool [length] each."""
        if self.flags:
            flagged_ids = self._stored_ids(start, length)
            return flagged_ids & LEARNED != 0, flagged_ids & BEGINS != 0
        before = self._stored_ids(max(start, 1) - 1, length - (start == 0))
        begins = before == self.end_of_text
        return np.ones(length, bool), np.concatenate([[True], begins]) if start == 0 else begins

    def document_ends(self) -> np.ndarray:
        """The index after the last token of each conversation, int64 [documents].

        Only shards of conversations hold the flags that this reads.
        """
        shards = zip(self._starts[:-1], self._shards, strict=True)
        begins = [first + np.flatnonzero(flagged_ids & BEGINS) for first, flagged_ids in shards]
        return np.concatenate([*begins, [self.tokens]])[1:].astype(np.int64)

    def _stored_ids(self, start: int, length: int) -> np.ndarray:
        """The ids of a window as stored, with their flags if they have any: int64 [length].

        Raises ValueError, which names the shard, where an id is not in the vocabulary.
        """
        stop = start + length
        if start < 0 or length < 0 or stop > self.tokens:
            window = f"window from {start} to {stop}"
            raise ValueError(f"{self.name} has {self.tokens} tokens; there is no {window}")
        stored = np.empty(length, np.int64)
        at = start
        while at < stop:
            n = int(np.searchsorted(self._starts, at, side="right")) - 1
            end = min(stop, int(self._starts[n + 1]))
            part = stored[at - start : end - start]
            part[:] = self._shards[n][at - self._starts[n] : end - self._starts[n]]
            ids = part & ID_BITS if self.flags else part
            if (largest := int(ids.max())) >= self.vocab_size:
                raise ValueError(
                    f"{self._files[n]}: damaged; it holds the id {largest:,}, and the vocabulary "
                    f"has only {self.vocab_size:,} tokens; prepare the folder again"
                )
            at = end
        return stored


def _map_shard(path: Path, dtype: str, tokens: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path}: this shard is missing")
    size, recorded = path.stat().st_size, tokens * DTYPES[dtype].itemsize
    if size != recorded:
        raise ValueError(f"{path}: damaged; it has {size} bytes, not {recorded}")
    return np.memmap(path, DTYPES[dtype], mode="r")


def _read_record(folder: Path) -> dict[str, Any]:
    """The content of data.json, once it is known to be complete and to fit the other files."""
    path, tokenizer, template = folder / "data.json", folder / "tokenizer.json", folder / chat.FILE
    if not path.is_file():
        found = "is a file" if folder.exists() else "is not there"
        why = "has no data.json" if folder.is_dir() else found
        message = f"{folder}: not a prepared folder, because it {why}; run transnormer prepare"
        raise ValueError(message)
    record = read_json(path)
    try:
        if record["format"] not in (TEXT, CONVERSATIONS):
            found = f"has format {record['format']}, not {TEXT} or {CONVERSATIONS}"
            raise ValueError(f"{path}: {found}; prepare the folder again")
        complete = _is_complete(record)
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"{path}: damaged, or not the record of a prepared folder")
    if not tokenizer.is_file() or sha256(tokenizer) != record["tokenizer_sha256"]:
        raise ValueError(f"{tokenizer}: is not the tokenizer that made these tokens")
    if record["format"] == CONVERSATIONS and (
        not template.is_file() or sha256(template) != record["chat_template_sha256"]
    ):
        raise ValueError(f"{template}: is not the template that made these tokens")
    return record


def _is_complete(record: dict[str, Any]) -> bool:
    """Whether a record has every field that is read from it, and its numbers fit one another.

    Raises KeyError, TypeError or AttributeError where a field is missing or has another type.
    """
    flags = record["format"] == CONVERSATIONS
    return bool(
        record["dtype"] in (("uint32",) if flags else DTYPES)
        and {"tokenizer_sha256", "source"} <= record.keys()
        and "documents_sha256" in record["source"]
        and _is_count(record["vocab_size"])
        and _is_count(record["end_of_text"])
        and record["end_of_text"] < record["vocab_size"]
        and (not flags or "chat_template_sha256" in record)
        and all(_is_complete_split(record["splits"][name], flags) for name in SPLITS)
    )


def _is_complete_split(sizes: dict[str, Any], flags: bool) -> bool:
    counts = ["tokens", "bytes", "documents", *(["learned"] if flags else [])]
    shards = sizes["shards"]
    return (
        all(_is_count(sizes[name]) for name in counts)
        and all(_is_count(shard["tokens"]) for shard in shards)
        and sizes["tokens"] == sum(shard["tokens"] for shard in shards)
        # a name with a folder in it could lead out of the prepared folder
        and all(shard["file"] == Path(shard["file"]).name for shard in shards)
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
