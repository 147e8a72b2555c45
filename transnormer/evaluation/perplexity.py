"""Loss, perplexity and bits per byte of a text of any length, the state carried from its first token to its last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..model.language_model import LanguageModel
from ..ops.loss import linear_cross_entropy


@dataclass(frozen=True)
class Score:
    """What a model gives a text. nats: the summed cross entropy of `tokens` predicted tokens; of the text: bytes, words.

    words counts the ends of lines as WikiText does, so that `word_perplexity` is comparable with its literature.
    """

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

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes, self.words + other.words
        )


def score_text(
    model: LanguageModel, text: str, *, piece: int = 2_048, progress: Callable[[int, int], None] | None = None
) -> Score:
    """Score one text. Raises ValueError for an empty one and for a model without tokenizer.

    Where the tokenizer has an end-of-text token, the text follows one, as documents did in training, so that its
    first token counts; else the first token is not predicted. progress: called with (tokens done, tokens in all).
    """
    if model.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer, so it cannot read text")
    from ..data.tokenizer import encode, end_of_text_id

    if not text.strip():
        raise ValueError("the text is empty")
    ids = encode(model.tokenizer, text)
    start = end_of_text_id(model.tokenizer)
    nats = score_ids(model, ids if start is None else [start, *ids], piece=piece, progress=progress)
    words = len(text.split()) + text.count("\n")
    return Score(nats, len(ids) - (start is None), len(text.encode()), words)


@torch.inference_mode()
def score_ids(
    model: LanguageModel, ids: Sequence[int], *, piece: int = 2_048, progress: Callable[[int, int], None] | None = None
) -> float:
    """Summed cross entropy in nats of ids[1:], each given all before it, read `piece` tokens at a time."""
    if len(ids) < 2:
        raise ValueError("a text of one token leaves nothing to predict")
    row = torch.tensor([list(ids)], device=model.device)
    total, state = 0.0, None
    for start in range(0, row.shape[1] - 1, piece):
        inputs, targets = row[:, start : start + piece], row[:, start + 1 : start + piece + 1]
        x, state = model.hidden(inputs[:, : targets.shape[1]], state)
        total += linear_cross_entropy(x, model.head_weight, targets, reduction="sum").item()
        if progress is not None:
            progress(min(start + piece, row.shape[1] - 1), row.shape[1] - 1)
    return total


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
