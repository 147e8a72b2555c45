"""Documents to token shards: `prepare` makes the prepared folder that training reads."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..files import new_folder
from . import chat
from .documents import Document, read_documents
from .shards import BEGINS, LEARNED, SHARD_TOKENS, EncodedText, FolderWriter
from .tokenizer import (
    check_vocab_size,
    encodes_in_pieces,
    load_tokenizer,
    pieces,
    require_end_of_text,
    train_tokenizer,
)

if TYPE_CHECKING:
    from rich.progress import ProgressColumn
    from tokenizers import Tokenizer

SAMPLE_BYTES = 2**29  # the largest amount of text that a new tokenizer is trained on
BATCH_CHARS = 2**21  # encoded at a time; each takes some 100 bytes of memory
BAR_AFTER_S = 2.0

# Called with a task, the bytes of text done, and the bytes in all, or 0 where they are not known.
Progress = Callable[[str, int, int], None]
Assigned = tuple[str, Document[Any]]  # the split, and a document that belongs to it
HeldOut = Callable[[int], bool]  # says whether the document of a number is held out as `valid`


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
    """Tokenize documents into the prepared folder `out`, and return what its data.json holds.

    inputs, text_field: as in `documents.read_documents`. Inputs are streamed up to three times.
    vocab_size: train byte-level BPE of this size on the first SAMPLE_BYTES of training documents.
    tokenizer: the path of a tokenizer to load. Exactly one of vocab_size and tokenizer is given.
    split: the share of the documents held out as `valid`. A hash of `seed` and a document's number
        chooses them, at least one and never all. Of a single document, the tail is held out.
    format: "text", or how records hold conversations, as in `chat.conversations`. Conversations
        need a tokenizer.
    chat_template: a file with the template of conversations; else `chat.choose_template` decides.
    shard_tokens: the largest number of tokens in one shard.
    valid: files or folders whose documents are the split `valid`. `inputs` are then all trained on.
    progress: is called now and then, see `Progress`; by default a `progress_bar` is shown.

    The folder is written under another name and renamed at the end, so it is whole or absent.
    Raises ValueError with one line where an argument, a document or `out` does not fit, and
    OSError where the disk is full.
    """
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive; got {shard_tokens}")
    asked = (inputs, valid, vocab_size, tokenizer, split, seed, text_field, format, chat_template)
    request = _Request(*asked)
    request.check()
    bpe = None if tokenizer is None else _load_tokenizer(tokenizer)
    # A path that is missing is refused here, before anything is written.
    documents = [request.read(paths) for paths in (inputs, valid) if paths]
    template = request.choose_template(bpe)
    reporter = nullcontext(progress) if progress else progress_bar()
    with new_folder(Path(out)) as folder, reporter as report:
        survey = _survey(chain.from_iterable(documents), report)
        held_out = _choose_held_out(seed, 0.0 if valid else split, survey.documents)
        if bpe is None:
            bpe = _train_tokenizer(request, held_out, survey, report)
        writer = FolderWriter(folder, bpe, template, shard_tokens)
        assigned = request.assign_splits(held_out, survey.documents)
        if template is None:
            encoded = _encode_texts(bpe, assigned, survey.bytes, report)
        else:
            encoded = _encode_conversations(template, bpe, assigned, survey.bytes, report)
        for piece in encoded:
            writer.append(piece)
        return writer.finish(request.as_source(survey))


class _Survey(NamedTuple):
    """The number of documents, their bytes in UTF-8, and a SHA-256 over their contents."""

    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Request:
    """The arguments of `prepare` that decide what the folder holds, and the documents they name."""

    inputs: Sequence[str | Path]
    valid: Sequence[str | Path]
    vocab_size: int | None
    tokenizer: str | Path | None
    split: float
    seed: int
    text_field: str
    format: str
    chat_template: str | Path | None

    @property
    def conversations(self) -> bool:
        return self.format != "text"

    def check(self) -> None:
        """Raise ValueError for arguments that do not fit, before any file is read."""
        formats = ", ".join(chat.FORMATS)
        if (self.vocab_size is None) == (self.tokenizer is None):
            raise ValueError("give either vocab_size, to train a tokenizer, or tokenizer, its path")
        if self.vocab_size is not None:
            check_vocab_size(self.vocab_size)
        if not 0 <= self.split < 1:
            raise ValueError(f"split must be a share of at least 0 and below 1; got {self.split}")
        if self.format not in ("text", *chat.FORMATS):
            raise ValueError(f"format {self.format!r} is unknown; there are text, {formats}")
        if not self.conversations and self.chat_template is not None:
            raise ValueError(f"a chat template needs a format of conversations: {formats}")
        if self.conversations and self.text_field != "text":
            raise ValueError(
                f"text_field = {self.text_field!r} is for text alone; "
                f"format {self.format!r} says itself which fields it reads"
            )
        if self.conversations and self.tokenizer is None:
            raise ValueError(f"format {self.format!r} needs the tokenizer of the model to be tuned")

    def choose_template(self, tokenizer: Tokenizer | None) -> str | None:
        """The source of the chat template, or None where the documents are text."""
        if not self.conversations or tokenizer is None or self.tokenizer is None:
            return None
        folder = Path(self.tokenizer)
        return chat.choose_template(tokenizer, self.format, folder, self.chat_template)

    def read(self, paths: Sequence[str | Path]) -> Iterator[Document[Any]]:
        """The documents of these paths, one at a time, each a text or a conversation."""
        if self.conversations:
            return chat.conversations(paths, self.format)
        return read_documents(paths, text_field=self.text_field)

    def assign_splits(self, held_out: HeldOut, count: int) -> Iterator[Assigned]:
        """Each of the `count` documents with its split, in order. The documents are read anew."""
        tail_share = self.split if count == 1 and not self.conversations else 0.0
        for number, document in enumerate(self.read(self.inputs)):
            if tail_share:
                text = document.content
                stop = _tail_start(text, tail_share)
                yield "train", document._replace(content=text[:stop])
                yield "valid", document._replace(content=text[stop:])
            else:
                yield "valid" if held_out(number) else "train", document
        if self.valid:
            yield from (("valid", document) for document in self.read(self.valid))

    def as_source(self, survey: _Survey) -> dict[str, Any]:
        """What data.json says about how the folder was made."""
        source: dict[str, Any] = {"inputs": [str(path) for path in self.inputs]}
        if self.valid:
            source["valid"] = [str(path) for path in self.valid]
        source |= {
            "text_field": self.text_field,
            "documents_sha256": survey.sha256,
            "vocab_size": self.vocab_size,
            "tokenizer": None if self.tokenizer is None else str(self.tokenizer),
            "split": self.split,
            "seed": self.seed,
        }
        if self.conversations:
            template = None if self.chat_template is None else str(self.chat_template)
            source |= {"format": self.format, "chat_template": template}
        return source


def _load_tokenizer(path: str | Path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    require_end_of_text(tokenizer, str(path))
    return tokenizer


def _survey(documents: Iterable[Document[Any]], report: Progress) -> _Survey:
    count, total_bytes, digest = 0, 0, hashlib.sha256()
    for document in documents:
        content = document.encoded()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
        count += 1
        total_bytes += len(content)
        report("reading", total_bytes, 0)
    return _Survey(count, total_bytes, digest.hexdigest())


# Which documents are held out.


def _choose_held_out(seed: int, share: float, count: int) -> HeldOut:
    """Choose about this share of `count` documents.

    Where there are two documents or more and the share is above 0, at least one is held out and at
    least one is not.
    """

    def draw(number: int) -> int:
        digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    if share == 0 or count < 2:
        return lambda number: False
    below = int(share * 2**64)
    if not any(draw(number) < below for number in range(count)):
        lowest = min(range(count), key=draw)
        return lambda number: number == lowest
    if all(draw(number) < below for number in range(count)):
        highest = max(range(count), key=draw)
        return lambda number: number != highest
    return lambda number: draw(number) < below


def _tail_start(text: str, share: float) -> int:
    """The index at which the tail of a single document begins, behind a line end.

    It is the line end nearest to the last `share` of the text, among those that leave more than
    white space on both sides.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1
    wanted = min(max(len(text) - round(len(text) * share), first + 1), last)
    neighbours = (text.rfind("\n", first, wanted), text.find("\n", wanted, last))
    ends = [end for end in neighbours if end >= 0]
    if not ends:
        advice = "set split to 0, or give more documents"
        raise ValueError(f"the only document is one line and cannot be split; {advice}")
    return 1 + min(ends, key=lambda end: abs(end + 1 - wanted))


# Training a tokenizer and encoding.


def _train_tokenizer(
    request: _Request,
    held_out: HeldOut,
    survey: _Survey,
    report: Progress,
) -> Tokenizer:
    """Train BPE on the first SAMPLE_BYTES of the training documents."""
    assert request.vocab_size is not None
    assigned = request.assign_splits(held_out, survey.documents)
    train_texts = (document.content for split, document in assigned if split == "train")
    sample = _sample(train_texts, SAMPLE_BYTES, survey.bytes, report)
    return train_tokenizer(sample, request.vocab_size)


def _sample(texts: Iterable[str], limit: int, total_bytes: int, report: Progress) -> Iterator[str]:
    """The first `limit` bytes of the texts, in pieces."""
    done = 0
    for text in texts:
        for piece in pieces(text):
            yield piece
            done += len(piece.encode())
            report("training the tokenizer", done, min(limit, total_bytes))
            if done >= limit:
                return


class _Piece(NamedTuple):
    """A document of text that is to be encoded, or a piece of a long one."""

    split: str
    text: str
    ends_document: bool


def _encode_texts(
    tokenizer: Tokenizer, assigned: Iterable[Assigned], total_bytes: int, report: Progress
) -> Iterator[EncodedText]:
    """The pieces of every document in order; the end-of-text id follows the last piece of each."""
    end_of_text = require_end_of_text(tokenizer)
    done = 0
    for batch in _batches(assigned, in_pieces=encodes_in_pieces(tokenizer)):
        batch_texts: Any = [piece.text for piece in batch]  # the library declares another type
        encodings = tokenizer.encode_batch_fast(batch_texts, add_special_tokens=False)
        for piece, encoding in zip(batch, encodings, strict=True):
            text_bytes = len(piece.text.encode())
            done += text_bytes
            ids = [*encoding.ids, end_of_text] if piece.ends_document else encoding.ids
            yield EncodedText(piece.split, ids, text_bytes, piece.ends_document)
        report("tokenizing", done, total_bytes)
    _check_unchanged(done, total_bytes)


def _batches(assigned: Iterable[Assigned], in_pieces: bool) -> Iterator[list[_Piece]]:
    """Documents as batches of BATCH_CHARS characters or little more.

    in_pieces: whether long documents are cut; else each is one piece.
    """
    batch: list[_Piece] = []
    chars = 0
    for split, document in assigned:
        text = document.content
        left = len(text)
        for piece in pieces(text) if in_pieces else [text]:
            left -= len(piece)
            batch.append(_Piece(split, piece, ends_document=left == 0))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    yield batch


def _encode_conversations(
    source: str,
    tokenizer: Tokenizer,
    assigned: Iterable[Assigned],
    total_bytes: int,
    report: Progress,
) -> Iterator[EncodedText]:
    """Every conversation in order, its ids with their flags; source: that of the chat template."""
    done = 0
    with chat.Template(source, tokenizer) as template:
        for number, (split, document) in enumerate(assigned, start=1):
            try:
                parts = template.parts(document.content)
            except ValueError as error:
                raise ValueError(f"conversation {number}: {error}") from None
            flagged_ids = [token | LEARNED * part.learned for part in parts for token in part.ids]
            flagged_ids[0] |= BEGINS
            learned_bytes = sum(part.bytes for part in parts if part.learned)
            done += len(document.encoded())
            yield EncodedText(split, flagged_ids, learned_bytes, ends_document=True)
            report("tokenizing", done, total_bytes)
    _check_unchanged(done, total_bytes)


def _check_unchanged(done: int, total_bytes: int) -> None:
    if done != total_bytes:
        raise ValueError("the inputs changed while they were read; prepare them again")


# Progress.


@contextmanager
def progress_bar(amount: ProgressColumn | None = None) -> Iterator[Progress]:
    """A `Progress` that draws a bar on standard error, if that is a terminal.

    The bar appears once the work has taken BAR_AFTER_S.
    amount: the column that says how much is done; by default it counts bytes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    description, remaining = TextColumn("{task.description}"), TimeRemainingColumn()
    columns = (description, BarColumn(), amount or DownloadColumn(), remaining)
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    bars = RichProgress(*columns, console=console, transient=True, disable=hidden)
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
