"""Reading and writing text with a model: prefill in pieces, then token by token from the state alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..model.state import State
from .sampling import Sampling, sample

PIECE = 2_048  # tokens read at a time: bounds the memory of a long prompt
CONTEXT = 8  # tokens that the text of the next one may depend on, and that a character may have


class Session:
    """One text being read and written. It remembers the state, and the last token where the state has not read it yet.

    Time and memory of a token do not depend on how long the text is (with a linear mixer).
    """

    def __init__(self, model: LanguageModel, state: State | None = None):
        self.model, self.state = model, state
        self._logits: Tensor | None = None  # [1, vocab], after the last token read
        self._unread: list[int] = []

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        """Take in tokens. Raises ValueError for an id outside the vocabulary."""
        ids = [*self._unread, *ids]
        self._unread = []
        size = self.model.config.vocab_size
        if any(not 0 <= token < size for token in ids):
            raise ValueError(f"a token id is outside the model's vocabulary of {size:,}")
        for start in range(0, len(ids), PIECE):
            piece = torch.tensor([ids[start : start + PIECE]], device=self.model.device)
            x, self.state = self.model.hidden(piece, self.state)
            self._logits = torch.nn.functional.linear(x[:, -1], self.model.head_weight)

    @torch.inference_mode()
    def write(self, max_tokens: int, sampling: Sampling | None = None, end: int | None = None) -> Iterator[int]:
        """Draw tokens, at most so many, until `end` (which is read but not given). Raises ValueError before any read."""
        sampling = sampling or Sampling()
        generator = sampling.generator(self.model.device)
        for _ in range(max_tokens):
            if self._unread:
                self.read([])
            if self._logits is None:
                raise ValueError("nothing was read yet: give a prompt")
            token = int(sample(self._logits, sampling, generator))
            self._unread = [token]
            if token == end:
                return
            yield token


class Decoder:
    """Tokens to text as they come. (The library's own DecodeStream raises where byte tokens are no valid UTF-8.)

    A token's text depends on those before it: read, the tokens that come before the first. Text is held back while its
    last character may be unfinished, but not for longer than a few tokens.
    """

    def __init__(self, tokenizer: Any, read: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(read[-CONTEXT:])
        self._told = len(self._ids)  # of the ids, those whose text was given

    def step(self, token: int) -> str:
        """The text that the next token adds; empty where that is not known yet."""
        self._ids.append(token)
        known, text = (self._tokenizer.decode(ids) for ids in (self._ids[: self._told], self._ids))
        unfinished = text.endswith("\ufffd") and len(self._ids) - self._told < CONTEXT
        if unfinished or len(text) <= len(known):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return str(text[len(known) :])


def generate_text(
    model: LanguageModel,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    session: Session | None = None,
) -> Iterator[str]:
    """The text that continues a prompt, piece by piece, without the prompt.

    An empty prompt starts a new text. stop: strings at which the text ends; they are not given.
    session: to go on with; a new one by default. Raises ValueError where the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer, so it cannot read or write text")
    from ..data.tokenizer import encode, end_of_text_id

    end = model.config.eos_token_id if model.config.eos_token_id is not None else end_of_text_id(model.tokenizer)
    stop = (stop,) if isinstance(stop, str) else stop
    session = session or Session(model)
    ids = encode(model.tokenizer, prompt)
    if not ids and session.state is None and end is not None:
        ids = [end]
    session.read(ids)
    decoder = Decoder(model.tokenizer, ids)
    held = ""  # text that may still turn out to begin a stop string
    for token in session.write(max_tokens, sampling, end):
        held += decoder.step(token)
        cuts = [found for string in stop if string and (found := held.find(string)) >= 0]
        if cuts:
            yield held[: min(cuts)]
            return
        keep = max((_overlap(held, string) for string in stop), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that begins `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
