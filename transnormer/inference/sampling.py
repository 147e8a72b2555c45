"""From logits to the next token, for many rows at a time and without waiting for the device."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.draw import draw


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the likeliest; the defaults of all others but top_p
    change nothing.

    top_k: among the k likeliest; top_p: among the fewest whose probabilities sum to at least p;
        min_p: among those that are at least so many times as likely as the likeliest.
    repetition_penalty: what the positive logits of tokens that the text holds already are divided
        by, and the negative ones multiplied. bias: token id -> what is added to its logit after
        that; -inf forbids the token. Both need an `Engine`, which remembers the text's tokens.
    seed: what is drawn follows from it; None draws one. Raises ValueError for a number that makes
    no sense.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}, but must be 0 or more")
        # what is larger would not fit the numbers on a device
        if self.temperature > 1e9:
            raise ValueError(f"temperature = {self.temperature:.3g}, but must be at most 1e9")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}, but must be from 0 to 2^63 - 1")
        if self.top_k >= 2**63:
            raise ValueError("top_k must be below 2^63")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}, but must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, but must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}, but must be from 0 to 1")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty}, but must be from 1e-6 to 1e6 "
                "(1: none)"
            )
        for token, value in self.bias.items():
            if value != -math.inf and not abs(value) <= 1e30:
                raise ValueError(
                    f"bias of token {token} = {value}, but must be from -1e30 to 1e30, or -inf"
                )


@dataclass(frozen=True)
class SamplingBatch:
    """How the tokens of S rows are drawn, each row by a `Sampling` of its own, on a device.

    temperature, top_p, min_p: [S, 1] float64. top_k: [S, 1] int64, the largest int64 where it cuts
    nothing off. seed: [S] int64. draws: whether any row's temperature is not 0.
    penalty: [S, 1] float64. held: [S, vocab] bool, the tokens that it lowers; None where no row
    has a penalty.
    bias: [S, vocab] float32, or None.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    draws: bool
    penalty: Tensor | None = None
    held: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> SamplingBatch:
        """Raises ValueError for a sampling that needs an `Engine`."""
        if any(s.repetition_penalty != 1 or s.bias for s in samplings):
            raise ValueError("repetition_penalty and bias need a transnormer.Engine")
        seeds = [secrets.randbits(63) if s.seed is None else s.seed for s in samplings]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            column([s.temperature for s in samplings], torch.float64),
            column([s.top_k or ALL for s in samplings], torch.int64),
            column([s.top_p for s in samplings], torch.float64),
            column([s.min_p for s in samplings], torch.float64),
            torch.tensor(seeds, dtype=torch.int64, device=device),
            draws=any(s.temperature > 0 for s in samplings),
        )


class StepKind(NamedTuple):
    """What the rows of a decoding step ask for beyond the likeliest token: whether any of them is
    drawn, penalised, biased, or asks for log-probabilities. A recorded step is of one kind."""

    draws: bool
    penalises: bool
    biases: bool
    scores: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling], scores: bool = False) -> StepKind:
        return cls(
            any(s.temperature > 0 for s in samplings),
            any(s.repetition_penalty != 1 for s in samplings),
            any(bool(s.bias) for s in samplings),
            scores,
        )


class SlotSampling:
    """How each of N slots draws, and what it read and drew, on a device. A row is written when a
    text joins; a step reads and writes them in place.

    Every tensor has a row more than there are slots. It belongs to none: it takes what a step
    writes for slot -1, which only fills up a batch.

    last: [N + 1] int64, the token that a slot reads next. number: [N + 1] int64, how many tokens it
    has drawn. `held` and `bias`, as in `SamplingBatch`, are allocated when the first text comes
    that needs them.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device):
        self._shape = slots + 1, vocab
        # [N + 1, 4]: last, number, seed, top_k; and temperature, top_p, min_p, penalty
        self._integers = torch.zeros(slots + 1, 4, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(slots + 1, 4, dtype=torch.float64, device=device)
        self.last, self.number = self._integers[:, 0], self._integers[:, 1]
        self.held: Tensor | None = None
        self.bias: Tensor | None = None

    def put_(
        self, slot: int, sampling: Sampling, seed: int, number: int, ids: Sequence[int]
    ) -> None:
        """Write how a slot draws. seed: in the place of the sampling's own. number: how many tokens
        were drawn. ids: the whole text so far; the state has read all of it but the last token."""
        device, s = self.last.device, sampling
        integers = [ids[-1], number, seed, s.top_k or ALL]
        numbers = [s.temperature, s.top_p, s.min_p, s.repetition_penalty]
        self._integers[slot] = torch.tensor(integers, device=device)
        self._numbers[slot] = torch.tensor(numbers, dtype=torch.float64, device=device)
        if s.repetition_penalty != 1:
            if self.held is None:
                self.held = torch.zeros(self._shape, dtype=torch.bool, device=device)
            self.held[slot] = False
            self.held[slot, torch.tensor(ids, device=device)] = True
        if s.bias and self.bias is None:
            self.bias = torch.zeros(self._shape, dtype=torch.float32, device=device)
        if self.bias is not None:
            self.bias[slot] = 0
            where = torch.tensor([*s.bias], dtype=torch.int64, device=device)
            self.bias[slot, where] = torch.tensor(
                [*s.bias.values()], dtype=torch.float32, device=device
            )

    def batch(self, rows: Tensor, kind: StepKind) -> SamplingBatch:
        """How the slots `rows` [S] draw; -1 for none."""
        _, _, seed, top_k = self._integers[rows].unbind(-1)
        temperature, top_p, min_p, penalty = self._numbers[rows][..., None].unbind(-2)
        held = self.held[rows] if kind.penalises and self.held is not None else None
        bias = self.bias[rows] if kind.biases and self.bias is not None else None
        return SamplingBatch(
            temperature, top_k[:, None], top_p, min_p, seed, kind.draws, penalty, held, bias
        )

    def drew_(self, rows: Tensor, tokens: Tensor, kind: StepKind) -> None:
        """Remember the tokens [S] that these slots drew. NOT_FINITE stands for token 0."""
        tokens = tokens.clamp(min=0)
        self.last[rows] = tokens
        self.number[rows] += 1
        if kind.penalises and self.held is not None:
            self.held[rows, tokens] = True


ALL = torch.iinfo(torch.int64).max  # as a top_k: cuts nothing off
NOT_FINITE = -1  # in the place of a token
NOT_FINITE_MESSAGE = (
    "the model's logits are not finite: its weights are damaged, its dtype is too narrow, or the "
    "bias forbids every token"
)


def sample(logits: Tensor, samplings: SamplingBatch, number: Tensor) -> Tensor:
    """Draw a token for every row: logits [S, vocab] -> [S] int64.

    number: [S] int64, how many tokens the row has drawn before. What is drawn follows from the
    row's logits, seed and number alone, not from the rows beside it; and not from the device, but
    for what rounding changes (`ops.draw`).
    NOT_FINITE stands for a token where the row's logits are not finite, however tokens are drawn,
    because the largest of such logits means nothing."""
    finite = logits.isfinite().all(-1)
    if samplings.held is not None:
        assert samplings.penalty is not None
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        penalty = samplings.penalty.to(logits.dtype)
        # A penalty of 1 changes nothing, so what `held` says of rows without one does not matter.
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = lowered.where(samplings.held, logits)
    if samplings.bias is not None:
        logits = logits + samplings.bias
    largest, token = logits.max(-1)
    finite &= largest.isfinite()  # where every token is forbidden
    if samplings.draws:
        filters = (samplings.temperature, samplings.top_k, samplings.top_p, samplings.min_p)
        drawn = draw(logits, *filters, _uniform(samplings.seed, number)[:, None])
        token = drawn.where(samplings.temperature[:, 0] > 0, token)
    return token.where(finite, NOT_FINITE)


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
