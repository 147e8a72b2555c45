"""Rows that are split among processes, gathered whole in each: softmax attention needs the keys and
values of all earlier tokens. Backward sums each token's gradients over the processes.

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


def gather_rows(x: Tensor, context: Context) -> Tensor:
    """[B, T, ...] of this process' tokens of each row -> [B, R T, ...], the whole rows.

    T is alike on all R processes, and all of them call it."""
    return _gather_rows(x, context.ranks, context.group)  # type: ignore[no-any-return]


def _forward(x: Tensor, ranks: int, group: str) -> Tensor:
    everybody = x.new_empty(ranks, *x.shape)
    all_gather(everybody.view(-1), x.contiguous().view(-1), group=group_of(group))
    return everybody.movedim(0, 1).flatten(1, 2)


def _backward(gradient: Tensor, ranks: int, group: str) -> Tensor:
    """The sum over all processes of what they pass on to this one's tokens; summed in float32 at
    least."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    parts = gradient.unflatten(1, (ranks, -1)).movedim(1, 0).to(wide).contiguous()
    mine = torch.empty_like(parts[0])
    reduce_scatter(mine.view(-1), parts.view(-1), group=group_of(group))
    return mine.to(gradient.dtype)


def _fake_forward(x, ranks, group):
    return x.new_empty(x.shape[0], ranks * x.shape[1], *x.shape[2:])


def _fake_backward(gradient, ranks, group):
    return gradient.new_empty(gradient.shape[0], gradient.shape[1] // ranks, *gradient.shape[2:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _gather_rows_backward(gradient, *ctx.rest), None, None


_gather_rows_backward = define(
    "gather_rows_backward", "(Tensor gradient, int ranks, str group) -> Tensor", _backward,
    _fake_backward,
)  # fmt: skip
_gather_rows = define(
    "gather_rows",
    "(Tensor x, int ranks, str group) -> Tensor",
    _forward,
    _fake_forward,
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
)
