"""On the GPU, in Triton: what a segment's tokens leave of a state at one of its ends, the sum that
contexts exchange."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import INTERPRETED, launch

CHUNK = 64  # tokens a step
SLICE = 64  # columns of b a program has
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit(do_not_specialize=["T", "H", "part", "parts"])
def sum_kernel(
    a, b, sums, log_decay, window, a_b, a_t, a_h, a_k, b_b, b_t, b_h, b_v, T, H, part, parts,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    WINDOWED: tl.constexpr, TO_END: tl.constexpr,
):  # fmt: skip
    """One program for `part` tokens of a row and head and BV columns; sums: [parts, B, H, K, V]
    contiguous.

    A token weighs lambda^(T-1-t) TO_END, else lambda^(t+1). Far ones, where that is zero, are
    passed over."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % SLICES * BV
    n = tl.program_id(0) // SLICES % parts
    rest = tl.program_id(0) // SLICES // parts
    row = (rest // H).to(tl.int64)
    head = (rest % H).to(tl.int64)
    rate = tl.load(log_decay + head).to(tl.float32)
    # `decay.STRONGEST`: -inf times 0 tokens would be NaN
    rate = tl.where(rate < -1000.0, -1000.0, rate)
    reach = (104.0 / tl.maximum(-rate, 1e-7)).to(tl.int32)  # exp(-104) is zero in float32
    start = n * part
    stop = tl.minimum(start + part, T)
    if WINDOWED:
        start = tl.maximum(start, tl.load(window).to(tl.int32))
        stop = tl.minimum(stop, tl.load(window + 1).to(tl.int32))
    if TO_END:
        start = tl.maximum(start, T - tl.minimum(reach, T))
    else:
        stop = tl.minimum(stop, reach)
    i = tl.arange(0, C)
    k = tl.arange(0, BK)
    v = column + tl.arange(0, BV)
    a += row * a_b + head * a_h
    b += row * b_b + head * b_h
    total = tl.zeros((BK, BV), dtype=tl.float32)
    for m in range(tl.cdiv(tl.maximum(stop - start, 0), C)):
        t = start + m * C + i
        wide = t.to(tl.int64)[:, None]
        inside = (t < stop)[:, None]
        ac = tl.load(a + wide * a_t + k[None, :] * a_k, mask=inside & (k < K)[None, :], other=0.0)
        bc = tl.load(b + wide * b_t + v[None, :] * b_v, mask=inside & (v < V)[None, :], other=0.0)
        away = T - 1 - t if TO_END else t + 1
        weight = tl.exp(rate * tl.maximum(away, 0))
        bc = (bc.to(tl.float32) * weight[:, None]).to(b.dtype.element_ty)
        if _INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
            ac = ac.to(tl.float32)
            bc = bc.to(tl.float32)
        total = tl.dot(tl.trans(ac), bc, total, input_precision="ieee")
    sums += ((n.to(tl.int64) * (tl.num_programs(0) // SLICES // parts) + rest) * K) * V
    tl.store(sums + k[:, None] * V + v[None, :], total, mask=(k < K)[:, None] & (v < V)[None, :])


def weighted_sum(
    a: Tensor, b: Tensor, log_decay: Tensor, window: Tensor | None, to_end: bool
) -> Tensor:
    """[B, H, K, V] float32: the sum over the window's tokens of their weight times a_t^T b_t.

    a: [B, T, H, K]; b: [B, T, H, V], any strides; log_decay: [H]; window: [2], first token and one
    past the last."""
    B, T, H, K = a.shape
    V = b.shape[3]
    # narrow half-precision tiles are miscompiled by Triton 3.6
    least = 16 if a.dtype == torch.float32 else 64
    BK, BV = (
        max(least, triton.next_power_of_2(K)),
        min(SLICE, max(least, triton.next_power_of_2(V))),
    )
    slices = -(-V // BV)
    processors = (
        torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 4
    )
    chunks = -(-T // CHUNK)
    part = CHUNK * -(-chunks // max(1, min(chunks // 4, 2 * processors // max(1, B * H * slices))))
    parts = -(-T // part)
    sums = torch.empty((parts, B, H, K, V), dtype=torch.float32, device=a.device)
    if sums.numel():
        kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in (a, b, log_decay))
        wide = None if window is None else (window.dtype, window.data_ptr() % 16 == 0)
        key = (kinds, wide, a.stride(), b.stride(), K, V, BK, BV, to_end)
        arguments = (
            a, b, sums, log_decay, log_decay if window is None else window, *a.stride(),
            *b.stride(), T, H, part, parts,
            K, V, BK, BV, CHUNK, window is not None, to_end,
        )  # fmt: skip
        warps = 8 if BK > 128 else 4
        launch(sum_kernel, a, key, parts * B * H * slices, arguments, warps=warps, stages=2)
    return sums.sum(0)
