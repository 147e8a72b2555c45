"""Segments of time in Lightning Attention's kernels: what walks one segment, and what sums the
state that each leaves.

Where rows x heads x slices are too few programs to fill the GPU, time is cut in segments, which run
at the same time. A first launch sums the state that each segment leaves by itself, in the backward
pass for both directions. The walk of a segment then begins with the sum of what the segments before
it left, decayed by the distance. A sum leaves out tokens so far away that float32 holds nothing of
them. Packed rows are cut at the same places: a program walks whatever sequences, or parts of them,
lie in its segment. So the grid depends on T alone, and the host reads nothing of cu_seqlens.

The roles left, right and value, the letters and the strides are those of
`lightning_walk_triton`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .lightning_walk_triton import (
    absorb,
    head_rate,
    load_chunk,
    place,
    reach,
    state_offsets,
    walk,
)

UNSPECIALIZED = ["T", "H", "N", "segment", "segments"]


@triton.jit
def _count(
    cu_seqlens,  # [N + 1]
    N,
    lo,
    hi,
):
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
def walk_segment(
    # tensors
    left,  # [B, T, H, ROWS]
    right,  # [B, T, H, ROWS]
    value,  # [B, T, H, COLUMNS]
    output,  # [B, T, H, COLUMNS]
    raw,  # [B, T, H, COLUMNS], read if SWISHED
    state_in,  # [N, H, ROWS, COLUMNS], where sequences begin; read if HAS_STATE
    state_out,  # [N, H, K, V] contiguous, where they end; written if STORE_STATE
    local,  # [B, segments, H, K, V] contiguous, every segment's own sum; read if SEGMENTED
    cu_seqlens,  # [N + 1], read if PACKED
    log_decay,  # [H]
    # strides
    left_strides,
    right_strides,
    value_strides,
    output_strides,
    raw_strides,
    state_strides,  # of state_in
    out_strides,  # (row, column) of state_out and local
    # where
    row,
    head,
    s,  # the segment
    column,
    sizes,  # (T, H, N, segment, segments), as in `segments_kernel`
    # compile-time constants
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWISHED: tl.constexpr,  # as in `walk`
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    STORE_STATE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    STAGES: tl.constexpr,  # as in `walk`
):
    """Walks all sequences, or parts of them, in segment s of one row, for one head and slice."""
    T, H, N, segment, segments = sizes
    rate = head_rate(log_decay, head)
    lo = s * segment
    hi = tl.minimum(lo + segment, T)
    wide_row = row.to(tl.int64)
    wide_head = head.to(tl.int64)
    output += wide_row * output_strides[0] + wide_head * output_strides[2]
    if SWISHED:
        raw += wide_row * raw_strides[0] + wide_head * raw_strides[2]
    state_in += wide_head * state_strides[1]
    state_out += wide_head * (ROWS * COLUMNS)
    local += (wide_row * segments * H + wide_head) * (ROWS * COLUMNS)
    apart = H.to(tl.int64) * (ROWS * COLUMNS)
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
        state = tl.zeros((BLOCK, SLICE), dtype=tl.float32)
        if HAS_STATE:
            offsets, mask = state_offsets(
                column, state_strides[2], state_strides[3], ROWS, COLUMNS, BLOCK, SLICE
            )
            away = end - stop if REVERSE else start - begin
            state += tl.load(
                state_in + n.to(tl.int64) * state_strides[0] + offsets, mask=mask, other=0.0
            ) * tl.exp(rate * away)
        if SEGMENTED:  # the segments within reach that the walk of this sequence has passed
            offsets, mask = state_offsets(
                column, out_strides[0], out_strides[1], ROWS, COLUMNS, BLOCK, SLICE
            )
            seen = reach(rate)
            low = tl.maximum(begin, lo - tl.minimum(seen, lo)) // segment
            high = tl.cdiv(tl.minimum(end, hi + tl.minimum(seen, T - hi)), segment)
            for t in range(s + 1 if REVERSE else low, high if REVERSE else s):
                away = t * segment - stop if REVERSE else start - (t + 1) * segment
                state += tl.load(local + apart * t + offsets, mask=mask, other=0.0) * tl.exp(
                    rate * away
                )
        state = walk(
            left,
            right,
            value,
            output,
            raw,
            state,
            left_strides,
            right_strides,
            value_strides,
            output_strides[1],
            raw_strides[1],
            rate,
            row,
            head,
            start,
            stop,
            column,
            ROWS,
            COLUMNS,
            BLOCK,
            SLICE,
            C,
            REVERSE,
            DESCRIBED,
            SWISHED,
            STAGES,
        )
        if STORE_STATE:
            offsets, mask = state_offsets(
                column, out_strides[0], out_strides[1], ROWS, COLUMNS, BLOCK, SLICE
            )
            if begin >= lo if REVERSE else end <= hi:
                tl.store(state_out + n.to(tl.int64) * apart + offsets, state, mask=mask)


@triton.jit
def _sum_segment(
    # tensors
    right,  # [B, T, H, K]
    value,  # [B, T, H, V]
    local,  # [B, segments, H, K, V] contiguous
    cu_seqlens,  # [N + 1], read if PACKED
    log_decay,  # [H]
    # strides
    right_strides,
    value_strides,
    # where
    row,
    head,
    s,  # the segment
    column,
    sizes,  # (T, H, N, segment, segments), as in `segments_kernel`
    # compile-time constants
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The state a segment's own tokens leave at its far end, for the sequence that goes on
    there."""
    T, H, N, segment, segments = sizes
    rate = head_rate(log_decay, head)
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
    seen = tl.minimum(reach(rate), stop - start)
    if REVERSE:
        stop = start + seen
    else:
        start = stop - seen
    right = place(right, right_strides, row, head, DESCRIBED)
    value = place(value, value_strides, row, head, DESCRIBED)
    i = tl.arange(0, C)
    along = C - 1 - i if REVERSE else i
    state = tl.zeros((BLOCK, SLICE), dtype=tl.float32)
    for n in range(tl.cdiv(stop - start, C)):
        first = stop - (n + 1) * C if REVERSE else start + n * C
        count = tl.minimum(stop - start - n * C, C)
        tokens = (first, start, stop)
        right_chunk = load_chunk(
            right, right_strides, row, head, tokens, 0, K, BLOCK, C, REVERSE, DESCRIBED
        )
        value_chunk = load_chunk(
            value, value_strides, row, head, tokens, column, V, SLICE, C, REVERSE, DESCRIBED
        )
        state = absorb(state, right_chunk, value_chunk, rate, along, count, REVERSE)
    offsets, mask = state_offsets(column, V, 1, K, V, BLOCK, SLICE)
    local += ((row.to(tl.int64) * segments + s) * H + head) * (K * V)
    tl.store(local + offsets, state, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segments_kernel(
    # tensors
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    local,  # [B, segments, H, K, V] float32, contiguous
    q,  # [B, T, H, K], read if BACKWARD, as the next two
    d_output,  # [B, T, H, V]
    d_local,  # like local
    cu_seqlens,  # [N + 1], read if PACKED
    log_decay,  # [H]
    # strides: (row, token, head, column)
    k_strides,
    v_strides,
    q_strides,
    d_output_strides,
    # sizes
    T,
    H,
    N,  # sequences
    segment,  # tokens of a segment
    segments,
    # compile-time constants
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # K, padded
    SLICE: tl.constexpr,  # columns of V that a program has
    C: tl.constexpr,  # tokens of a chunk
    DESCRIBED: tl.constexpr,  # k, v, q and d_output are tensor descriptors
    PACKED: tl.constexpr,  # sequences lie one after another in one row
    BACKWARD: tl.constexpr,
):
    """The sums of k^T v of all segments but the last; in backward also those of q^T d_output of
    all but the first."""
    SLICES: tl.constexpr = (V + SLICE - 1) // SLICE
    column = tl.program_id(0) % SLICES * SLICE
    rest = tl.program_id(0) // SLICES
    s = rest % (segments - 1)
    head = rest // (segments - 1) % H
    row = rest // (segments - 1) // H
    sizes = (T, H, N, segment, segments)
    if BACKWARD:
        if row % 2 == 1:
            _sum_segment(
                right=q,
                value=d_output,
                local=d_local,
                cu_seqlens=cu_seqlens,
                log_decay=log_decay,
                right_strides=q_strides,
                value_strides=d_output_strides,
                row=row // 2,
                head=head,
                s=s + 1,
                column=column,
                sizes=sizes,
                K=K,
                V=V,
                BLOCK=BLOCK,
                SLICE=SLICE,
                C=C,
                REVERSE=True,
                DESCRIBED=DESCRIBED,
                PACKED=PACKED,
            )
        else:
            _sum_segment(
                right=k,
                value=v,
                local=local,
                cu_seqlens=cu_seqlens,
                log_decay=log_decay,
                right_strides=k_strides,
                value_strides=v_strides,
                row=row // 2,
                head=head,
                s=s,
                column=column,
                sizes=sizes,
                K=K,
                V=V,
                BLOCK=BLOCK,
                SLICE=SLICE,
                C=C,
                REVERSE=False,
                DESCRIBED=DESCRIBED,
                PACKED=PACKED,
            )
    else:
        _sum_segment(
            right=k,
            value=v,
            local=local,
            cu_seqlens=cu_seqlens,
            log_decay=log_decay,
            right_strides=k_strides,
            value_strides=v_strides,
            row=row,
            head=head,
            s=s,
            column=column,
            sizes=sizes,
            K=K,
            V=V,
            BLOCK=BLOCK,
            SLICE=SLICE,
            C=C,
            REVERSE=False,
            DESCRIBED=DESCRIBED,
            PACKED=PACKED,
        )
