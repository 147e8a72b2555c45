"""Lightning Attention's kernels, in Triton: forward, backward, and the one-token step.
`lightning_triton` launches them.

One walk does everything. A program owns a row, a head and a slice of V, keeps its state [K, slice]
on chip in float32 and walks along time in chunks of C tokens, reading q, k, v once and writing the
output once. With D_t the gradient of the state after token t, the gradients are the same walk with
other tensors in the three places:

    o_t  = sum of s <= t: lambda^(t-s) (q_t . k_s)  v_s  state S   = sum lambda^. k^T v   rightwards
    dq_t = sum of s <= t: lambda^(t-s) (do_t . v_s) k_s  state S^T = sum lambda^. v^T k   rightwards
    dk_t = sum of s >= t: lambda^(s-t) (v_t . do_s) q_s  state D^T = sum lambda^. do^T q  leftwards
    dv_t = sum of s >= t: lambda^(s-t) (k_t . q_s)  do_s  state D   = sum lambda^. q^T do  leftwards

Nothing is stored between the passes. Counted in units of one [B, T, H, 128] tensor, the forward
moves 4 and the backward, one launch of three kinds of programs, 12, of which dk and dv share two
reads through the cache: 10, as a profiler counts too. (Fusing dk and dv in one program with the
whole state was tried, and is no faster; storing chunk states, one [K, V] float32 each, would add 4
units at C = 64 and 1 at C = 256.) Arithmetic, a token and head: 2 C (K + V) + 4 K V FLOPs forward,
three times that backward; at C = 64, K = V = 128, three tenths of the time its bytes take on
Hopper.

Where rows x heads x slices do not fill the GPU, time is cut in segments: a first launch sums the
state of every segment alone (in backward, of both directions), the walk of a segment starts from
the decayed sum of those before it. A segment's sum starts where lambda^distance is still above
float32's smallest number. Packed rows are cut alike, at the same places: a program walks whatever
sequences, or parts of them, lie in its segment, so the grid depends on T alone and nothing about
cu_seqlens is read on the host."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_PTX = tl.constexpr(not INTERPRETED and torch.version.hip is None)
_PRECISION = tl.constexpr("ieee")  # of float32 products
_UNSPECIALIZED = ["T", "H", "N", "segment", "segments"]


# Device functions. A tensor comes as a pointer and its strides (b, t, h, c), or DESCRIBED by a
# tensor descriptor.


@triton.jit
def _dot(a, b, added=None):
    """a b + added in float32, with full-precision products."""
    if _INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if added is not None and a.dtype == tl.float32:
        # Each addition rounds in proportion to the accumulator, so the terms of one chunk are
        # summed by themselves first. This is written as a difference, because the compiler would
        # fuse a sum into one product that adds to `added`.
        return added - tl.dot(-a, b, input_precision=_PRECISION)
    return tl.dot(a, b, added, input_precision=_PRECISION)


@triton.jit
def _sigmoid(x):
    """Of float32, to a few of its last bits: an instruction for the exponential, one for the
    division (Triton's: 15)."""
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
def _place(x, row, head, x_b, x_h, DESCRIBED: tl.constexpr):
    """Where a row and head begin."""
    if DESCRIBED:
        return x
    else:
        return x + row.to(tl.int64) * x_b + head.to(tl.int64) * x_h


@triton.jit
def _load(
    x, row, head, first, start, stop, column, x_t, x_c,
    C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[C, BLOCK]: tokens from `first` on, columns from `column` on.

    Zero beyond the width and beyond the end of start … stop - 1 that the walk leaves by (described:
    beyond the row's)."""
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
    """The state after a chunk of `count` tokens: lambda^count state + k^T v with every token
    decayed to the far end."""
    left = tl.maximum(count - along if REVERSE else count - 1 - along, 0)
    after = tl.where(along < count, tl.exp(rate * left), 0.0)
    decayed = (v.to(tl.float32) * after[:, None]).to(v.dtype)
    return _dot(tl.trans(k), decayed, state * tl.exp(rate * count))


@triton.jit
def _read(q, state):
    """q times the state, which is rounded to q's dtype; float16 would overflow where bfloat16 does
    not."""
    if q.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(state), axis=1), axis=0)
        shrink = tl.minimum(32768.0 / tl.maximum(top, 1.0), 1.0)
        return _dot(q, (state * shrink).to(q.dtype)) / shrink
    else:
        return _dot(q, state.to(q.dtype))


@triton.jit
def _walk(
    q, k, v, output, raw, state, rate, row, head, start, stop, column,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, o_t, r_t,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DESCRIBED: tl.constexpr, SWISHED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walks tokens start … stop - 1 of one row and head, writes their output, returns the state at
    the far end.

    SWISHED: the output is a gradient of swish(raw), and becomes that of raw. STAGES: of the loop's
    loads, raw's too; with None the launch's, of what products read alone.

    The last chunk of a walk may be short. What lies beyond it is read by no token of it, being
    later along the walk."""
    q = _place(q, row, head, q_b, q_h, DESCRIBED)
    k = _place(k, row, head, k_b, k_h, DESCRIBED)
    v = _place(v, row, head, v_b, v_h, DESCRIBED)
    i = tl.arange(0, C)
    along = C - 1 - i if REVERSE else i  # steps from where the walk enters the chunk
    distance = along[:, None] - (C - 1 - i if REVERSE else i)[None, :]
    inside = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)  # [C, C]
    # what a token sees of the incoming state
    before = tl.exp(rate * (along if REVERSE else along + 1))
    for n in tl.range(tl.cdiv(stop - start, C), num_stages=STAGES):
        first = stop - (n + 1) * C if REVERSE else start + n * C
        count = tl.minimum(stop - start - n * C, C)
        qc = _load(q, row, head, first, start, stop, 0, q_t, q_c, C, K, BK, REVERSE, DESCRIBED)
        kc = _load(k, row, head, first, start, stop, 0, k_t, k_c, C, K, BK, REVERSE, DESCRIBED)
        vc = _load(v, row, head, first, start, stop, column, v_t, v_c, C, V, BV, REVERSE, DESCRIBED)
        scores = (_dot(qc, tl.trans(kc)) * inside).to(vc.dtype)
        result = _dot(scores, vc, _read(qc, state) * before[:, None])
        state = _absorb(state, kc, vc, rate, along, count, REVERSE)
        # by halves of the columns: all at once spills registers
        PARTS: tl.constexpr = 2 if SWISHED else 1
        if SWISHED:
            left, right = tl.split(result.reshape(C, 2, BV // 2).permute(0, 2, 1))
        for part in tl.static_range(PARTS):
            columns = column + tl.arange(0, BV // PARTS) + part * (BV // PARTS)
            mask = (along < count)[:, None] & (columns < V)[None, :]
            if SWISHED:  # added to the pointer one by one: offsets summed first take more registers
                at = (
                    raw
                    + first.to(tl.int64) * r_t
                    + i.to(tl.int64)[:, None] * r_t
                    + columns[None, :]
                )
                x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                share = _sigmoid(x)
                result = (left if part == 0 else right) * (share + share * (x - x * share))
            at = (
                output + first.to(tl.int64) * o_t + i.to(tl.int64)[:, None] * o_t + columns[None, :]
            )
            tl.store(at, result.to(output.dtype.element_ty), mask=mask)
    return state


@triton.jit
def _count(cu_seqlens, N, lo, hi):
    """Count the sequences that end at or before `lo` but do not begin there, and those that begin
    before `hi`."""
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
def _rate(log_decay, head):
    """A head's log_decay; -1000 where it is stronger, as `decay.STRONGEST` has it: -inf times 0
    tokens would be NaN."""
    rate = tl.load(log_decay + head).to(tl.float32)
    return tl.where(rate < -1000.0, -1000.0, rate)


@triton.jit
def _reach(rate):
    """Tokens after which nothing of a state is left: exp(-104) is zero in float32."""
    return (104.0 / tl.maximum(-rate, 1e-7)).to(tl.int32)


@triton.jit
def _program(
    q, k, v, output, raw, state_in, state_out, local, cu_seqlens, log_decay, row, head, s, column,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, o_b, o_t, o_h, r_b, r_t, r_h,
    in_n, in_h, in_k, in_v, out_k, out_v, T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, DESCRIBED: tl.constexpr, SWISHED: tl.constexpr,
    PACKED: tl.constexpr, HAS_STATE: tl.constexpr, STORE_STATE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All sequences, or parts of them, in segment s of one row, for one head and slice.

    Columns of the output and of raw are adjacent; outgoing states [N, H, K, V] and local ones [B,
    segments, H, K, V] are contiguous."""
    rate = _rate(log_decay, head)
    lo = s * segment
    hi = tl.minimum(lo + segment, T)
    wide_row = row.to(tl.int64)
    wide_head = head.to(tl.int64)
    output += wide_row * o_b + wide_head * o_h
    if SWISHED:
        raw += wide_row * r_b + wide_head * r_h
    state_in += wide_head * in_h
    state_out += wide_head * (K * V)
    local += (wide_row * segments * H + wide_head) * (K * V)
    apart = H.to(tl.int64) * (K * V)
    if PACKED:
        past, begun = _count(cu_seqlens, N, lo, hi)
        begun = tl.where(s == segments - 1, N, begun)
    else:
        past = row
        # This adds 1, but only at run time, so that what follows stays a loop: Triton frees a
        # loop's buffers at its end.
        begun = row + tl.minimum(segments, 1)
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
            state += tl.load(
                state_in + n.to(tl.int64) * in_n + offsets, mask=mask, other=0.0
            ) * tl.exp(rate * away)
        if SEGMENTED:  # the segments between the sequence's end and this one
            offsets, mask = _state_offsets(column, out_k, out_v, K, V, BK, BV)
            seen = _reach(rate)
            left = tl.maximum(begin, lo - tl.minimum(seen, lo)) // segment
            right = tl.cdiv(tl.minimum(end, hi + tl.minimum(seen, T - hi)), segment)
            for t in range(s + 1 if REVERSE else left, right if REVERSE else s):
                away = t * segment - stop if REVERSE else start - (t + 1) * segment
                state += tl.load(local + apart * t + offsets, mask=mask, other=0.0) * tl.exp(
                    rate * away
                )
        state = _walk(
            q, k, v, output, raw, state, rate, row, head, start, stop, column,
            q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, o_t, r_t,
            K, V, BK, BV, C, REVERSE, DESCRIBED, SWISHED, STAGES,
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
    """The state a segment's own tokens leave at its far end, for the sequence that goes on
    there."""
    rate = _rate(log_decay, head)
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


# Kernels. Program ids run over slices first, then segments, heads, rows: neighbours share what they
# read.


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(
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
    o_t = H.to(tl.int64) * V  # the output is contiguous [B, T, H, V]
    _program(
        q, k, v, output, output, state, last, local, cu_seqlens, log_decay,
        rest // segments // H, rest // segments % H, rest % segments, column,
        q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, T * o_t, o_t, V, 0, 0, 0,
        s_n, s_h, s_k, s_v, V, 1, T, H, N, segment, segments,
        K, V, BK, BV, C, False, DESCRIBED, False, PACKED, HAS_STATE, True, SEGMENTED, None,
    )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_kernel(
    q, k, v, g, q_slice, k_slice, g_slice, dq, dk, dv, q_raw, k_raw, state, d_last, d_state, local,
    d_local,
    cu_seqlens, log_decay,
    q_b, q_t, q_h, q_c, k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, g_b, g_t, g_h, g_c,
    dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, r_b, r_t, r_h, s_n, s_h, s_k, s_v, e_n, e_h, e_k, e_v,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SK: tl.constexpr,
    SV: tl.constexpr,
    C: tl.constexpr, DESCRIBED: tl.constexpr, SWISHED: tl.constexpr, PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_LAST: tl.constexpr, SEGMENTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dq in slices of K, SK wide, dv in slices of V, SV wide. g is d_output; s and e are
    state and d_last.

    Strides of dq are those of dk. SWISHED: q and k are swish of q_raw and k_raw, and dq and dk the
    gradients of these."""
    OF_K: tl.constexpr = (K + SK - 1) // SK
    OF_V: tl.constexpr = (V + SV - 1) // SV
    part = tl.program_id(0) % (2 * OF_K + OF_V)
    rest = tl.program_id(0) // (2 * OF_K + OF_V)
    s = rest % segments
    head = rest // segments % H
    row = rest // segments // H
    if part < OF_K:
        _program(
            v, g, q_slice, dk, k_raw, d_last, d_state, d_local, cu_seqlens, log_decay, row, head, s,
            part * SK,
            v_b, v_t, v_h, v_c, g_b, g_t, g_h, g_c, q_b, q_t, q_h, q_c, dk_b, dk_t, dk_h, r_b, r_t,
            r_h,
            e_n, e_h, e_v, e_k, 1, V, T, H, N, segment, segments,
            V, K, BV, SK, C, True, DESCRIBED, SWISHED, PACKED, HAS_LAST, False, SEGMENTED, STAGES,
        )  # fmt: skip
    elif part < OF_K + OF_V:
        _program(
            k, q, g_slice, dv, dv, d_last, d_state, d_local, cu_seqlens, log_decay, row, head, s,
            (part - OF_K) * SV,
            k_b, k_t, k_h, k_c, q_b, q_t, q_h, q_c, g_b, g_t, g_h, g_c, dv_b, dv_t, dv_h, 0, 0, 0,
            e_n, e_h, e_k, e_v, V, 1, T, H, N, segment, segments,
            K, V, BK, SV, C, True, DESCRIBED, False, PACKED, HAS_LAST, HAS_STATE, SEGMENTED, None,
        )  # fmt: skip
    else:
        _program(
            g, v, k_slice, dq, q_raw, state, d_state, local, cu_seqlens, log_decay, row, head, s,
            (part - OF_K - OF_V) * SK,
            g_b, g_t, g_h, g_c, v_b, v_t, v_h, v_c, k_b, k_t, k_h, k_c, dk_b, dk_t, dk_h, r_b, r_t,
            r_h,
            s_n, s_h, s_v, s_k, 1, V, T, H, N, segment, segments,
            V, K, BV, SK, C, False, DESCRIBED, SWISHED, PACKED, HAS_STATE, False, SEGMENTED, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def segments_kernel(
    k, v, local, q, g, d_local, cu_seqlens, log_decay,
    k_b, k_t, k_h, k_c, v_b, v_t, v_h, v_c, q_b, q_t, q_h, q_c, g_b, g_t, g_h, g_c,
    T, H, N, segment, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DESCRIBED: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """The sums of k^T v of all segments but the last; in backward also those of q^T do of all but
    the first."""
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
def step_kernel(
    q, k, v, output, state, new_state, log_decay, slots,
    q_b, q_h, q_c, k_b, k_h, k_c, v_b, v_h, v_c, s_b, s_h, s_k, s_v, n_b, n_h, n_k, n_v, H,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """state <- lambda state + k^T v; output = q state. `new_state` may be `state`.

    slots: [B], where the state of each row is; -1 for a row without one, of which none is read or
    written."""
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
    place = row
    if HAS_SLOTS:
        place = tl.load(slots + row).to(tl.int64)
    if HAS_STATE:
        offsets, mask = _state_offsets(column, s_k, s_v, K, V, BK, BV)
        if HAS_SLOTS:
            mask = mask & (place >= 0)
        old = tl.load(state + place * s_b + head * s_h + offsets, mask=mask, other=0.0).to(
            tl.float32
        )
        s += tl.exp(tl.load(log_decay + head).to(tl.float32)) * old
    offsets, mask = _state_offsets(column, n_k, n_v, K, V, BK, BV)
    if HAS_SLOTS:
        mask = mask & (place >= 0)
    tl.store(
        new_state + place * n_b + head * n_h + offsets, s.to(new_state.dtype.element_ty), mask=mask
    )
    result = tl.sum(qt[:, None] * s, axis=0)
    tl.store(output + (row * H + head) * V + c, result.to(output.dtype.element_ty), mask=c < V)
