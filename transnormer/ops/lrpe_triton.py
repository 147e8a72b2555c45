"""Swish and LRPE on the GPU, in Triton: q and k are read once, what doubles their width is written
once.

With a = swish(x), c = cos(theta t), s = sin(theta t):  y = [a c, a s]  and, from the
gradients dc and ds of its halves,

    dx = (dc c + ds s) swish'(x)        dtheta = sum over rows and tokens of t a (ds c - dc s)

Angles are taken modulo a turn exactly, computed again in backward, and shared by q and k. dtheta is
summed by every program over its own tokens, then over programs in float64, in one order: repeats
are bit-equal."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .register import define_backward, differentiable

TOKENS = 16  # a program


@triton.jit
def _angles(positions, theta, row, head, t, c, p_b, p_t, T, K: tl.constexpr):
    """(cosines, sines, positions in float32) of [TOKENS, BLOCK] places.

    A token's angle in turns is a 64-bit integer, 2^64 a whole turn, so that a position's multiple
    wraps around by itself. That is exact where float32 is off by whole turns, and much cheaper than
    float64."""
    place = tl.load(positions + row * p_b + t * p_t, mask=t < T, other=0).to(tl.int64)
    turns = (
        tl.load(theta + head * K + c, mask=c < K, other=0.0).to(tl.float64) * 0.15915494309189535
    )
    # 2^62, which an int64 holds
    step = ((turns - tl.floor(turns)) * 4611686018427387904.0).to(tl.int64) << 2
    # of a turn, -4 to 4: the upper 32 bits
    eighths = ((place * step) >> 32).to(tl.float32) * 1.862645149230957e-09
    quarter = tl.floor(eighths * 0.5 + 0.5)  # nearest, -2 to 2
    x = (eighths - 2 * quarter) * 0.7853981633974483  # radians from there, -pi/4 to pi/4
    y = x * x
    sine = x + x * y * (-1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6)))
    cosine = 1 + y * (-0.5 + y * (4.1666667e-2 + y * (-1.3888889e-3 + y * 2.4801587e-5)))
    turned = quarter.to(tl.int32)
    swapped = turned % 2 != 0
    first = tl.where(swapped, sine, cosine)
    second = tl.where(swapped, cosine, sine)
    back = (turned == 1) | (turned == 2) | (turned == -2)
    down = (turned == -1) | (turned == 2) | (turned == -2)
    return tl.where(back, -first, first), tl.where(down, -second, second), place.to(tl.float32)


@triton.jit
def _turn(x, y, at, to, mask, cosine, sine, K: tl.constexpr):
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    active = wide * tl.sigmoid(wide)
    tl.store(y + to, (active * cosine).to(y.dtype.element_ty), mask=mask)
    tl.store(y + to + K, (active * sine).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _turn_back(x, dy, dx, at, d_at, to, mask, cosine, sine, dy_c, K: tl.constexpr):
    """Writes dx; returns a (ds c - dc s)."""
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    along = tl.load(dy + d_at, mask=mask, other=0.0).to(tl.float32)
    across = tl.load(dy + d_at + K * dy_c, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(wide)
    slope = share * (1 + wide * (1 - share))
    tl.store(dx + to, ((along * cosine + across * sine) * slope).to(dx.dtype.element_ty), mask=mask)
    return wide * share * (across * cosine - along * sine)


@triton.jit
def _place(T, H, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, head and block of tokens, then its tokens [TOKENS, 1] and columns [1,
    BLOCK].

    Neighbouring programs have neighbouring heads.
    """
    head = tl.program_id(0) % H
    rest = tl.program_id(0) // H
    blocks = tl.cdiv(T, TOKENS)
    t = rest % blocks * TOKENS + tl.arange(0, TOKENS).to(tl.int64)[:, None]
    return (rest // blocks).to(tl.int64), head.to(tl.int64), rest, t, tl.arange(0, BLOCK)[None, :]


@triton.jit(do_not_specialize=["T", "H"])
def lrpe_kernel(
    q, k, theta, positions, q_out, k_out, q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, p_b, p_t, T, H,
    K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """q_out and k_out are contiguous [B, T, H, 2 K]."""
    row, head, _, t, c = _place(T, H, TOKENS, BLOCK)
    mask = (t < T) & (c < K)
    cosine, sine, _ = _angles(positions, theta, row, head, t, c, p_b, p_t, T, K)
    to = ((row * T + t) * H + head) * (2 * K) + c
    _turn(q, q_out, row * q_b + t * q_t + head * q_h + c * q_c, to, mask, cosine, sine, K)
    _turn(k, k_out, row * k_b + t * k_t + head * k_h + c * k_c, to, mask, cosine, sine, K)


@triton.jit(do_not_specialize=["T", "H"])
def lrpe_backward_kernel(
    q, k, theta, positions, d_q_out, d_k_out, dq, dk, d_theta,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, g_b, g_t, g_h, g_c, e_b, e_t, e_h, e_c, p_b, p_t, T, H,
    K: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dq and dk are contiguous [B, T, H, K], d_theta [programs / H, H, K] in float32. g, e:
    gradients of the results."""
    row, head, block, t, c = _place(T, H, TOKENS, BLOCK)
    mask = (t < T) & (c < K)
    cosine, sine, place = _angles(positions, theta, row, head, t, c, p_b, p_t, T, K)
    to = ((row * T + t) * H + head) * K + c
    at, d_at = (
        row * q_b + t * q_t + head * q_h + c * q_c,
        row * g_b + t * g_t + head * g_h + c * g_c,
    )
    turned = _turn_back(q, d_q_out, dq, at, d_at, to, mask, cosine, sine, g_c, K)
    at, d_at = (
        row * k_b + t * k_t + head * k_h + c * k_c,
        row * e_b + t * e_t + head * e_h + c * e_c,
    )
    turned += _turn_back(k, d_k_out, dk, at, d_at, to, mask, cosine, sine, e_c, K)
    total = tl.sum(tl.where(mask, turned * place, 0.0), axis=0)[None, :]
    tl.store(d_theta + (block.to(tl.int64) * H + head) * K + c, total, mask=c < K)


def _launch(
    kernel: Any, q: Tensor, tensors: Sequence[Tensor], strided: Sequence[Tensor], positions: Tensor
) -> None:
    B, T, H, K = q.shape
    strides = [s for x in strided for s in x.stride()]
    strides += [positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1)]
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    arguments = (*tensors, *strides, T, H, K, triton.next_power_of_2(K), TOKENS)
    launch(kernel, q, (kinds, *strides, K), B * -(-T // TOKENS) * H, arguments, warps=4)


def forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    q_out, k_out = q.new_empty(B, T, H, 2 * K), k.new_empty(B, T, H, 2 * K)
    if q.numel():
        _launch(
            lrpe_kernel, q, (q, k, theta.contiguous(), positions, q_out, k_out), (q, k), positions
        )
    return q_out, k_out


def backward(
    q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, d_q_out: Tensor, d_k_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and theta."""
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    B, T, H, K = q.shape
    d_theta = torch.empty(B * -(-T // TOKENS), H, K, dtype=torch.float32, device=q.device)
    if q.numel():
        tensors = (q, k, theta.contiguous(), positions, d_q_out, d_k_out, dq, dk, d_theta)
        _launch(lrpe_backward_kernel, q, tensors, (q, k, d_q_out, d_k_out), positions)
    return dq, dk, d_theta.sum(0, dtype=torch.float64).to(theta.dtype)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, *gradients):  # type: ignore[no-untyped-def]
    return *_backward(*ctx.saved_tensors, *gradients), None


def _fake(q, k, theta, positions):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], 2 * q.shape[3]), k.new_empty(*k.shape[:3], 2 * k.shape[3])


def _fake_backward(q, k, theta, positions, d_q_out, d_k_out):  # type: ignore[no-untyped-def]
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    return dq, dk, torch.empty_like(theta, memory_format=torch.contiguous_format)


_backward = define_backward(
    "swish_lrpe_backward",
    "(Tensor q, Tensor k, Tensor theta, Tensor positions, Tensor d_q_out, Tensor d_k_out)"
    " -> (Tensor, Tensor, Tensor)",
    backward, _fake_backward, "swish_lrpe", "those of backend='torch'",
)  # fmt: skip
swish_lrpe = differentiable(
    "swish_lrpe", "(Tensor q, Tensor k, Tensor theta, Tensor positions) -> (Tensor, Tensor)",
    forward, _fake, _save_for_backward, _differentiate,
)  # fmt: skip
