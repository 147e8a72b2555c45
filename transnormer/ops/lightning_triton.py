"""Lightning Attention on the GPU, in Triton: forward, backward, and the one-token step.

One walk does everything. A program owns a row, a head and a slice of V, keeps its state [K, slice] on chip in float32
and walks along time in chunks of C tokens, reading q, k, v once and writing the output once. With D_t the gradient of
the state after token t, the gradients are the same walk with other tensors in the three places:

    o_t  = sum over s <= t of lambda^(t-s) (q_t . k_s)  v_s      state  S   = sum lambda^. k^T v    left to right
    dq_t = sum over s <= t of lambda^(t-s) (do_t . v_s) k_s      state  S^T = sum lambda^. v^T k    left to right
    dk_t = sum over s >= t of lambda^(s-t) (v_t . do_s) q_s      state  D^T = sum lambda^. do^T q   right to left
    dv_t = sum over s >= t of lambda^(s-t) (k_t . q_s)  do_s     state  D   = sum lambda^. q^T do   right to left

Nothing is stored between the passes. Counted in units of one [B, T, H, 128] tensor, the forward moves 4 and the
backward, one launch of three kinds of programs, 12, of which dk and dv share two reads through the cache: 10. (Fusing
dk and dv in one program would save 11 % of the arithmetic for twice the registers; storing chunk states, one [K, V]
float32 each, would add 4 units at C = 64 and 1 at C = 256.) Arithmetic, a token and head: 2 C (K + V) + 4 K V FLOPs
forward, three times that backward; at C = 64, K = V = 128, three tenths of the time its bytes take on Hopper.

Where rows x heads x slices do not fill the GPU, time is cut in segments: a first launch sums the state of every
segment alone (in backward, of both directions), the walk of a segment starts from the decayed sum of those before it.
A segment's sum starts where lambda^distance is still above float32's smallest number. Packed rows are cut alike, at
the same places: a program walks whatever sequences, or parts of them, lie in its segment, so the grid depends on T
alone and nothing about cu_seqlens is read on the host.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # triton reads it where a kernel is defined, so once is right
_INTERPRETED = tl.constexpr(INTERPRETED)
_PRECISION = tl.constexpr("ieee")  # of float32 products
_UNSPECIALIZED = ["T", "H", "N", "segment", "segments"]


# Device functions. A tensor comes as a pointer and its strides (b, t, h, c), or DESCRIBED by a tensor descriptor.


@triton.jit
def _dot(a, b, added=None):
    """a b + added in float32, with full-precision products."""
    if _INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, added, input_precision=_PRECISION)


@triton.jit
def _place(x, row, head, x_b, x_h, DESCRIBED: tl.constexpr):
    """Where a row and head begin."""
    if DESCRIBED:
        return x
    else:
        return x + row.to(tl.int64) * x_b + head.to(tl.int64) * x_h


@triton.jit
def _load(
    x, row, head, first, start, stop, column, x_t, x_c,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[C, BLOCK]: tokens from `first` on, columns from `column` on.

    Zero beyond the width and beyond the end of start … stop - 1 that the walk leaves by (described: beyond the row's).
    """
    if DESCRIBED:
        return x.load([row, first, head, column]).reshape(C, BLOCK)
    else:
        t = tl.arange(0, C)
        c = column + tl.arange(0, BLOCK)
        mask = (t >= start - first if REVERSE else t < stop - first)[:, None]
        if WIDTH % BLOCK != 0:
            mask = mask & (c < WIDTH)[None, :]
        offsets = t.to(tl.int64)[:, None] * x_t + c.to(tl.int64)[None, :] * x_c
        return tl.load(x + first.to(tl.int64) * x_t + offsets, mask=mask, other=0.0)


@triton.jit
def _state_offsets(
    column, row_stride, column_stride,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a [BK, BV] slice of a state."""
    row = tl.arange(0, BK)
    c = column + tl.arange(0, BV)
    offsets = row.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * column_stride
    return offsets, (row < K)[:, None] & (c < V)[None, :]


@triton.jit
def _absorb(state, k, v, rate, along, count, REVERSE: tl.constexpr):
    """The state after a chunk of `count` tokens: lambda^count state + k^T v with every token decayed to the far end."""
    left = tl.maximum(count - along if REVERSE else count - 1 - along, 0)
    after = tl.where(along < count, tl.exp(rate * left), 0.0)
    decayed = (v.to(tl.float32) * after[:, None]).to(v.dtype)
    return _dot(tl.trans(k), decayed, state * tl.exp(rate * count))


@triton.jit
def _read(q, state):
    """q times the state, which is rounded to q's dtype; float16 would overflow where bfloat16 does not."""
    if q.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), axis=1), axis=0)
        shrink = tl.minimum(32768.0 / tl.maximum(top, 1.0), 1.0)
        return _dot(q, (state * shrink).to(q.dtype)) / shrink
    else:
        return _dot(q, state.to(q.dtype))


@triton.jit
def _walk(
    q, k, v, output, state, rate, row, head, start, stop, column,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, o_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Walks tokens start … stop - 1 of one row and head, writes their output, returns the state at the far end.

    The last chunk of a walk may be short. What lies beyond it is read by no token of it, being later along the walk.
    """
    q = _place(q, row, head, q_b, q_h, DESCRIBED)
    k = _place(k, row, head, k_b, k_h, DESCRIBED)
    v = _place(v, row, head, v_b, v_h, DESCRIBED)
    i = tl.arange(0, C)
    along = C - 1 - i if REVERSE else i  # steps from where the walk enters the chunk
    distance = along[:, None] - (C - 1 - i if REVERSE else i)[None, :]
    inside = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)  # [C, C]
    before = tl.exp(rate * (along if REVERSE else along + 1))  # what a token sees of the incoming state
    for n in range(tl.cdiv(stop - start, C)):
        first = stop - (n + 1) * C if REVERSE else start + n * C
        count = tl.minimum(stop - start - n * C, C)
        qc = _load(q, row, head, first, start, stop, 0, q_t, q_c, C, K, BK, REVERSE, DESCRIBED)
        kc = _load(k, row, head, first, start, stop, 0, k_t, k_c, C, K, BK, REVERSE, DESCRIBED)
        vc = _load(v, row, head, first, start, stop, column, v_t, v_c, C, V, BV, REVERSE, DESCRIBED)
        scores = (_dot(qc, tl.trans(kc)) * inside).to(vc.dtype)
        result = _dot(scores, vc, _read(qc, state) * before[:, None])
        state = _absorb(state, kc, vc, rate, along, count, REVERSE)
        columns = column + tl.arange(0, BV)
        mask = (along < count)[:, None] & (columns < V)[None, :]
        offsets = i.to(tl.int64)[:, None] * o_t + columns[None, :]
        tl.store(output + first.to(tl.int64) * o_t + offsets, result.to(output.dtype.element_ty), mask=mask)
    return state


@triton.jit
def _count(cu_seqlens, N, lo, hi):
    """Of the N sequences: how many end at or before `lo` (those that begin there excepted), and begin before `hi`."""
    ended = 0
    begun = 0
    for block in range(0, N, 128):
        n = block + tl.arange(0, 128)
        begin = tl.load(cu_seqlens + n, mask=n < N, other=0)
        end = tl.load(cu_seqlens + n + 1, mask=n < N, other=0)
        ended += tl.sum(((n < N) & (end <= lo) & (begin < lo)).to(tl.int32), axis=0)
        begun += tl.sum(((n < N) & (begin < hi)).to(tl.int32), axis=0)
    return ended, begun


@triton.jit
def _reach(rate):
    """Tokens after which nothing of a state is left: exp(-104) is zero in float32."""
    return (104.0 / tl.maximum(-rate, 1e-7)).to(tl.int32)


@triton.jit
def _program(
    q, k, v, output, state_in, state_out, local, cu_seqlens, log_decay, row, head, s, column,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, in_n, in_h, in_k, in_v, out_k, out_v,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DESCRIBED: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, STORE_STATE: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """All sequences, or parts of them, in segment s of one row, for one head and slice.

    The output is contiguous [B, T, H, V]; outgoing states [N, H, K, V] and local ones [B, segments, H, K, V] are too.
    """
    rate = tl.load(log_decay + head).to(tl.float32)
    lo = s * segment
    hi = tl.minimum(lo + segment, T)
    wide_row = row.to(tl.int64)
    wide_head = head.to(tl.int64)
    output += (wide_row * T * H + wide_head) * V
    state_in += wide_head * in_h
    state_out += wide_head * (K * V)
    local += (wide_row * segments * H + wide_head) * (K * V)
    apart = H.to(tl.int64) * (K * V)
    if PACKED:
        past, begun = _count(cu_seqlens, N, lo, hi)
        begun = tl.where(s == segments - 1, N, begun)
    else:
        past = row
        begun = row + tl.minimum(segments, 1)  # one; known only when it runs, for a loop's buffers are given back
    for m in range(begun - past):
        n = begun - 1 - m if REVERSE else past + m
        begin = 0
        end = T
        if PACKED:
            begin = tl.load(cu_seqlens + n).to(tl.int32)
            end = tl.load(cu_seqlens + n + 1).to(tl.int32)
        start = tl.maximum(begin, lo)
        stop = tl.minimum(end, hi)
        state = tl.zeros((BK, BV), dtype=tl.float32)
        if HAS_STATE:
            offsets, mask = _state_offsets(column, in_k, in_v, K, V, BK, BV)
            away = end - stop if REVERSE else start - begin
            state += tl.load(state_in + n.to(tl.int64) * in_n + offsets, mask=mask, other=0.0) * tl.exp(rate * away)
        if SEGMENTED:  # the segments between the sequence's end and this one
            offsets, mask = _state_offsets(column, out_k, out_v, K, V, BK, BV)
            seen = _reach(rate)
            left = tl.maximum(begin, lo - tl.minimum(seen, lo)) // segment
            right = tl.cdiv(tl.minimum(end, hi + tl.minimum(seen, T - hi)), segment)
            for t in range(s + 1 if REVERSE else left, right if REVERSE else s):
                away = t * segment - stop if REVERSE else start - (t + 1) * segment
                state += tl.load(local + apart * t + offsets, mask=mask, other=0.0) * tl.exp(rate * away)
        state = _walk(
            q, k, v, output, state, rate, row, head, start, stop, column,
            q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, H * V,
            K, V, BK, BV, C, REVERSE, DESCRIBED,
        )  # fmt: skip
        if STORE_STATE:
            offsets, mask = _state_offsets(column, out_k, out_v, K, V, BK, BV)
            if begin >= lo if REVERSE else end <= hi:
                tl.store(state_out + n.to(tl.int64) * apart + offsets, state, mask=mask)


@triton.jit
def _sum_segment(
    k, v, local, cu_seqlens, log_decay, row, head, s, column,
    k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DESCRIBED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state a segment's own tokens leave at its far end, for the sequence that goes on there."""
    rate = tl.load(log_decay + head).to(tl.float32)
    lo = s * segment
    hi = tl.minimum(lo + segment, T)
    start = lo
    stop = hi
    if PACKED:
        edge = lo if REVERSE else hi
        ended = 0
        for block in range(0, N, 128):
            n = block + tl.arange(0, 128)
            end_n = tl.load(cu_seqlens + n + 1, mask=n < N, other=0)
            ended += tl.sum(((n < N) & (end_n <= edge)).to(tl.int32), axis=0)
        ended = tl.minimum(ended, N - 1)
        begin = tl.load(cu_seqlens + ended).to(tl.int32)
        end = tl.load(cu_seqlens + ended + 1).to(tl.int32)
        if REVERSE:
            stop = tl.where(begin < lo, tl.minimum(end, hi), lo)
        else:
            start = tl.minimum(tl.maximum(begin, lo), hi)
    seen = tl.minimum(_reach(rate), stop - start)
    if REVERSE:
        stop = start + seen
    else:
        start = stop - seen
    k = _place(k, row, head, k_b, k_h, DESCRIBED)
    v = _place(v, row, head, v_b, v_h, DESCRIBED)
    i = tl.arange(0, C)
    along = C - 1 - i if REVERSE else i
    state = tl.zeros((BK, BV), dtype=tl.float32)
    for n in range(tl.cdiv(stop - start, C)):
        first = stop - (n + 1) * C if REVERSE else start + n * C
        count = tl.minimum(stop - start - n * C, C)
        kc = _load(k, row, head, first, start, stop, 0, k_t, k_c, C, K, BK, REVERSE, DESCRIBED)
        vc = _load(v, row, head, first, start, stop, column, v_t, v_c, C, V, BV, REVERSE, DESCRIBED)
        state = _absorb(state, kc, vc, rate, along, count, REVERSE)
    offsets, mask = _state_offsets(column, V, 1, K, V, BK, BV)
    local += ((row.to(tl.int64) * segments + s) * H + head) * (K * V)
    tl.store(local + offsets, state, mask=mask)


# Kernels. Program ids run over slices first, then segments, heads, rows: neighbours share what they read.


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _forward_kernel(
    q, k, v, output, state, last, local, cu_seqlens, log_decay,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, s_n, s_h, s_k, s_v,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DESCRIBED: tl.constexpr, PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    SLICES: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % SLICES * BV
    rest = tl.program_id(0) // SLICES
    _program(
        q, k, v, output, state, last, local, cu_seqlens, log_decay,
        rest // segments // H, rest // segments % H, rest % segments, column,
        q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, s_n, s_h, s_k, s_v, V, 1,
        T, H, N, segment, segments, K, V, BK, BV, C, False, DESCRIBED, PACKED, HAS_STATE, True, SEGMENTED,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _backward_kernel(
    q, k, v, g, q_slice, k_slice, g_slice, dq, dk, dv, state, d_last, d_state, local, d_local, cu_seqlens, log_decay,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, g_b, g_t, g_h, g_c,
    s_n, s_h, s_k, s_v, e_n, e_h, e_k, e_v,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr, SV: tl.constexpr,
    C: tl.constexpr, DESCRIBED: tl.constexpr, PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_LAST: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """dk and dq in slices of K, SK wide, dv in slices of V, SV wide. g is d_output; s and e are state and d_last."""
    OF_K: tl.constexpr = (K + SK - 1) // SK
    OF_V: tl.constexpr = (V + SV - 1) // SV
    part = tl.program_id(0) % (2 * OF_K + OF_V)
    rest = tl.program_id(0) // (2 * OF_K + OF_V)
    s = rest % segments
    head = rest // segments % H
    row = rest // segments // H
    if part < OF_K:
        _program(
            v, g, q_slice, dk, d_last, d_state, d_local, cu_seqlens, log_decay, row, head, s, part * SK,
            v_b, v_t, v_h, v_c, g_b, g_t, g_h, g_c, q_b, q_t, q_h, q_c, e_n, e_h, e_v, e_k, 1, V,
            T, H, N, segment, segments, V, K, BV, SK, C, True, DESCRIBED, PACKED, HAS_LAST, False, SEGMENTED,
        )  # fmt: skip
    elif part < OF_K + OF_V:
        _program(
            k, q, g_slice, dv, d_last, d_state, d_local, cu_seqlens, log_decay, row, head, s, (part - OF_K) * SV,
            k_b, k_t, k_h, k_c, q_b, q_t, q_h, q_c, g_b, g_t, g_h, g_c, e_n, e_h, e_k, e_v, V, 1,
            T, H, N, segment, segments, K, V, BK, SV, C, True, DESCRIBED, PACKED, HAS_LAST, HAS_STATE, SEGMENTED,
        )  # fmt: skip
    else:
        _program(
            g, v, k_slice, dq, state, d_state, local, cu_seqlens, log_decay, row, head, s, (part - OF_K - OF_V) * SK,
            g_b, g_t, g_h, g_c, v_b, v_t, v_h, v_c, k_b, k_t, k_h, k_c, s_n, s_h, s_v, s_k, 1, V,
            T, H, N, segment, segments, V, K, BV, SK, C, False, DESCRIBED, PACKED, HAS_STATE, False, SEGMENTED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _segments_kernel(
    k, v, local, q, g, d_local, cu_seqlens, log_decay,
    k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, q_b, q_t, q_h, q_c, g_b, g_t, g_h, g_c,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DESCRIBED: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The sums of k^T v of all segments but the last; in backward also those of q^T do of all but the first."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % SLICES * BV
    rest = tl.program_id(0) // SLICES
    s = rest % (segments - 1)
    head = rest // (segments - 1) % H
    row = rest // (segments - 1) // H
    if BACKWARD:
        if row % 2 == 1:
            _sum_segment(
                q, g, d_local, cu_seqlens, log_decay, row // 2, head, s + 1, column,
                q_b, q_t, q_h, q_c, g_b, g_t, g_h, g_c,
                T, H, N, segment, segments, K, V, BK, BV, C, True, DESCRIBED, PACKED,
            )  # fmt: skip
        else:
            _sum_segment(
                k, v, local, cu_seqlens, log_decay, row // 2, head, s, column,
                k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c,
                T, H, N, segment, segments, K, V, BK, BV, C, False, DESCRIBED, PACKED,
            )  # fmt: skip
    else:
        _sum_segment(
            k, v, local, cu_seqlens, log_decay, row, head, s, column,
            k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c,
            T, H, N, segment, segments, K, V, BK, BV, C, False, DESCRIBED, PACKED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["H"])
def _step_kernel(
    q, k, v, output, state, new_state, log_decay,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, s_b, s_h, s_k, s_v, n_b, n_h, n_k, n_v, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """state <- lambda state + k^T v; output = q state. `new_state` may be `state`."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % SLICES * BV
    rest = tl.program_id(0) // SLICES
    head = (rest % H).to(tl.int64)
    row = (rest // H).to(tl.int64)
    r = tl.arange(0, BK)
    c = column + tl.arange(0, BV)
    qt = tl.load(q + row * q_b + head * q_h + r * q_c, mask=r < K, other=0.0).to(tl.float32)
    kt = tl.load(k + row * k_b + head * k_h + r * k_c, mask=r < K, other=0.0).to(tl.float32)
    vt = tl.load(v + row * v_b + head * v_h + c * v_c, mask=c < V, other=0.0).to(tl.float32)
    s = kt[:, None] * vt[None, :]
    if HAS_STATE:
        offsets, mask = _state_offsets(column, s_k, s_v, K, V, BK, BV)
        old = tl.load(state + row * s_b + head * s_h + offsets, mask=mask, other=0.0).to(tl.float32)
        s += tl.exp(tl.load(log_decay + head).to(tl.float32)) * old
    offsets, mask = _state_offsets(column, n_k, n_v, K, V, BK, BV)
    tl.store(new_state + row * n_b + head * n_h + offsets, s.to(new_state.dtype.element_ty), mask=mask)
    result = tl.sum(qt[:, None] * s, axis=0)
    tl.store(output + (row * H + head) * V + c, result.to(output.dtype.element_ty), mask=c < V)


# What to launch, and how.


@dataclasses.dataclass(frozen=True)
class Tiles:
    """chunk: tokens a chunk; slice: columns of the state a program owns; stages: depth of the load pipeline."""

    chunk: int
    slice: int
    warps: int
    stages: int
    described: bool = False  # loads by tensor descriptor, where strides and alignment allow

    def shared_bytes(self, block: int, itemsize: int) -> int:
        """Rough shared memory of a walk over states of `block` rows."""
        loads = self.chunk * (2 * block + self.slice)
        return itemsize * (self.stages * loads + block * self.slice + self.chunk * (self.chunk + self.slice))


# Best first; the first that fits the GPU's shared memory and registers runs. Three stages hide what a program alone on
# its multiprocessor waits for; the backward's, which reads more through the cache, gain nothing from them when paired.
_SMALL = (Tiles(64, 64, 4, 1, True), Tiles(32, 64, 4, 1))
_DEEP = (Tiles(64, 64, 4, 3, True), *_SMALL)
_PAIRED = (Tiles(64, 64, 4, 2, True), *_SMALL)
_FULL = (Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))  # for float32
_Key = tuple[Any, ...]
_fitting: dict[_Key, Tiles] = {}  # of a call's key: the configuration that runs it
_compiled: dict[_Key, Any] = {}  # of a kernel and a call's key: what Triton would find again by every argument


@functools.cache
def _device(index: int | None) -> tuple[int, int, bool]:
    """Of a GPU, or of what the interpreter plays: multiprocessors, a program's shared memory, tensor descriptors."""
    if index is None:
        return 4, 232_448, True
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    described = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return properties["multiprocessor_count"], properties["max_shared_mem"], described


def _over(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes microseconds."""
    return -(-a // b)


@functools.cache
def _block(width: int, dtype: torch.dtype) -> int:
    """Padded width of a tile. Narrow half-precision tiles are miscompiled for Hopper by Triton 3.6."""
    return max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(width))


def choices(K: int, V: int, dtype: torch.dtype, shared: int, *, paired: bool = False) -> list[Tiles]:
    """The configurations that may run a walk over states [K, V], best first."""
    known = _FULL if dtype == torch.float32 else _PAIRED if paired else _DEEP
    fits = [tiles for tiles in known if tiles.shared_bytes(_block(K, dtype), dtype.itemsize) <= shared]
    return [dataclasses.replace(x, slice=min(x.slice, _block(V, dtype))) for x in fits or known[-1:]]


@functools.lru_cache(1024)
def _segmentation(programs: int, sums: int, chunks: int, processors: int) -> int:
    """Into how many segments to cut time. programs, sums: programs a segment of the walk and of the summing.

    The numbers are microseconds on an H100, with chunks of 64 tokens and slices of 128 x 64: a walk's chunk takes 1.5
    where every program has a multiprocessor to itself and 3.1 else, the state of an earlier segment 1, a chunk of the
    sum 1 or, where sums fill the GPU, 1 for all that run at once (2, but strong decay spares half); a launch, 6.
    """
    slots = 2 * processors

    def cost(n: int) -> float:
        each = _over(chunks, n)
        full, rest = divmod(programs * n, slots)
        walk = each * (3.1 * full + (0 if rest == 0 else 1.5 if programs * n <= processors else 3.1))
        if n == 1:
            return walk
        return walk + _over(programs * n, slots) * (n - 1) + each * max(1.0, sums * (n - 1) / slots) + 6

    return min(range(1, max(1, min(16, chunks // 4)) + 1), key=cost)


class _Call:
    """What the launches of one call share. tiles, segments: to run with; chosen where None."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, tiles: Tiles | None,
        segments: int | None, more: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.dtype, self.device = v.shape[3], q.dtype, q.device
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.log_decay, self.cu_seqlens = (
            log_decay.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
        )
        self.tiles, self.segments = tiles, segments
        self.index = q.device.index if q.is_cuda else None
        self.processors, self.shared, self.describes = _device(self.index)
        # all that the arguments of a launch depend on but addresses, and of these what Triton wants to know
        tensors = (q, k, v, self.log_decay, self.cu_seqlens, *more)
        self.key: _Key = (
            q.shape, self.V, self.N, self.index, tiles, segments,
            *((x.dtype, x.stride(), x.data_ptr() % 16 == 0) if x is not None else None for x in tensors),
        )  # fmt: skip

    def run(self, name: str, candidates: Callable[[], list[Tiles]], launch: Callable[[Tiles], None]) -> None:
        """Launch with the first configuration that the GPU has the resources for."""
        key = (name, *self.key)
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                return self.run(name, candidates, launch)
        if tiles := _fitting.get(key):
            return launch(tiles)
        for tiles in (tries := [self.tiles] if self.tiles else candidates()):
            try:
                launch(tiles)
            except OutOfResources:
                if tiles is tries[-1]:
                    raise
            else:
                if len(_fitting) >= 4096:  # of as many lengths
                    _fitting.clear()
                    _compiled.clear()
                _fitting[key] = tiles
                return None
        return None

    def launch(self, kernel: Any, programs: int, tiles: Tiles, stages: int, arguments: Sequence[Any]) -> None:
        """All parameters of the kernel in order. Triton's own look-up by every argument is what this leaves out."""
        key = (kernel.__name__, tiles, *self.key)
        if compiled := _compiled.get(key):
            compiled[(programs, 1, 1)](*arguments)
            return
        compiled = kernel[(programs,)](*arguments, num_warps=tiles.warps, num_stages=stages)
        if not INTERPRETED:
            _compiled[key] = compiled

    def cut(self, parts: int, sums: int) -> tuple[int, int]:
        """(tokens a segment, segments), with so many programs a row, head and segment."""
        rows = self.B * self.H
        wanted = self.segments or _segmentation(rows * parts, rows * sums, _over(self.T, 64), self.processors)
        segment = max(64, _over(_over(self.T, wanted), 64) * 64)
        if self.tiles and self.tiles.chunk > 64:
            segment = _over(segment, self.tiles.chunk) * self.tiles.chunk
        return segment, max(1, _over(self.T, segment))

    def describe(self, tiles: Tiles, *tensors: Tensor) -> bool:
        """Whether to load all of these by descriptor. Making them takes longer than small calls gain by it."""
        if not (tiles.described and self.describes and self.cu_seqlens is None):
            return False
        return (self.tiles is not None or tensors[0].numel() >= 2**26) and all(_describable(x) for x in tensors)

    def empty_state(self, *leading: int) -> Tensor:
        """[*leading, H, K, V] in float32, or nothing."""
        shape = (*leading, self.H, self.K, self.V) if leading else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.log_decay if self.cu_seqlens is None else self.cu_seqlens, self.log_decay

    def sum_segments(
        self, tiles: Tiles, cut: tuple[int, int], k: Tensor, v: Tensor, q: Tensor, d_output: Tensor, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """The local states of the forward walk and, in backward, of the other one."""
        width, block = min(tiles.slice, _block(self.V, self.dtype)), _block(self.K, self.dtype)
        local = self.empty_state(self.B, cut[1])
        d_local = self.empty_state(self.B, cut[1]) if backward else local
        described = self.describe(tiles, k, v, q, d_output)
        C = tiles.chunk
        programs = self.B * (1 + backward) * self.H * (cut[1] - 1) * _over(self.V, width)
        arguments = (
            _as(k, C, block, described), _as(v, C, width, described), local,
            _as(q, C, block, described), _as(d_output, C, width, described), d_local, *self.bounds(),
            *k.stride(), *v.stride(), *q.stride(), *d_output.stride(), self.T, self.H, self.N, *cut,
            self.K, self.V, block, width, C, described, self.cu_seqlens is not None, backward,
        )  # fmt: skip
        self.launch(_segments_kernel, programs, tiles, min(2, tiles.stages), arguments)
        return local, d_local


def _describable(x: Tensor) -> bool:
    """Whether the hardware's tensor descriptors can name x."""
    aligned = all(
        s > 0 and s * x.element_size() % 16 == 0 for s, n in zip(x.stride(), x.shape[:3], strict=False) if n > 1
    )
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned and x.numel() > 0


def _as(x: Tensor, chunk: int, width: int, described: bool) -> Any:
    """x, or a descriptor of its tiles [1, chunk, 1, width]."""
    if not described:
        return x
    strides = [s if n > 1 else 128 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, chunk, 1, width])


_NO_STRIDES = (0, 0, 0, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    *, tiles: Tiles | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, last state)."""
    call = _Call(q, k, v, log_decay, cu_seqlens, tiles, segments, (state,))
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = call.empty_state(call.N)
    if last.numel() == 0:
        return output, last

    def launch(tiles: Tiles) -> None:
        slices = _over(call.V, tiles.slice)
        cut = call.cut(slices, slices)
        local = call.sum_segments(tiles, cut, k, v, k, v, False)[0] if cut[1] > 1 else last
        described = call.describe(tiles, q, k, v)
        C, block = tiles.chunk, _block(call.K, call.dtype)
        arguments = (
            _as(q, C, block, described), _as(k, C, block, described), _as(v, C, tiles.slice, described), output,
            last if state is None else state, last, local, *call.bounds(), *q.stride(), *k.stride(), *v.stride(),
            *(_NO_STRIDES if state is None else state.stride()), call.T, call.H, call.N, *cut,
            call.K, call.V, block, tiles.slice, C, described, cu_seqlens is not None, state is not None, cut[1] > 1,
        )  # fmt: skip
        call.launch(_forward_kernel, call.B * call.H * cut[1] * slices, tiles, tiles.stages, arguments)

    call.run("forward", lambda: choices(call.K, call.V, call.dtype, call.shared), launch)
    return output, last


def backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
    d_output: Tensor, d_last: Tensor | None, *, tiles: Tiles | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the incoming state (empty where there was none)."""
    call = _Call(q, k, v, log_decay, cu_seqlens, tiles, segments, (state, d_output, d_last))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_state = call.empty_state(*(() if state is None else (call.N,)))
    if call.N * call.H == 0:
        return dq, dk, dv, d_state
    BK, BV = _block(call.K, call.dtype), _block(call.V, call.dtype)
    rows = call.B * call.H

    def parts(width: int) -> int:
        return 2 * _over(call.K, width) + _over(call.V, width)

    def launch(tiles: Tiles) -> None:
        SK, SV = min(tiles.slice, BK), min(tiles.slice, BV)
        programs = 2 * _over(call.K, SK) + _over(call.V, SV)
        cut = call.cut(programs, 2 * _over(call.V, SV))
        sums = call.sum_segments(tiles, cut, k, v, q, d_output, True) if cut[1] > 1 else (d_state, d_state)
        described = call.describe(tiles, q, k, v, d_output)
        blocks = ((q, BK), (k, BK), (v, BV), (d_output, BV), (q, SK), (k, SK), (d_output, SV))
        arguments = (
            *(_as(x, tiles.chunk, width, described) for x, width in blocks), dq, dk, dv,
            d_state if state is None else state, d_state if d_last is None else d_last, d_state, *sums, *call.bounds(),
            *q.stride(), *k.stride(), *v.stride(), *d_output.stride(),
            *(_NO_STRIDES if state is None else state.stride()), *(_NO_STRIDES if d_last is None else d_last.stride()),
            call.T, call.H, call.N, *cut, call.K, call.V, BK, BV, SK, SV, tiles.chunk, described,
            cu_seqlens is not None, state is not None, d_last is not None, cut[1] > 1,
        )  # fmt: skip
        call.launch(_backward_kernel, rows * cut[1] * programs, tiles, tiles.stages, arguments)

    def candidates() -> list[Tiles]:
        widest = max(call.K, call.V)
        return choices(widest, widest, call.dtype, call.shared, paired=rows * parts(64) > call.processors)

    call.run("backward", candidates, launch)
    return dq, dk, dv, d_state


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, new_state: Tensor, output: Tensor
) -> None:
    """One token, [B, 1, H, K]: fills `output` and `new_state`, which may be `state`."""
    call = _Call(q, k, v, log_decay, None, None, None, (state, new_state))
    if call.B * call.H == 0:
        return
    wide = 32 if call.V > 16 else 16
    arguments = (
        q, k, v, output, new_state if state is None else state, new_state, call.log_decay,
        q.stride(0), q.stride(2), q.stride(3), k.stride(0), k.stride(2), k.stride(3),
        v.stride(0), v.stride(2), v.stride(3), *(_NO_STRIDES if state is None else state.stride()),
        *new_state.stride(), call.H, call.K, call.V, triton.next_power_of_2(call.K), wide, state is not None,
    )  # fmt: skip
    programs = call.B * call.H * _over(call.V, wide)
    call.run(
        "step", lambda: [Tiles(1, wide, 4, 1)], lambda tiles: call.launch(_step_kernel, programs, tiles, 1, arguments)
    )


# Registration: torch.compile and CUDA graphs see four ops. torch.library.custom_op would add milliseconds to a call.


def _define(name: str, schema: str, function: Callable[..., Any]) -> None:
    torch.library.define(f"transnormer::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"transnormer::{name}", "default", function)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay"


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    new_state = torch.empty((q.shape[0], *q.shape[2:], v.shape[3]), dtype=torch.float32, device=q.device)
    step(q, k, v, log_decay, state, new_state, output)
    return output, new_state


def _step_in_place(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    step(q, k, v, log_decay, state, state, output)
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return output


_define("lightning_triton", f"({_TENSORS}, Tensor? state, Tensor? cu_seqlens) -> (Tensor, Tensor)", forward)
_define(
    "lightning_triton_backward",
    f"({_TENSORS}, Tensor? state, Tensor? cu_seqlens, Tensor d_output, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward,
)
_define("lightning_triton_step", f"({_TENSORS}, Tensor? state) -> (Tensor, Tensor)", _step)
_define("lightning_triton_step_", f"({_TENSORS}, Tensor(a!) state) -> Tensor", _step_in_place)


@torch.library.register_fake("transnormer::lightning_triton")
def _(q, k, v, log_decay, state, cu_seqlens):  # type: ignore[no-untyped-def]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), last


@torch.library.register_fake("transnormer::lightning_triton_backward")
def _(q, k, v, log_decay, state, cu_seqlens, d_output, d_last):  # type: ignore[no-untyped-def]
    d_state = q.new_empty((0,) if state is None else state.shape, dtype=torch.float32)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), d_state


@torch.library.register_fake("transnormer::lightning_triton_step")
def _(q, k, v, log_decay, state):  # type: ignore[no-untyped-def]
    new_state = q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), new_state


@torch.library.register_fake("transnormer::lightning_triton_step_")
def _(q, k, v, log_decay, state):  # type: ignore[no-untyped-def]
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _direct(x: Tensor) -> bool:
    """Whether nobody watches: no compiler, no mode, no transform. Then the dispatcher need not see the kernels."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0
    return plain and not torch._C._are_functorch_transforms_active()


def _below(op: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    if _direct(arguments[0]):
        return function(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, *rest = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, rest[0] if rest else None)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_last):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    dq, dk, dv, d_state = _below(
        torch.ops.transnormer.lightning_triton_backward, backward,
        q, k, v, log_decay, state, cu_seqlens, d_output, d_last,
    )  # fmt: skip
    return dq, dk, dv, None, None if state is None else d_state.to(state.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, log_decay, state, cu_seqlens):  # type: ignore[no-untyped-def, override]
        return _below(torch.ops.transnormer.lightning_triton, forward, q, k, v, log_decay, state, cu_seqlens)

    setup_context = staticmethod(_save_for_backward)

    @staticmethod
    def backward(ctx, d_output, d_last):  # type: ignore[no-untyped-def, override]
        return *_differentiate(ctx, d_output, d_last), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, log_decay, state):  # type: ignore[no-untyped-def, override]
        return _below(torch.ops.transnormer.lightning_triton_step, _step, q, k, v, log_decay, state)

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_differentiate)


def _or_apply(function: Any, op: Any, kernels: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd sees: the function where a gradient is wanted, else straight on."""

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return function.apply(*arguments)
        return _below(op, kernels, *arguments)

    return call


_LIBRARY = torch.library.Library("transnormer", "FRAGMENT")
_LIBRARY.impl("lightning_triton", _or_apply(_Attention, torch.ops.transnormer.lightning_triton, forward), "Autograd")
_LIBRARY.impl("lightning_triton_step", _or_apply(_Step, torch.ops.transnormer.lightning_triton_step, _step), "Autograd")
