"""Log-probabilities of continuations after their contexts. Requests are packed without padding, and
what several of them begin with (a question before its answers, examples before the questions) is
read once; each goes on from its state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from ..inference.prefixes import count_alike
from ..model.language_model import LanguageModel
from ..model.state import State
from ..ops.loss import SLICE_ELEMENTS

SHARED = 16  # tokens that requests must begin with alike for it to be worth a stop and a state
STATE_BYTES = 2**31  # of the states of one batch


@dataclass(eq=False)
class Request:
    """tokens: int64 [n], prompt and continuation; those from `first` on are scored."""

    number: int
    tokens: np.ndarray
    first: int


@dataclass(eq=False)
class _Piece:
    """Tokens to read in one go, the same in one or more requests, and what goes on after them.

    start: how many tokens of the requests come before. spans: (request, from, to): positions in
    the request's tokens, all in this piece, each of which predicts the next token, a scored one.
    state: after what comes before; None at the start."""

    start: int
    tokens: np.ndarray
    spans: list[tuple[Request, int, int]]
    children: list[_Piece] = field(default_factory=list)
    state: State | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


@torch.inference_mode()
def score_requests(
    model: LanguageModel,
    requests: Sequence[Request],
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Per request, numbered in order: the log-probability of its scored tokens in nats, and whether
    greedy decoding writes them.

    batch_tokens: how many are read at a time. progress: called with (tokens read, tokens in all).
    Raises ValueError where a score is not finite."""
    scores, greedy = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    # a stack: depth first, so that few states are alive at a time
    waiting = _tree(requests, batch_tokens)[::-1]
    done, total = 0, _size(waiting)
    while waiting:
        batch = _take(waiting, batch_tokens, model)
        bounds = np.cumsum([0, *(len(piece.tokens) for piece in batch)])
        ids = torch.from_numpy(np.concatenate([piece.tokens for piece in batch]))[None]
        x, states = model.hidden(
            ids.to(model.device),
            _stacked(model, [piece.state for piece in batch]),
            cu_seqlens=torch.from_numpy(bounds).to(model.device),
        )
        _score(model, x[0], batch, bounds, scores, greedy)
        for row, piece in enumerate(batch):
            piece.state = None
            after = states.select([row]) if piece.children else None
            for child in piece.children[::-1]:
                child.state = after
                waiting.append(child)
        done += ids.shape[1]
        if progress is not None:
            progress(done, total)
    if not np.isfinite(scores).all():
        raise ValueError(
            "a score is not a finite number: the model's weights may be damaged or diverged"
        )
    return list(zip(scores.tolist(), greedy.tolist(), strict=True))


def _take(waiting: list[_Piece], batch_tokens: int, model: LanguageModel) -> list[_Piece]:
    """The pieces to read together, off the end of the list: at least one."""
    batch = [waiting.pop()]
    tokens, longest = len(batch[0].tokens), batch[0].stop
    while waiting:
        tokens, longest = tokens + len(waiting[-1].tokens), max(longest, waiting[-1].stop)
        state = model.config.state_bytes(longest, model.head_weight.element_size())
        if tokens > batch_tokens or (len(batch) + 1) * state > STATE_BYTES:
            break
        batch.append(waiting.pop())
    return batch


def _score(
    model: LanguageModel,
    x: torch.Tensor,
    batch: list[_Piece],
    bounds: np.ndarray,
    scores: np.ndarray,
    greedy: np.ndarray,
) -> None:
    """Add to scores and greedy [requests] what x [T, D] says; there are logits only where a
    token is scored."""
    places, targets, owners = [], [], []
    for piece, offset in zip(batch, bounds, strict=False):
        for request, start, stop in piece.spans:
            places.append(np.arange(start, stop) + (offset - piece.start))
            targets.append(request.tokens[start + 1 : stop + 1])
            owners.append(np.full(stop - start, request.number))
    if not places:
        return
    place, target, owner = (
        torch.from_numpy(np.concatenate(parts)) for parts in (places, targets, owners)
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    size = max(1, SLICE_ELEMENTS // len(model.head_weight))
    for part in torch.arange(len(place)).split(size):
        wanted = target[part].to(x.device)
        logits = F.linear(x[place[part].to(x.device)], model.head_weight).to(wide)
        found = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)
        np.add.at(scores, owner[part].numpy(), found.double().cpu().numpy())
        np.logical_and.at(greedy, owner[part].numpy(), (logits.argmax(1) == wanted).cpu().numpy())


def _tree(requests: Sequence[Request], longest: int) -> list[_Piece]:
    """What there is to read, in pieces of at most `longest` tokens; the last token of a request is
    only a target."""
    requests = sorted(requests, key=lambda request: request.tokens[:-1].astype(">u4").tobytes())
    read = [request.tokens[:-1] for request in requests]
    lengths = [*map(len, read)]
    alike = [0, *itertools.starmap(count_alike, itertools.pairwise(read))]
    roots: list[_Piece] = []
    waiting = [(0, len(requests), 0, roots)]
    while waiting:
        low, high, start, pieces = waiting.pop()
        while low < high and lengths[low] == start:  # these end here
            low += 1
        for n in range(low + 1, high + 1):
            if n < high and (
                alike[n] - start >= SHARED or alike[n] == lengths[n - 1] == lengths[n]
            ):
                continue
            stop = min([start + longest, lengths[low], *alike[low + 1 : n]])
            spans = [(r, max(start, r.first - 1), stop) for r in requests[low:n] if r.first <= stop]
            pieces.append(_Piece(start, requests[low].tokens[start:stop], spans))
            waiting.append((low, n, stop, pieces[-1].children))
            low = n
    return roots


def _size(pieces: list[_Piece]) -> int:
    """Tokens of the pieces and all that go on from them."""
    waiting, tokens = [*pieces], 0
    while waiting:
        piece = waiting.pop()
        waiting += piece.children
        tokens += len(piece.tokens)
    return tokens


def _stacked(model: LanguageModel, states: Sequence[State | None]) -> State | None:
    """One state with a row each, None standing for a fresh one; None where all are."""
    if not any(states):
        return None
    fresh = State.new(model)
    return State.stack([state or fresh for state in states])
