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

WARPS = 4
VECTOR = tl.constexpr(8)  # numbers of one load of 16 bytes, in half precision


@triton.jit
def _multiply(
    sums,  # [PARTS, ROWS, COLUMNS], or of one part [ROWS, COLUMNS, BLOCK / VECTOR]
    a,  # [PARTS, ROWS, BLOCK / PARTS] float32, or of one part [ROWS, 1, BLOCK]
    w,  # [PARTS, COLUMNS, BLOCK / PARTS], or of one part [1, COLUMNS, BLOCK]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """sums + a w^T, part by part; of one part only what one thread holds is summed yet."""
    if PARTS > 1:
        # [PARTS, ROWS, BLOCK / PARTS] @ [PARTS, BLOCK / PARTS, COLUMNS]
        return tl.dot(operand(a.to(w.dtype)), operand(tl.trans(w, 0, 2, 1)), sums)
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
    PARTS: tl.constexpr,  # of BLOCK, one a warp, that tensor cores multiply; 1: without these
    EARLY: tl.constexpr,
):
    """The norm is one factor a row, which the product passes on. So it multiplies the sums in the
    end, and squares and products are summed in one walk over K, whose first loads wait for nothing.
    With EARLY they do not even wait for the kernel before, which must not write the weights."""
    DOT: tl.constexpr = PARTS > 1
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None, None] * (BLOCK // PARTS)
    if DOT:
        squares = tl.zeros((PARTS, ROWS), tl.float32)
        sums = tl.zeros((PARTS, ROWS, COLUMNS), tl.float32)
        r, c = row.to(tl.int64)[None, :, None], n[None, :, None]
    else:
        squares = tl.zeros((ROWS, 1, BLOCK // VECTOR), tl.float32)
        sums = tl.zeros((ROWS, COLUMNS, BLOCK // VECTOR), tl.float32)
        r, c = row.to(tl.int64)[:, None, None], n[None, :, None]
    others = sums
    for start in tl.static_range(0, K, BLOCK):
        k = start + part + tl.arange(0, BLOCK // PARTS)[None, None, :]
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
                squares += tl.sum(a * a, axis=2)
            else:
                squares = _multiply(squares, a, a, ROWS, 1, BLOCK, 1)
        if GAINED:
            a *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        if GATED:
            u = gate + gate_offsets(r, k, g_row, g_head, HEAD)
            a *= tl.load(u, mask=mask, other=0.0).to(tl.float32)
        sums = _multiply(sums, a, w, ROWS, COLUMNS, BLOCK, PARTS)
        if PAIRED:
            others = _multiply(others, a, v, ROWS, COLUMNS, BLOCK, PARTS)
    y = tl.sum(sums, axis=0 if DOT else 2)  # [ROWS, COLUMNS]
    z = tl.sum(others, axis=0 if DOT else 2)
    if NORMED:
        squares = tl.sum(squares, axis=0)[:, None] if DOT else tl.sum(squares, axis=2)
        factor = tl.rsqrt(squares / K + eps)  # [ROWS, 1]
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


def _tiles(rows: int, N: int, K: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """ROWS, COLUMNS, BLOCK and PARTS.

    Up to four rows, sums of products in float32 cost less time than reading W does (a processor of
    an H100 does about 20 of them while it reads a number of W), take loads straight into registers,
    and need no row that pads. Tensor cores pad to 16 rows and go through shared memory, but their
    time does not grow with the rows. They would round a float16 that may overflow before the norm,
    and cut float32. Each warp has a part of K, because all would else do the same product.

    A program has few columns, so that a weight of 1,024 rows occupies all of 132 processors, and
    all programs of a small weight have their loads in flight at once."""
    padded = triton.next_power_of_2(rows)
    if rows > 4 and dtype == torch.bfloat16:
        return padded, 8 if N < 16 * 132 else 16, 64 * WARPS, WARPS
    widest = max(VECTOR.value, triton.next_power_of_2(K))
    return padded, 4, min(1024 if rows <= 4 else 256, widest), 1


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
    padded, columns, block, parts = _tiles(flat.shape[0], N, K, x.dtype)
    before, early = (eps is not None, gain is not None, gate is not None), can_begin_early(x)
    flags = (*before, paired, swish, residual is not None, parts, early)
    widths = (K, pieces.shape[2], padded, columns, block)
    aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    key = (x.dtype, aligned, strides, N, widths, flags)
    arguments = (*tensors, *strides, flat.shape[0], N, float(eps or 0), *widths, *flags)
    launch(few_rows_kernel, x, key, -(-N // columns), arguments, warps=WARPS, early=early)
    return output
