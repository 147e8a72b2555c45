"""Token ids to text as they come, and the strings at which a text ends."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..data.tokenizer import BYTE_LETTERS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTES = {letter: byte for byte, letter in BYTE_LETTERS.items()}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_INVALID = re.compile("[\udc80-\udcff]")  # how "surrogateescape" writes each byte that is not UTF-8
_CHARACTER_BYTES = 4  # the longest character in UTF-8


class Decoder:
    """Token ids to text, token by token, by the bytes that each token stands for.

    A character is given once its last byte is there. The pieces of `step` and of `end`, joined, are
    the text of all tokens, whatever they are and wherever they stop. Special tokens have no text.

    Bytes that are not UTF-8 become U+FFFD. With byte-level BPE it is `tokenizer.decode`'s U+FFFD,
    one for each character that was begun. With byte tokens (<0xE6>) it is SentencePiece's, one for
    each byte; `tokenizer.decode` would also lose the valid characters beside them."""

    def __init__(self, tokenizer: Tokenizer, read: Sequence[int] = ()):
        """read: the tokens before the first. Their text is not given; where they end inside a
        character, that character is."""
        kinds = _decoder_kinds(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._special = {number for number, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Sequence", "Fuse"}
        self._byte_tokens = "ByteFallback" in kinds
        # A token in the middle of a text may have a blank that it lacks where a text begins, so its
        # text is read off behind this.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids
        self._before_length = len(tokenizer.decode(self._before))
        errors = "replace" if self._byte_level else "surrogateescape"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._begun = False
        tail = b""
        for token in reversed(read):
            tail = self._bytes_of(token, begun=True) + tail
            if len(tail) >= _CHARACTER_BYTES:
                break
        self._begun = bool(tail)
        self._utf8.decode(tail)

    def step(self, token: int) -> str:
        """The text that the next token completes; empty where it completes no character."""
        content = self._bytes_of(token, self._begun)
        self._begun = self._begun or self._spelled(token) is not None
        return self._text(self._utf8.decode(content))

    def end(self) -> str:
        """The rest, where the tokens ended inside a character."""
        return self._text(self._utf8.decode(b"", final=True))

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of all tokens in pieces, none of them empty."""
        for token in tokens:
            if piece := self.step(token):
                yield piece
        if piece := self.end():
            yield piece

    def _text(self, decoded: str) -> str:
        return decoded if self._byte_level else _INVALID.sub("\ufffd", decoded)

    def _spelled(self, token: int) -> str | None:
        """The token as the vocabulary has it. `tokenizer.decode` passes over special tokens and ids
        that the tokenizer does not have: None."""
        return None if token in self._special else self._tokenizer.id_to_token(token)

    def _bytes_of(self, token: int, begun: bool) -> bytes:
        """What a token adds to the text, in UTF-8. begun: whether another stands before it."""
        spelled = self._spelled(token)
        if spelled is None:
            return b""
        if self._byte_level:
            if all(letter in _BYTES for letter in spelled):
                return bytes(_BYTES[letter] for letter in spelled)
            return spelled.encode()  # an added token, which need not be spelled in bytes' letters
        byte = _BYTE_TOKEN.fullmatch(spelled) if self._byte_tokens else None
        if byte and int(byte[1], 16) > 0x7F:  # others are ASCII, and have their text like any token
            return bytes.fromhex(byte[1])
        if begun:
            text = self._tokenizer.decode([*self._before, token])[self._before_length :]
        else:
            text = self._tokenizer.decode([token])
        return text.encode()


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """The types of the tokenizer's decoder and of those in it, as tokenizer.json names them."""

    def kinds(decoder: dict[str, Any]) -> set[str]:
        return {decoder["type"]}.union(*(kinds(each) for each in decoder.get("decoders", [])))

    return (
        set() if tokenizer.decoder is None else kinds(json.loads(tokenizer.decoder.__getstate__()))
    )


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The strings at which a text ends, one or several. Raises ValueError for an empty one."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise ValueError(
            "stop: an empty string would end every text before its first letter; leave it out"
        )
    return strings


class UntilStop:
    """Text, piece by piece, up to the stop string that is complete first, which is not given
    itself.

    Text that may turn out to begin a stop string is held back until that is known."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = stop, ""
        self.found = False  # whether a stop string is complete; nothing is given after it

    def step(self, piece: str) -> str:
        """The text that is known to stand before any stop string, with the next piece."""
        held = self._held + piece
        found = [
            (start + len(string), start)
            for string in self._stop
            if (start := held.find(string)) >= 0
        ]
        if found:
            self.found, ready = True, min(found)[1]
        else:
            ready = len(held) - max((_overlap(held, string) for string in self._stop), default=0)
        self._held = "" if self.found else held[ready:]
        return held[:ready]

    def end(self) -> str:
        """The rest, where no stop string was found."""
        held, self._held = self._held, ""
        return held


def until_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces as `UntilStop` gives them, none of them empty."""
    until = UntilStop(stop)
    for piece in pieces:
        if ready := until.step(piece):
            yield ready
        if until.found:
            return
    if rest := until.end():
        yield rest


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string`."""
    return next(
        (n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0
    )
