"""From logits to the next token, for many rows at a time and without waiting for the device."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off.

    top_k: among the k likeliest; top_p: among the fewest whose probabilities sum to at least p.
    seed: what is drawn follows from it; None draws one. Raises ValueError for a number that makes
    no sense.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}, but must be 0 or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}, but must be from 0 to 2^63 - 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}, but must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, but must be above 0 and at most 1")


@dataclass(frozen=True)
class SamplingBatch:
    """How the tokens of S rows are drawn, each row by a `Sampling` of its own, on a device.

    temperature, top_p: [S, 1] float64. top_k: [S, 1] int64, the largest int64 where it cuts nothing
    off. seed: [S] int64. draws: whether any row's temperature is not 0.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    draws: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> SamplingBatch:
        seeds = [secrets.randbits(63) if s.seed is None else s.seed for s in samplings]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            column([s.temperature for s in samplings], torch.float64),
            column([s.top_k or torch.iinfo(torch.int64).max for s in samplings], torch.int64),
            column([s.top_p for s in samplings], torch.float64),
            torch.tensor(seeds, dtype=torch.int64, device=device),
            draws=any(s.temperature > 0 for s in samplings),
        )


NOT_FINITE = -1  # in the place of a token
NOT_FINITE_MESSAGE = (
    "the model's logits are not finite: its weights are damaged, or its dtype is too narrow"
)


def sample(logits: Tensor, samplings: SamplingBatch, number: Tensor) -> Tensor:
    """Draw a token for every row: logits [S, vocab] -> [S] int64.

    number: [S] int64, how many tokens the row has drawn before. What is drawn follows from the
    row's logits, seed and number alone: not from the rows beside it, nor from the device.
    NOT_FINITE stands for a token where the row's logits are not finite, however tokens are drawn,
    because the largest of such logits means nothing."""
    token = logits.argmax(-1)
    if samplings.draws:
        drawn = _draw(logits, samplings, _uniform(samplings.seed, number)[:, None])
        token = drawn.where(samplings.temperature[:, 0] > 0, token)
    return token.where(logits.isfinite().all(-1), NOT_FINITE)


def _draw(logits: Tensor, samplings: SamplingBatch, uniform: Tensor) -> Tensor:
    """The token at which the sum of the probabilities, the largest first, passes `uniform` [S, 1],
    which is from 0 to 1. Sums are in float64, because a vocabulary has many small probabilities."""
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / samplings.temperature.clamp(min=1e-30)
    logits, token = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = logits.softmax(-1).masked_fill(rank >= samplings.top_k, 0)
    sums = probabilities.cumsum(-1)
    # The likeliest is always kept. 1 cuts nothing, whatever rounding makes of the sums.
    cut = (sums - probabilities >= samplings.top_p * sums[:, -1:]) & (samplings.top_p < 1)
    sums = probabilities.masked_fill(cut, 0).cumsum(-1)
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    return token.gather(-1, place.clamp(max=logits.shape[-1] - 1))[:, 0]


def _uniform(seed: Tensor, number: Tensor) -> Tensor:
    """The `number`-th number that a seed draws, from 0 to 1, float64: the generator splitmix64
    (Steele, Lea and Flood 2014), which needs no memory of the numbers before."""
    mixed = _mix(_mix(seed) + number * _signed(0x9E3779B97F4A7C15))
    # 52 bits, so that a product with a float64 is always smaller than that
    return _shifted(mixed, 12).double() * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits as of an unsigned integer of 64 bits."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >> 63 else x
