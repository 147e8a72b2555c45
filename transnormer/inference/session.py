"""One text, read and written alone: its prompt in pieces, then token by token from the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..data.tokenizer import encode, end_of_text_id
from ..model.language_model import LanguageModel
from ..model.slots import Slots
from ..model.state import State
from .sampling import NOT_FINITE, NOT_FINITE_MESSAGE, Sampling, SamplingBatch, sample
from .text import Decoder, check_stop, until_stop

PIECE = 2_048  # tokens read at a time: bounds the memory of a long prompt
# The least capacity of a session's slot, in tokens. A full slot is replaced by one twice as large.
LEAST_CAPACITY = 256

NO_TOKENIZER = "the model's folder has no tokenizer, so it cannot read or write text"

Progress = Callable[[int, int], None]  # (tokens read, tokens to read in all)


class Session:
    """One text being read and written. It holds the state, and the tokens that the state has not
    read yet.

    Time and memory of a token do not depend on how long the text is (with a linear mixer). Text is
    read by forward passes and written by steps in place, in a slot that the session owns.
    """

    def __init__(self, model: LanguageModel, state: State | None = None):
        self.model, self._state = model, state
        # While text is written the state is in `_slot`. It has read `_held` tokens in all, of which
        # `_stepped` are those since `_state`.
        self._slot: Slots | None = None
        self._held, self._stepped = 0, list[int]()
        self._logits: Tensor | None = None  # [1, vocab], after the last token read
        self._unread: list[int] = []

    @property
    def state(self) -> State | None:
        """The state after what was read, which nothing writes to afterwards; None before."""
        if self._slot is not None:
            return self._slot.read(self.model, [0])
        return self._state

    def fork(self) -> Session:
        """Another session that goes on from here. Neither changes the other."""
        fork = Session(self.model, self.state)
        fork._logits, fork._unread = self._logits, self._unread
        return fork

    @torch.inference_mode()
    def read(self, ids: Sequence[int], progress: Progress | None = None) -> None:
        """Take in tokens. progress: called after each PIECE of them.

        Raises ValueError for an id outside the vocabulary, before any is read.
        """
        ids = [*self._unread, *ids]
        size = self.model.config.vocab_size
        if any(not 0 <= token < size for token in ids):
            raise ValueError(f"a token id is outside the model's vocabulary of {size:,}")
        for start in range(0, len(ids), PIECE):
            stop = start + PIECE
            piece = torch.tensor([ids[start:stop]], device=self.model.device)
            x, state = self.model.hidden(piece, self.state)
            logits = torch.nn.functional.linear(x[:, -1], self.model.head_weight)
            self._state, self._slot = state, None
            self._logits, self._unread = logits, ids[stop:]
            if progress is not None:
                progress(min(stop, len(ids)), len(ids))

    def write(
        self, max_tokens: int, sampling: Sampling | None = None, end: int | None = None
    ) -> Iterator[int]:
        """Draw at most max_tokens tokens, until `end`, which is not yielded; the next read begins
        with it.

        Raises ValueError at once for a negative max_tokens, and while drawing where nothing was
        read yet or the logits are not finite."""
        if max_tokens < 0:
            raise ValueError(f"max_tokens = {max_tokens}, but must be 0 or more")
        return self._write(max_tokens, sampling or Sampling(), end)

    @torch.inference_mode()
    def _write(self, max_tokens: int, sampling: Sampling, end: int | None) -> Iterator[int]:
        samplings = SamplingBatch.of([sampling], self.model.device)
        number = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        for _ in range(max_tokens):
            if len(self._unread) == 1 and self._state is not None:
                self._step(self._unread[0])
            elif self._unread:
                self.read([])
            if self._logits is None:
                raise ValueError("nothing was read yet: give a prompt")
            token = int(sample(self._logits, samplings, number))
            if token == NOT_FINITE:
                raise ValueError(NOT_FINITE_MESSAGE)
            number += 1
            self._unread = [token]
            if token == end:
                return
            yield token

    def _step(self, token: int) -> None:
        """Take in one token, in place."""
        if self._slot is None or self._held == self._slot.capacity:
            state = self.state
            assert state is not None
            self._held = int(state.seen[0])
            slot = Slots.new(self.model, 1, max(2 * self._held, LEAST_CAPACITY))
            slot.write_(self.model, [0], state)
            self._state, self._slot, self._stepped = state, slot, []
        ids = torch.tensor([[token]], device=self.model.device)
        try:
            self._logits = self.model.step_(ids, self._slot)[:, -1]
        except BaseException:
            # Some layers may have moved on, so all since the last whole state is read anew.
            self._slot, self._unread = None, [*self._stepped, token]
            raise
        self._held += 1
        self._stepped.append(token)
        self._unread = []


def end_token(model: LanguageModel) -> int | None:
    """The id at which the model ends what it writes: the config's, else the tokenizer's, or
    None."""
    if model.config.eos_token_id is not None or model.tokenizer is None:
        return model.config.eos_token_id
    return end_of_text_id(model.tokenizer)


def generate_text(
    model: LanguageModel,
    prompt: str,
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    session: Session | None = None,
    progress: Progress | None = None,
) -> Iterator[str]:
    """The text that continues a prompt, piece by piece, without the prompt.

    An empty prompt starts a new text. stop: strings at which the text ends; they are not given.
    session: to go on with; a new one by default. progress: see `Session.read`.
    Raises ValueError at once where the model has no tokenizer, max_tokens is negative or a stop
    string is empty.
    """
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    stop = check_stop(stop)
    session, end = session or Session(model), end_token(model)
    ids = encode(model.tokenizer, prompt)
    if not ids and session.state is None and end is not None:
        ids = [end]
    tokens = session.write(max_tokens, sampling, end)

    def pieces() -> Iterator[str]:
        session.read(ids, progress)
        yield from until_stop(Decoder(model.tokenizer, ids).stream(tokens), stop)

    return pieces()
