"""Loss, perplexity and bits per byte of a text of any length, the state carried from its first
token to its last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..model.language_model import LanguageModel
from ..ops.loss import linear_cross_entropy

# Tokens read at a time. A GPU needs many to be busy; on a CPU many are no faster, and few let a
# progress bar move.
PIECES = {"cuda": 2_048, "cpu": 256}


@dataclass(frozen=True)
class Score:
    """What a model gives a text. nats: the summed cross entropy of `tokens` predicted tokens; of
    the text: bytes, words.

    words counts the ends of lines as WikiText does, so that `word_perplexity` is comparable with
    its literature."""

    nats: float
    tokens: int
    bytes: int
    words: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token; comparable between models of one tokenizer only."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def word_perplexity(self) -> float:
        return _exp(self.nats / self.words)

    def record(self) -> dict[str, float | None]:
        """All of it as plain values; a perplexity that no float can hold is None."""
        names = (
            "tokens",
            "bytes",
            "words",
            "nats",
            "loss",
            "perplexity",
            "bits_per_byte",
            "word_perplexity",
        )
        return {
            name: value if math.isfinite(value := getattr(self, name)) else None for name in names
        }

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.words + other.words,
        )


def score_documents(
    model: LanguageModel,
    texts: Iterable[str],
    *,
    window: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Score, int]:
    """The scores of several texts together, each read from a fresh state as `score_text` does, and
    how many there are.

    progress: called with the bytes of text that are done. Raises ValueError naming the document's
    number, from 1."""
    total, count = Score(0.0, 0, 0, 0), 0
    for count, text in enumerate(texts, start=1):
        before, size = total.bytes, len(text.encode())

        def show(done: int, tokens: int, before: int = before, size: int = size) -> None:
            if progress is not None:
                progress(before + size * done // tokens)

        try:
            total += score_text(model, text, window=window, progress=show)
        except ValueError as error:
            raise ValueError(f"document {count}: {error}") from error
    return total, count


def score_text(
    model: LanguageModel,
    text: str,
    *,
    piece: int | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score one text. Raises ValueError for an empty one, for a model without tokenizer and where
    the loss is not finite.

    Where the tokenizer has an end-of-text token, the text follows one, as documents did in
    training, so that its first token counts; else the first token is not predicted. piece, window,
    progress: as in `score_ids`."""
    if model.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer, so it cannot read text")
    from ..data.tokenizer import encode, end_of_text_id

    if not text.strip():
        raise ValueError("the text is empty")
    ids = encode(model.tokenizer, text)
    start = end_of_text_id(model.tokenizer)
    nats = score_ids(
        model,
        ids if start is None else [start, *ids],
        piece=piece,
        window=window,
        progress=progress,
    )
    if not math.isfinite(nats):
        raise ValueError(
            f"the model's loss on the text is {nats}: its weights, or this dtype, are of no use"
        )
    words = len(text.split()) + text.count("\n")
    return Score(nats, len(ids) - (start is None), len(text.encode()), words)


@torch.inference_mode()
def score_ids(
    model: LanguageModel,
    ids: Sequence[int],
    *,
    piece: int | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Summed cross entropy in nats of ids[1:], each given all before it.

    piece: how many tokens are read at a time, of which the sum does not depend; by default PIECES'
        for the device.
    window: read at most so many tokens from a fresh state, then the next so many; each but the
        first token of all is still predicted once, and the last window is filled with tokens that
        an earlier one predicted. This is how lm-evaluation-harness cuts long texts. Softmax
        attention's time for a text of T tokens then grows as T, not T^2.
    progress: called with (tokens done, tokens in all), at first with 0 done.
    """
    if len(ids) < 2:
        raise ValueError("a text of one token leaves nothing to predict")
    if window is not None and window < 1:
        raise ValueError(f"window must be 1 or more; got {window}")
    piece = piece or PIECES["cuda" if model.device.type == "cuda" else "cpu"]
    row = torch.tensor([list(ids)], device=model.device)
    count = row.shape[1] - 1  # of predictions
    window = min(window or count, count)
    total, done = 0.0, 0
    for end in [*range(window, count, window), count]:
        state = None
        for start in range(end - window, end, piece):
            if progress is not None:
                progress(done, count)
            stop = min(start + piece, end)
            x, state = model.hidden(row[:, start:stop], state)
            new = max(start, done)  # those before were predicted by the window before
            targets = row[:, new + 1 : stop + 1]
            if new < stop:
                loss = linear_cross_entropy(
                    x[:, new - start :], model.head_weight, targets, reduction="sum"
                )
                total, done = total + loss.item(), stop
    if progress is not None:
        progress(count, count)
    return total


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
