"""Gated Linear Attention between its projections on the GPU: the kernels of its parts, and no
copies between them.

Written part by part, autograd would stack the four gradients anew where the projection wants one
tensor: 8 units of [B, T, H, V] through memory, and 6 more for the swish. Here every kernel writes
its gradient in its place, that of the attention through the swish: 2 units."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lightning_triton, norm_triton
from .launch_triton import launch
from .register import define_backward, differentiable

BLOCK = 2_048  # numbers a program


@triton.jit
def swish_kernel(qkvu, q, k, numel, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """q and k, contiguous with `numel` elements each, from the first two HEAD columns of every
    four."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # of a numel that 16 divides, as it is specialized for: loads are then as wide as can be
    mask = at < numel
    place = at // HEAD * (4 * HEAD) + at % HEAD
    x = tl.load(qkvu + place, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(qkvu + place + HEAD, mask=mask, other=0.0).to(tl.float32)
    tl.store(q + at, (x * tl.sigmoid(x)).to(q.dtype.element_ty), mask=mask)
    tl.store(k + at, (y * tl.sigmoid(y)).to(k.dtype.element_ty), mask=mask)


def forward(
    qkvu: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y [B, T, H V], last state) and for the backward swish(q), swish(k), and what the norm
    read."""
    B, T, H, _, V = qkvu.shape
    q, k = (qkvu.new_empty(B, T, H, V) for _ in range(2))
    if q.numel():
        key = (qkvu.dtype, V, qkvu.data_ptr() % 16 == 0, q.numel() % 16 == 0, q.numel() < 2**31)
        arguments = (qkvu, q, k, q.numel(), V, BLOCK)
        launch(swish_kernel, qkvu, key, -(-q.numel() // BLOCK), arguments, warps=8)
    mixed, last = lightning_triton.forward(q, k, qkvu[..., 2, :], log_decay, state, cu_seqlens)
    y = norm_triton.forward(mixed.view(B, T, H * V), None, qkvu[..., 3, :], eps, qkvu.dtype)[1]
    return y, last, q, k, mixed


def backward(
    qkvu: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, eps: float,
    q: Tensor, k: Tensor, mixed: Tensor, dy: Tensor, d_last: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of qkvu and of the incoming state (empty where there was none)."""
    B, T, H, _, V = qkvu.shape
    gradient = torch.empty_like(qkvu)
    flat = mixed.view(B, T, H * V)
    d_mixed = norm_triton.backward(flat, qkvu[..., 3, :], dy, None, eps, into=gradient[..., 3, :])[
        0
    ]
    d_state = lightning_triton.backward(
        q, k, qkvu[..., 2, :], log_decay, state, cu_seqlens, d_mixed.view(B, T, H, V), d_last,
        into=gradient.unbind(3)[:3], raw=qkvu.unbind(3)[:2],
    )[3]  # fmt: skip
    return gradient, d_state


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    qkvu, log_decay, state, cu_seqlens, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkvu, log_decay, state, cu_seqlens, *output[2:])


def _differentiate(ctx, dy, d_last, *_):  # type: ignore[no-untyped-def]
    qkvu, log_decay, state, cu_seqlens, q, k, mixed = ctx.saved_tensors
    if dy is None:
        dy = qkvu.new_zeros(*mixed.shape[:2], mixed.shape[2] * mixed.shape[3])
    gradient, d_state = _backward(
        qkvu, log_decay, state, cu_seqlens, ctx.eps, q, k, mixed, dy, d_last
    )
    return gradient, None, None if state is None else d_state.to(state.dtype), None, None


def _fake(qkvu, log_decay, state, cu_seqlens, eps):  # type: ignore[no-untyped-def]
    B, T, H, _, V = qkvu.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = qkvu.new_empty((sequences, H, V, V), dtype=torch.float32)
    return qkvu.new_empty(B, T, H * V), last, *(qkvu.new_empty(B, T, H, V) for _ in range(3))


def _fake_backward(qkvu, log_decay, state, cu_seqlens, eps, q, k, mixed, dy, d_last):  # type: ignore[no-untyped-def]
    d_state = qkvu.new_empty((0,) if state is None else state.shape, dtype=torch.float32)
    return torch.empty_like(qkvu), d_state


_INPUTS = "Tensor qkvu, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, float eps"
_backward = define_backward(
    "gla_triton_backward",
    f"({_INPUTS}, Tensor q, Tensor k, Tensor mixed, Tensor dy, Tensor? d_last) -> (Tensor, Tensor)",
    backward, _fake_backward, "gated_linear_attention",
    "those of lightning_attention with backend='reference'",
)  # fmt: skip
attend = differentiable(
    "gla_triton", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    forward, _fake, _save_for_backward, _differentiate,
)  # fmt: skip
