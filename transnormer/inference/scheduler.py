"""What is asked of an engine, and what it does next: which request's prompt is read, and which
requests are in slots. Nothing here knows a model or a tensor's content."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from .sampling import Sampling
from .text import Decoder, UntilStop, check_stop

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..model.state import State
    from .prefixes import Prefixes


@dataclass(frozen=True, kw_only=True)
class RequestSettings(Sampling):
    """How a text is written: `Sampling`, and where the text ends.

    max_tokens: how many tokens are written at most; 0 only reads the prompt, to be forked or saved.
    stop: strings before which the text ends. stop_ids: tokens that end it; None: the model's
        end-of-text token.
    logprobs: whether the log-probability of each token is kept. It is the model's own: before
        temperature, penalty, bias and filters.
    keep: whether the state is kept after the end, outside of the slots, so that the request can be
        forked or saved. It is freed with the handle.
    Raises ValueError for a setting that makes no sense."""

    max_tokens: int = 256
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] | None = None
    logprobs: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens = {self.max_tokens}, but must be 0 or more")
        check_stop(self.stop)


@dataclass(frozen=True)
class Result:
    """What came of a request.

    text: what was written, without the prompt and up to a stop string; empty without a tokenizer.
    tokens: all that were written, with those of the stop string or the token that ended the text.
    finish_reason: "stop", "length", "cancelled" or "error", which `error` explains.
    logprobs: the log-probability of each token in nats, where the settings ask for it, else None.
    """

    id: str | int
    text: str
    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    error: str | None = None


@dataclass(eq=False)
class Request:
    """One text that is read and written.

    ids: the whole text, prompt and what was written so far; what is written begins at `first`.
    ends: the tokens that end it. tokenizer: None where there is none; the text is then empty.
    read: how many of ids the state has read; all but the last while the text is written.
    slot: where the state is while the text is written; else None.
    state: after `read` tokens, outside of the slots; None: nothing was read, or it is in a slot.
    begun: whether it has begun to read, from a stored state or from the start. counted: whether the
        store of prefixes has counted it.
    keep_at, branch: how many tokens are read when the state is put into the store of prefixes, as
        the caller says, and where the text parts from another one (0: nowhere).
    logprobs: of the tokens written, in nats, where the settings ask for them.
    finish_reason: None until the end; then "stop" (a stop string, or a token of `ends`), "length",
        "cancelled" or "error", which `error` explains.
    """

    id: str | int
    settings: RequestSettings
    ids: list[int]
    first: int
    ends: frozenset[int]
    tokenizer: Tokenizer | None = None
    read: int = 0
    slot: int | None = None
    state: State | None = None
    begun: bool = False
    counted: bool = False
    keep_at: Sequence[int] = ()
    branch: int = 0
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""
    _decoder: Decoder | None = None

    def __post_init__(self) -> None:
        given = self.settings.seed
        self.seed = secrets.randbits(63) if given is None else given
        self._until = UntilStop(check_stop(self.settings.stop))
        self._decoded, self._whole = self.first, False

    @property
    def written(self) -> int:
        """How many tokens were written."""
        return len(self.ids) - self.first

    @property
    def unread(self) -> int:
        """Tokens to read before the first can be drawn, but for the last, which a step reads."""
        return len(self.ids) - 1 - self.read

    def take(self, token: int, logprob: float | None = None) -> None:
        """Take in a token that was drawn; afterwards `finish_reason` says whether it is the last.

        Text is decoded here only if it may hold a stop string, because a step waits for it."""
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        self._judge(token)

    def _judge(self, token: int) -> None:
        if token in self.ends:
            self.finish_reason = "stop"
        elif self.settings.stop:
            self.decode()
        if self.finish_reason is None and self.written >= self.settings.max_tokens:
            self.finish_reason = "length"

    def settle(self) -> None:
        """Finish what an interrupt may have left half done in `take`: each token has its
        log-probability, the last one was judged, and the text is decoded anew."""
        if self.settings.logprobs:
            known = min(self.written, len(self.logprobs))
            del self.ids[self.first + known :], self.logprobs[known:]
        self._decoder, self._until = None, UntilStop(check_stop(self.settings.stop))
        self._decoded, self._whole, self.text = self.first, False, ""
        if self.written and self.finish_reason is None:
            self._judge(self.ids[-1])

    def decode(self) -> str:
        """The text of all tokens so far, as far as it is known."""
        if self.tokenizer is None or self._whole:
            return self.text
        if self._decoder is None:
            self._decoder = Decoder(self.tokenizer, self.ids[: self.first])
        ended = self.finish_reason == "stop" and self.written > 0 and self.ids[-1] in self.ends
        stop = len(self.ids) - ended
        while self._decoded < stop and not self._until.found:
            self.text += self._until.step(self._decoder.step(self.ids[self._decoded]))
            self._decoded += 1
        if self._until.found:
            self.finish_reason, self._whole = "stop", True
        elif self.finish_reason is not None:
            self.text += self._until.step(self._decoder.end()) + self._until.end()
            self._whole = True
        return self.text

    def result(self) -> Result:
        """What came of it, once it has ended."""
        assert self.finish_reason is not None
        logprobs = [*self.logprobs] if self.settings.logprobs else None
        tokens = self.ids[self.first :]
        return Result(self.id, self.decode(), tokens, self.finish_reason, logprobs, self.error)


@dataclass(frozen=True)
class EngineStats:
    """What an engine holds and has done.

    slots, used: how many there are, and in how many a text is written. waiting: requests without a
    slot. state_bytes: of all slots and of the states held beside them. tokens_read, tokens_written:
    since the engine was made. tokens_read counts what forward passes read of prompts: not a
    prompt's last token, which a decoding step reads, and again what is read again. prefix_hits:
    requests that began from a state of the store of prefixes. tokens_saved: those that were not
    read because of it. prefix_states, prefix_bytes: what the store holds now."""

    slots: int
    used: int
    waiting: int
    state_bytes: int
    tokens_read: int
    tokens_written: int
    prefix_hits: int
    tokens_saved: int
    prefix_states: int
    prefix_bytes: int


class Scheduler:
    """Who is in which of N slots, and who waits, in the order of arrival.

    A waiting request is read before it gets a slot, but never more requests than there are free
    slots, so that none waits with a state for long. These take turns.

    piece: how many tokens of prompts a step reads at most. Pieces of a prompt are cut at multiples
        of it, counted from the text's own first token: what else is read beside it changes nothing
        of how it is cut. They are also cut where a state is to be kept in the store of prefixes.
    """

    def __init__(self, slots: int, piece: int, prefixes: Prefixes):
        self.piece, self._slots, self._prefixes = piece, slots, prefixes
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # slot -> request

    @property
    def free(self) -> list[int]:
        """The slots that no request has."""
        return [slot for slot in range(self._slots) if slot not in self.running]

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def next_pieces(self) -> list[tuple[Request, int]]:
        """The requests that read next, each with the place in its ids up to which it does."""
        pieces, left = [], self.piece
        first = [*islice(self.waiting, len(self.free))]
        for request in first:
            if not left:
                break
            self._prefixes.find(request)
            ends = ((request.read // self.piece + 1) * self.piece, request.branch, *request.keep_at)
            stop = min(len(request.ids) - 1, *(end for end in ends if end > request.read))
            if stop - request.read > left:
                break
            self._prefixes.begin(request)
            left -= stop - request.read
            if stop > request.read:
                pieces.append((request, stop))
        # Those that are not done come after the others that may read, so that a short prompt does
        # not wait until a long one was read.
        again = [request for request, stop in pieces if stop < len(request.ids) - 1]
        if again:
            turn = [request for request in first if request not in again] + again
            self.waiting = deque([*turn, *islice(self.waiting, len(first), None)])
        return pieces

    def keep(self, request: Request) -> None:
        """Put a request's state, after the tokens that it has read, into the store of prefixes."""
        assert request.state is not None
        next_ids = (other.ids for other in self.waiting if not other.begun)
        kept = request.ids[: request.read]
        self._prefixes.keep(kept, request.state, islice(next_ids, self._slots))

    def join(self) -> list[Request]:
        """Give slots to the requests that have read their prompts, and say which these are."""
        free = self.free
        ready = [r for r in islice(self.waiting, len(free)) if not r.unread]
        for request, slot in zip(ready, free, strict=False):
            # An interrupt may come between any two lines: none leaves a request nowhere.
            request.slot = slot
            self.running[slot] = request
            self.waiting.remove(request)
        return ready

    def remove(self, request: Request) -> None:
        """Let a request go, wherever it is; its slot is free."""
        if request.slot is not None and self.running.get(request.slot) is request:
            del self.running[request.slot]
        request.slot = None
        if request in self.waiting:
            self.waiting.remove(request)

    def read_again(self) -> None:
        """Send all running requests back to the head of those that wait, because the states in
        their slots are lost. They are read anew; what was written stays."""
        lost = [*self.running.values()]
        for request in lost:
            request.settle()
            request.read, request.state, request.begun = 0, None, False
        self.waiting = deque([*lost, *(r for r in self.waiting if r not in lost)])
        for request in lost:
            request.slot = None
        self.running.clear()
