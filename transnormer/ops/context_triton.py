"""On the GPU, in Triton: what a segment's tokens leave of a state at one of its ends, the sum that
contexts exchange."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .lightning_walk_triton import NOTHING, PRECISION, STRONGEST, WEAKEST, operand

CHUNK = 64  # tokens a step
SLICE = 64  # columns of b a program has


@triton.jit(do_not_specialize=["T", "H", "part", "parts"])
def sum_kernel(
    # tensors
    a,  # [B, T, H, K]
    b,  # [B, T, H, V]
    sums,  # [parts, B, H, K, V] float32, contiguous
    log_decay,  # [H]
    window,  # [2], the first token and one past the last; read if WINDOWED
    # strides: (row, token, head, column)
    a_strides,
    b_strides,
    # sizes
    T,
    H,
    part,  # tokens of a part
    parts,
    # compile-time constants
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # K, padded
    SLICE: tl.constexpr,  # columns of V that a program has
    C: tl.constexpr,  # tokens of a chunk
    WINDOWED: tl.constexpr,
    TO_END: tl.constexpr,
):
    """One program for `part` tokens of a row and head and SLICE columns.

    A token weighs lambda^(T-1-t) TO_END, else lambda^(t+1). Far ones, where that is zero, are
    passed over."""
    SLICES: tl.constexpr = (V + SLICE - 1) // SLICE
    column = tl.program_id(0) % SLICES * SLICE
    n = tl.program_id(0) // SLICES % parts
    rest = tl.program_id(0) // SLICES // parts
    row = (rest // H).to(tl.int64)
    head = (rest % H).to(tl.int64)
    # `head_rate` and `reach`, but written here, because Triton places a function's constants first,
    # and then other instructions come out
    rate = tl.load(log_decay + head).to(tl.float32)
    rate = tl.where(rate < STRONGEST, STRONGEST, rate)
    seen = (NOTHING.value / tl.maximum(-rate, WEAKEST)).to(tl.int32)
    start = n * part
    stop = tl.minimum(start + part, T)
    if WINDOWED:
        start = tl.maximum(start, tl.load(window).to(tl.int32))
        stop = tl.minimum(stop, tl.load(window + 1).to(tl.int32))
    if TO_END:
        start = tl.maximum(start, T - tl.minimum(seen, T))
    else:
        stop = tl.minimum(stop, seen)
    i = tl.arange(0, C)
    k = tl.arange(0, BLOCK)
    v = column + tl.arange(0, SLICE)
    a += row * a_strides[0] + head * a_strides[2]
    b += row * b_strides[0] + head * b_strides[2]
    total = tl.zeros((BLOCK, SLICE), dtype=tl.float32)
    for m in range(tl.cdiv(tl.maximum(stop - start, 0), C)):
        t = start + m * C + i
        wide = t.to(tl.int64)[:, None]
        inside = (t < stop)[:, None]
        mask = inside & (k < K)[None, :]
        at = a + wide * a_strides[1] + k[None, :] * a_strides[3]
        ac = tl.load(at, mask=mask, other=0.0)  # [C, BLOCK]
        mask = inside & (v < V)[None, :]
        at = b + wide * b_strides[1] + v[None, :] * b_strides[3]
        bc = tl.load(at, mask=mask, other=0.0)  # [C, SLICE]
        away = T - 1 - t if TO_END else t + 1
        weight = tl.exp(rate * tl.maximum(away, 0))
        bc = (bc.to(tl.float32) * weight[:, None]).to(b.dtype.element_ty)
        # [BLOCK, C] @ [C, SLICE]
        ac = operand(ac)
        total = tl.dot(tl.trans(ac), operand(bc), total, input_precision=PRECISION)
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
    block = max(least, triton.next_power_of_2(K))
    width = min(SLICE, max(least, triton.next_power_of_2(V)))
    slices = -(-V // width)
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
        key = (kinds, wide, a.stride(), b.stride(), K, V, block, width, to_end)
        tensors = (a, b, sums, log_decay, log_decay if window is None else window)
        strides = (a.stride(), b.stride())
        sizes = (T, H, part, parts)
        constants = (K, V, block, width, CHUNK, window is not None, to_end)
        arguments = (*tensors, *strides, *sizes, *constants)
        warps = 8 if block > 128 else 4
        launch(sum_kernel, a, key, parts * B * H * slices, arguments, warps=warps, stages=2)
    return sums.sum(0)
