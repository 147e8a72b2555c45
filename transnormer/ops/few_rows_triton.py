"""The kernel of `few_rows_linear`: a product of few rows, its norm and gate before and its residual
after, each weight read once."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import can_begin_early, launch, wait_for_previous
from .lightning_walk_triton import operand
from .norm_triton import flat_rows, gate_offsets, gate_pieces

VECTOR = tl.constexpr(8)  # numbers of one load of 16 bytes, in half precision


@triton.jit
def _multiply(
    sums,  # [ROWS, COLUMNS, BLOCK / VECTOR], or [ROWS, COLUMNS] if DOT
    a,  # [ROWS, 1, BLOCK] float32, or [ROWS, BLOCK] if DOT
    w,  # [1, COLUMNS, BLOCK], or [COLUMNS, BLOCK] if DOT
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """sums + a w^T, of which without DOT only what one thread holds is summed yet."""
    if DOT:
        # [ROWS, BLOCK] @ [BLOCK, COLUMNS]
        return tl.dot(operand(a.to(w.dtype)), operand(w.T), sums)
    else:
        products = tl.reshape(a * w.to(tl.float32), (ROWS, COLUMNS, BLOCK // VECTOR, VECTOR))
        return sums + tl.sum(products, axis=3)


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    # tensors
    x,  # [rows, K]
    gain,  # [K], read if GAINED
    gate,  # [rows, K / HEAD, HEAD], read if GATED
    weight,  # [N, K]
    second,  # [N, K], read if PAIRED
    residual,  # [rows, N], read if ADDS
    output,  # [rows, N] contiguous
    # strides: of a row, and of the gate's pieces of HEAD columns
    x_row,
    g_row,
    g_head,
    w_row,
    s_row,
    r_row,
    # sizes
    rows,
    N,
    eps,
    # compile-time constants
    K: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,  # rows, padded
    COLUMNS: tl.constexpr,  # of the output, that a program has
    BLOCK: tl.constexpr,  # of K, at a time
    NORMED: tl.constexpr,
    GAINED: tl.constexpr,
    GATED: tl.constexpr,
    PAIRED: tl.constexpr,
    SWISH: tl.constexpr,
    ADDS: tl.constexpr,
    DOT: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The norm is one factor a row, which the product passes on. So it multiplies the sums in the
    end, and squares and products are summed in one walk over K, whose first loads wait for nothing.
    With EARLY they do not even wait for the kernel before, which must not write the weights."""
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    if DOT:
        squares = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        r, c = row.to(tl.int64)[:, None], n[:, None]
    else:
        squares = tl.zeros((ROWS, 1, BLOCK // VECTOR), tl.float32)
        sums = tl.zeros((ROWS, COLUMNS, BLOCK // VECTOR), tl.float32)
        r, c = row.to(tl.int64)[:, None, None], n[None, :, None]
    others = sums
    for start in tl.static_range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        k = k[None, :] if DOT else k[None, None, :]
        mask = (c < N) & (k < K)
        w = tl.load(weight + c * w_row + k, mask=mask, other=0.0)
        if PAIRED:
            v = tl.load(second + c * s_row + k, mask=mask, other=0.0)
        if start == 0:
            wait_for_previous(EARLY)
        mask = (r < rows) & (k < K)
        a = tl.load(x + r * x_row + k, mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            if DOT:
                squares += tl.sum(a * a, axis=1)
            else:
                squares = _multiply(squares, a, a, ROWS, 1, BLOCK, False)
        if GAINED:
            a *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        if GATED:
            u = gate + gate_offsets(r, k, g_row, g_head, HEAD)
            a *= tl.load(u, mask=mask, other=0.0).to(tl.float32)
        sums = _multiply(sums, a, w, ROWS, COLUMNS, BLOCK, DOT)
        if PAIRED:
            others = _multiply(others, a, v, ROWS, COLUMNS, BLOCK, DOT)
    y = sums if DOT else tl.sum(sums, axis=2)  # [ROWS, COLUMNS]
    z = others if DOT else tl.sum(others, axis=2)
    if NORMED:
        mean = (squares[:, None] if DOT else tl.sum(squares, axis=2)) / K  # [ROWS, 1]
        factor = tl.rsqrt(mean + eps)
        y *= factor
        z *= factor
    if PAIRED:
        if SWISH:
            y *= tl.sigmoid(y)
        y *= z
    r, c = row.to(tl.int64)[:, None], n[None, :]
    mask = (r < rows) & (c < N)
    if ADDS:
        y += tl.load(residual + r * r_row + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + r * N + c, y.to(output.dtype.element_ty), mask=mask)


def _tiles(rows: int, N: int, K: int, paired: bool, dtype: torch.dtype) -> tuple[int, ...]:
    """(ROWS, COLUMNS, BLOCK, warps) and DOT.

    Up to four rows, sums of products in float32 cost less time than reading W does (a processor of
    an H100 does 64 of them while it reads a number of W), take loads straight into registers, and
    need no row that pads. Tensor cores pad to 16 rows and go through shared memory, but their time
    does not grow with the rows. They would round a float16 that may overflow before the norm, and
    cut float32. A program has few columns, so that a weight of 1,024 rows occupies all of 132
    processors, and all programs of a small weight have their loads in flight at once."""
    padded, widest = triton.next_power_of_2(rows), max(VECTOR.value, triton.next_power_of_2(K))
    if rows > 4 and dtype == torch.bfloat16:
        return padded, 8 if N < 16 * 132 else 16, max(64, min(256, widest)), 8 if paired else 4, 1
    return padded, 4, min(1024 if padded <= 4 else 256, widest), 4, 0


def linear(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    gain: Tensor | None,
    gate: Tensor | None,
    second: Tensor | None,
    swish: bool,
    residual: Tensor | None,
) -> Tensor:
    """[..., N]; arguments as in `few_rows_linear`, all of one dtype."""
    (N, K), flat = weight.shape, flat_rows(x)
    output = x.new_empty((*x.shape[:-1], N))
    if N == 0:
        return output
    pieces = gate_pieces(gate, flat)
    other = weight if second is None else second
    added = flat_rows(output if residual is None else residual)
    tensors = (flat, flat if gain is None else gain, pieces, weight, other, added, output)
    strides = (
        *(flat.stride(0), *pieces.stride()[:2]),
        *(weight.stride(0), other.stride(0), added.stride(0)),
    )
    paired = second is not None
    padded, columns, block, warps, dot = _tiles(flat.shape[0], N, K, paired, x.dtype)
    before, early = (eps is not None, gain is not None, gate is not None), can_begin_early(x)
    flags = (*before, paired, swish, residual is not None, bool(dot), early)
    widths = (K, pieces.shape[2], padded, columns, block)
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    key = (x.dtype, aligned, strides, N, widths, flags)
    arguments = (*tensors, *strides, flat.shape[0], N, float(eps or 0), *widths, *flags)
    launch(few_rows_kernel, x, key, -(-N // columns), arguments, warps=warps, early=early)
    return output
