"""Rows that are split among processes: each gathers the keys and values of all earlier tokens for
softmax attention, and a few earlier tokens for a short convolution. Backward sums each token's
gradients over the processes.

Keys and values take one exchange of [B, R T, G, K + V] numbers each way; a linear layer exchanges a
state, [B, H, K, V], of each process."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .collectives import all_gather, group_of, reduce_scatter
from .context import Context
from .register import define


def gather_past(x: Tensor, context: Context) -> Tensor:
    """[B, T, ...] of this process' tokens of each row -> [B, (r + 1) T, ...]: the rows up to the
    last token of this process, whose rank is r.

    T is alike on all processes, and all of them call it. The own tokens are part of the result so
    that every process needs it: a compiler would drop the exchange from the first process, which
    needs nothing of the others, and these would wait for it."""
    return _gather_past(x, context.rank, context.ranks, context.group)  # type: ignore[no-any-return]


def _forward(x: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    everybody = x.new_empty(ranks, *x.shape)
    all_gather(everybody.view(-1), x.contiguous().view(-1), group=group_of(group))
    return everybody[: rank + 1].movedim(0, 1).flatten(1, 2)


def _backward(gradient: Tensor, rank: int, ranks: int, group: str) -> Tensor:
    """The sum over all processes of what they pass on to this one's tokens; summed in float32 at
    least."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = gradient.unflatten(1, (rank + 1, -1)).movedim(1, 0).to(wide)
    parts = torch.cat([parts, parts.new_zeros(ranks - rank - 1, *parts.shape[1:])])
    mine = torch.empty_like(parts[0])
    reduce_scatter(mine.view(-1), parts.view(-1), group=group_of(group))
    return mine.to(gradient.dtype)


def _fake_forward(x, rank, ranks, group):
    return x.new_empty(x.shape[0], (rank + 1) * x.shape[1], *x.shape[2:])


def _fake_backward(gradient, rank, ranks, group):
    length = gradient.shape[1] // (rank + 1)
    return gradient.new_empty(gradient.shape[0], length, *gradient.shape[2:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_past_backward(gradient, *ctx.rest), None, None, None


_gather_past_backward = define(
    "gather_past_backward",
    "(Tensor gradient, int rank, int ranks, str group) -> Tensor",
    _backward,
    _fake_backward,
)
_gather_past = define(
    "gather_past",
    "(Tensor x, int rank, int ranks, str group) -> Tensor",
    _forward,
    _fake_forward,
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
)


def previous_end(x: Tensor, length: int, context: Context) -> Tensor:
    """[B, length, ...]: the last tokens of each row's part x [B, T, ...] that the process before
    this one holds; zeros on the first.

    T is alike on all processes, and all of them call it. Raises ValueError where T is less."""
    if x.shape[1] < length:
        raise ValueError(
            f"a short convolution reads {length} earlier tokens, so each process must hold as many "
            f"of a row; got {x.shape[1]}"
        )
    return _neighbour(x[:, x.shape[1] - length :], -1, context.rank, context.ranks, context.group)  # type: ignore[no-any-return]


def _from_neighbour(x: Tensor, side: int, rank: int, ranks: int, group: str) -> Tensor:
    """x of the process that stands at this side, -1 or 1; zeros where none does."""
    everybody = x.new_empty(ranks, *x.shape)
    all_gather(everybody.view(-1), x.contiguous().view(-1), group=group_of(group))
    inside = 0 <= rank + side < ranks
    return everybody[rank + side].clone() if inside else torch.zeros_like(everybody[0])


def _save_neighbour(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.side, *ctx.rest = inputs


def _differentiate_neighbour(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _neighbour(gradient, -ctx.side, *ctx.rest), None, None, None, None


_neighbour = define(
    "from_neighbour",
    "(Tensor x, int side, int rank, int ranks, str group) -> Tensor",
    _from_neighbour,
    lambda x, *_: x.new_empty(x.shape),
    save_for_backward=_save_neighbour,
    differentiate=_differentiate_neighbour,
)
