"""The walk over chunks of which every pass of Lightning Attention is made, as device functions in
Triton.

One walk does everything. A program owns a row, a head and a slice of V, keeps its state [K, slice]
on chip in float32 and walks along time in chunks of C tokens, reading q, k, v once and writing the
output once. With D_t the gradient of the state after token t, the gradients are the same walk with
other tensors in the three places, which are called left, right and value:

    o_t  = sum of s <= t: lambda^(t-s) (q_t . k_s)  v_s  state S   = sum lambda^. k^T v   rightwards
    dq_t = sum of s <= t: lambda^(t-s) (do_t . v_s) k_s  state S^T = sum lambda^. v^T k   rightwards
    dk_t = sum of s >= t: lambda^(s-t) (v_t . do_s) q_s  state D^T = sum lambda^. do^T q  leftwards
    dv_t = sum of s >= t: lambda^(s-t) (k_t . q_s)  do_s  state D   = sum lambda^. q^T do  leftwards

A state has as many ROWS as left and right are wide, and as many COLUMNS as value is; a program has
BLOCK rows, which are ROWS padded to a power of 2, and SLICE columns, from `column` on. Strides are
tuples: of an input (row, token, head, column), of an output the first three, because its columns
are adjacent, and of a state (sequence, head, row, column). A tensor that is DESCRIBED comes as a
tensor descriptor instead of a pointer. A walk that goes leftwards is in REVERSE."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)
STRONGEST = tl.constexpr(-1000.0)  # `decay.STRONGEST`, below which a log_decay is taken for it
WEAKEST = tl.constexpr(1e-7)  # a log_decay nearer to 0 than this reaches as far as this
NOTHING = tl.constexpr(104.0)  # exp(-104) is zero in float32
PRECISION = tl.constexpr("ieee")  # of float32 products


@triton.jit
def head_rate(
    log_decay,  # [H]
    head,
):
    """A head's log_decay, or STRONGEST, because -inf times 0 tokens would be NaN."""
    rate = tl.load(log_decay + head).to(tl.float32)
    return tl.where(rate < STRONGEST, STRONGEST, rate)


@triton.jit
def reach(rate):
    """Tokens after which nothing of a state is left."""
    return (NOTHING.value / tl.maximum(-rate, WEAKEST)).to(tl.int32)


@triton.jit
def operand(x):
    """x as `tl.dot` can take it: the interpreter's takes the bits of a bfloat16 for an integer."""
    if _INTERPRETED:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _dot(
    a,  # [L, M]
    b,  # [M, N]
    added=None,  # [L, N] float32
):
    """a @ b + added in float32, with full-precision products."""
    a = operand(a)
    b = operand(b)
    if added is not None and a.dtype == tl.float32:
        # Each addition rounds in proportion to the accumulator, so the terms of one chunk are
        # summed by themselves first. This is written as a difference, because the compiler would
        # fuse a sum into one product that adds to `added`.
        return added - tl.dot(-a, b, input_precision=PRECISION)
    return tl.dot(a, b, added, input_precision=PRECISION)


@triton.jit
def _sigmoid(x):
    """The sigmoid of float32, to a few of its last bits: an instruction for the exponential, one
    for the division (Triton's: 15)."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
            " add.ftz.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",  # 1 / (1 + 2^(-x log2 e))
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.sigmoid(x)


@triton.jit
def place(
    x,  # [B, T, H, columns]
    strides,
    row,
    head,
    DESCRIBED: tl.constexpr,
):
    """Where a row and head of x begin."""
    if DESCRIBED:
        return x
    else:
        return x + row.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]


@triton.jit
def load_chunk(
    x,  # from `place`
    strides,
    row,
    head,
    tokens,  # (the chunk's first, the walk's first, one past the walk's last)
    column,
    WIDTH: tl.constexpr,  # all columns of x
    BLOCK: tl.constexpr,  # columns to load
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """[C, BLOCK]: the tokens of a chunk, columns from `column` on.

    Columns from WIDTH on are zero, and so are tokens beyond the end at which the walk leaves the
    chunk (where x is DESCRIBED: tokens beyond the end of the row)."""
    first, start, stop = tokens
    if DESCRIBED:
        return x.load([row, first, head, column]).reshape(C, BLOCK)
    else:
        t = tl.arange(0, C)
        c = column + tl.arange(0, BLOCK)
        mask = (t >= start - first if REVERSE else t < stop - first)[:, None]
        if WIDTH % BLOCK != 0:
            mask = mask & (c < WIDTH)[None, :]
        offsets = t.to(tl.int64)[:, None] * strides[1] + c.to(tl.int64)[None, :] * strides[3]
        return tl.load(x + first.to(tl.int64) * strides[1] + offsets, mask=mask, other=0.0)


@triton.jit
def state_offsets(
    column,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Offsets and mask of a [BLOCK, SLICE] slice of a state."""
    row = tl.arange(0, BLOCK)
    c = column + tl.arange(0, SLICE)
    offsets = row.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * column_stride
    return offsets, (row < ROWS)[:, None] & (c < COLUMNS)[None, :]


@triton.jit
def absorb(
    state,  # [BLOCK, SLICE] float32
    right,  # [C, BLOCK]
    value,  # [C, SLICE]
    rate,
    along,  # [C], steps from where the walk enters the chunk
    count,  # tokens that the chunk has
    REVERSE: tl.constexpr,
):
    """The state after a chunk: lambda^count state + right^T value, with every token decayed to the
    far end."""
    remaining = tl.maximum(count - along if REVERSE else count - 1 - along, 0)
    after = tl.where(along < count, tl.exp(rate * remaining), 0.0)
    decayed = (value.to(tl.float32) * after[:, None]).to(value.dtype)
    # [BLOCK, C] @ [C, SLICE]
    return _dot(tl.trans(right), decayed, state * tl.exp(rate * count))


@triton.jit
def _read(
    left,  # [C, BLOCK]
    state,  # [BLOCK, SLICE] float32
):
    """left @ state, which is rounded to left's dtype; float16 would overflow where bfloat16 does
    not."""
    if left.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), axis=1), axis=0)
        shrink = tl.minimum(32768.0 / tl.maximum(top, 1.0), 1.0)
        return _dot(left, (state * shrink).to(left.dtype)) / shrink
    else:
        return _dot(left, state.to(left.dtype))


@triton.jit
def walk(
    # tensors
    left,  # [B, T, H, ROWS]
    right,  # [B, T, H, ROWS]
    value,  # [B, T, H, COLUMNS]
    output,  # [T, COLUMNS], of the row and head
    raw,  # [T, COLUMNS], of the row and head; read if SWISHED
    state,  # [BLOCK, SLICE] float32, where the walk begins
    # strides
    left_strides,
    right_strides,
    value_strides,
    output_stride,  # of tokens
    raw_stride,
    # where
    rate,
    row,
    head,
    start,
    stop,
    column,
    # compile-time constants
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWISHED: tl.constexpr,  # the output is a gradient of swish(raw), and becomes that of raw
    # How many iterations ahead the loop loads. None: as many as the launch says, and only what
    # products read.
    STAGES: tl.constexpr,
):
    """Walks tokens start … stop - 1 of one row and head, writes their output, returns the state at
    the far end.

    The last chunk of a walk may be short. What lies beyond it is read by no token of it, being
    later along the walk."""
    left = place(left, left_strides, row, head, DESCRIBED)
    right = place(right, right_strides, row, head, DESCRIBED)
    value = place(value, value_strides, row, head, DESCRIBED)
    i = tl.arange(0, C)
    along = C - 1 - i if REVERSE else i  # steps from where the walk enters the chunk
    distance = along[:, None] - (C - 1 - i if REVERSE else i)[None, :]
    inside = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)  # [C, C]
    # what a token sees of the incoming state
    before = tl.exp(rate * (along if REVERSE else along + 1))
    for n in tl.range(tl.cdiv(stop - start, C), num_stages=STAGES):
        first = stop - (n + 1) * C if REVERSE else start + n * C
        count = tl.minimum(stop - start - n * C, C)
        tokens = (first, start, stop)
        left_chunk = load_chunk(
            left, left_strides, row, head, tokens, 0, ROWS, BLOCK, C, REVERSE, DESCRIBED
        )
        right_chunk = load_chunk(
            right, right_strides, row, head, tokens, 0, ROWS, BLOCK, C, REVERSE, DESCRIBED
        )
        value_chunk = load_chunk(
            value, value_strides, row, head, tokens, column, COLUMNS, SLICE, C, REVERSE, DESCRIBED
        )
        # [C, BLOCK] @ [BLOCK, C]
        scores = (_dot(left_chunk, tl.trans(right_chunk)) * inside).to(value_chunk.dtype)
        # [C, C] @ [C, SLICE] + [C, BLOCK] @ [BLOCK, SLICE]
        result = _dot(scores, value_chunk, _read(left_chunk, state) * before[:, None])
        state = absorb(state, right_chunk, value_chunk, rate, along, count, REVERSE)
        # by halves of the columns: all at once spills registers
        PARTS: tl.constexpr = 2 if SWISHED else 1
        if SWISHED:
            lower, upper = tl.split(result.reshape(C, 2, SLICE // 2).permute(0, 2, 1))
        for part in tl.static_range(PARTS):
            columns = column + tl.arange(0, SLICE // PARTS) + part * (SLICE // PARTS)
            mask = (along < count)[:, None] & (columns < COLUMNS)[None, :]
            if SWISHED:  # added to the pointer one by one: offsets summed first take more registers
                at = (
                    raw
                    + first.to(tl.int64) * raw_stride
                    + i.to(tl.int64)[:, None] * raw_stride
                    + columns[None, :]
                )
                x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                share = _sigmoid(x)
                result = (lower if part == 0 else upper) * (share + share * (x - x * share))
            at = (
                output
                + first.to(tl.int64) * output_stride
                + i.to(tl.int64)[:, None] * output_stride
                + columns[None, :]
            )
            tl.store(at, result.to(output.dtype.element_ty), mask=mask)
    return state
