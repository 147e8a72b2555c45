"""Lightning Attention's forward and backward, as kernels in Triton: which walks they are made of.
`lightning_triton` launches them.

Nothing is stored between the passes. In units of one [B, T, H, 128] tensor, the forward pass reads
3 and writes 1. The backward pass is one launch of three kinds of programs, which read 9 and write
3; two of the reads are shared by dk and dv and come from the cache, so that a profiler counts 10
units in all. (Fusing dk and dv in one program with the
whole state was tried, and is no faster; storing chunk states, one [K, V] float32 each, would add 4
units at C = 64 and 1 at C = 256.) Arithmetic, a token and head: 2 C (K + V) + 4 K V FLOPs forward,
three times that backward; at C = 64, K = V = 128, three tenths of the time its bytes take on
Hopper.

Program ids run over slices first, then segments, heads, rows: neighbours share what they read."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .lightning_segments_triton import UNSPECIALIZED, walk_segment


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    # tensors
    q,  # [B, T, H, K]
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    output,  # [B, T, H, V] contiguous
    state,  # [N, H, K, V], where sequences begin; read if HAS_STATE
    last,  # [N, H, K, V] float32, contiguous: the states at their ends
    local,  # [B, segments, H, K, V], from `segments_kernel`; read if SEGMENTED
    cu_seqlens,  # [N + 1], read if PACKED
    log_decay,  # [H]
    # strides: (row, token, head, column), and of states (sequence, head, row, column)
    q_strides,
    k_strides,
    v_strides,
    state_strides,
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
    DESCRIBED: tl.constexpr,  # q, k and v are tensor descriptors
    PACKED: tl.constexpr,  # sequences lie one after another in one row
    HAS_STATE: tl.constexpr,
    SEGMENTED: tl.constexpr,  # there are several segments
):
    """The outputs of all tokens, and the states after the last of each sequence."""
    SLICES: tl.constexpr = (V + SLICE - 1) // SLICE
    column = tl.program_id(0) % SLICES * SLICE
    rest = tl.program_id(0) // SLICES
    token_stride = H.to(tl.int64) * V
    row = rest // segments // H
    head = rest // segments % H
    s = rest % segments
    walk_segment(
        left=q,
        right=k,
        value=v,
        output=output,
        raw=output,
        state_in=state,
        state_out=last,
        local=local,
        cu_seqlens=cu_seqlens,
        log_decay=log_decay,
        left_strides=q_strides,
        right_strides=k_strides,
        value_strides=v_strides,
        output_strides=(T * token_stride, token_stride, V),
        raw_strides=(0, 0, 0),
        state_strides=state_strides,
        out_strides=(V, 1),
        row=row,
        head=head,
        s=s,
        column=column,
        sizes=(T, H, N, segment, segments),
        ROWS=K,
        COLUMNS=V,
        BLOCK=BLOCK,
        SLICE=SLICE,
        C=C,
        REVERSE=False,
        DESCRIBED=DESCRIBED,
        SWISHED=False,
        PACKED=PACKED,
        HAS_STATE=HAS_STATE,
        STORE_STATE=True,
        SEGMENTED=SEGMENTED,
        STAGES=None,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    # tensors; q, k and d_output come twice, because a descriptor knows the width that it loads
    q,  # [B, T, H, K], all columns at a time, as the next three
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    d_output,  # [B, T, H, V]
    q_slice,  # [B, T, H, K], a slice at a time, as the next two
    k_slice,  # [B, T, H, K]
    d_output_slice,  # [B, T, H, V]
    dq,  # [B, T, H, K], columns adjacent, as the next two
    dk,  # [B, T, H, K]
    dv,  # [B, T, H, V]
    q_raw,  # [B, T, H, K], columns adjacent; read if SWISHED, as k_raw
    k_raw,  # [B, T, H, K]
    state,  # [N, H, K, V], where sequences begin; read if HAS_STATE
    d_last,  # [N, H, K, V], gradients of their last states; read if HAS_LAST
    d_state,  # [N, H, K, V] float32, contiguous; written if HAS_STATE
    local,  # [B, segments, H, K, V], from `segments_kernel`; read if SEGMENTED, as d_local
    d_local,  # [B, segments, H, K, V]
    cu_seqlens,  # [N + 1], read if PACKED
    log_decay,  # [H]
    # strides: (row, token, head, column), and of states (sequence, head, row, column)
    q_strides,
    k_strides,
    v_strides,
    d_output_strides,
    dk_strides,  # (row, token, head), of dq too
    dv_strides,  # (row, token, head)
    raw_strides,  # (row, token, head), of q_raw and k_raw
    state_strides,
    d_last_strides,
    # sizes
    T,
    H,
    N,  # sequences
    segment,  # tokens of a segment
    segments,
    # compile-time constants
    K: tl.constexpr,
    V: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K, padded
    V_BLOCK: tl.constexpr,  # V, padded
    K_SLICE: tl.constexpr,  # columns of K that a program for dk or dq has
    V_SLICE: tl.constexpr,  # columns of V that a program for dv has
    C: tl.constexpr,  # tokens of a chunk
    DESCRIBED: tl.constexpr,  # the first seven are tensor descriptors
    SWISHED: tl.constexpr,  # q, k are swish of q_raw, k_raw; dq, dk become the gradients of these
    PACKED: tl.constexpr,  # sequences lie one after another in one row
    HAS_STATE: tl.constexpr,
    HAS_LAST: tl.constexpr,
    SEGMENTED: tl.constexpr,  # there are several segments
    STAGES: tl.constexpr,  # of the loops for dk and dq, as in `walk`
):
    """The gradients of q, k, v and of the incoming state."""
    OF_K: tl.constexpr = (K + K_SLICE - 1) // K_SLICE
    OF_V: tl.constexpr = (V + V_SLICE - 1) // V_SLICE
    part = tl.program_id(0) % (2 * OF_K + OF_V)
    rest = tl.program_id(0) // (2 * OF_K + OF_V)
    s = rest % segments
    head = rest // segments % H
    row = rest // segments // H
    sizes = (T, H, N, segment, segments)
    if part < OF_K:  # dk, whose state is the transpose of dv's
        walk_segment(
            left=v,
            right=d_output,
            value=q_slice,
            output=dk,
            raw=k_raw,
            state_in=d_last,
            state_out=d_state,
            local=d_local,
            cu_seqlens=cu_seqlens,
            log_decay=log_decay,
            left_strides=v_strides,
            right_strides=d_output_strides,
            value_strides=q_strides,
            output_strides=dk_strides,
            raw_strides=raw_strides,
            state_strides=(
                d_last_strides[0],
                d_last_strides[1],
                d_last_strides[3],
                d_last_strides[2],
            ),
            out_strides=(1, V),
            row=row,
            head=head,
            s=s,
            column=part * K_SLICE,
            sizes=sizes,
            ROWS=V,
            COLUMNS=K,
            BLOCK=V_BLOCK,
            SLICE=K_SLICE,
            C=C,
            REVERSE=True,
            DESCRIBED=DESCRIBED,
            SWISHED=SWISHED,
            PACKED=PACKED,
            HAS_STATE=HAS_LAST,
            STORE_STATE=False,
            SEGMENTED=SEGMENTED,
            STAGES=STAGES,
        )
    elif part < OF_K + OF_V:  # dv, and the gradient of the incoming state
        walk_segment(
            left=k,
            right=q,
            value=d_output_slice,
            output=dv,
            raw=dv,
            state_in=d_last,
            state_out=d_state,
            local=d_local,
            cu_seqlens=cu_seqlens,
            log_decay=log_decay,
            left_strides=k_strides,
            right_strides=q_strides,
            value_strides=d_output_strides,
            output_strides=dv_strides,
            raw_strides=(0, 0, 0),
            state_strides=d_last_strides,
            out_strides=(V, 1),
            row=row,
            head=head,
            s=s,
            column=(part - OF_K) * V_SLICE,
            sizes=sizes,
            ROWS=K,
            COLUMNS=V,
            BLOCK=K_BLOCK,
            SLICE=V_SLICE,
            C=C,
            REVERSE=True,
            DESCRIBED=DESCRIBED,
            SWISHED=False,
            PACKED=PACKED,
            HAS_STATE=HAS_LAST,
            STORE_STATE=HAS_STATE,
            SEGMENTED=SEGMENTED,
            STAGES=None,
        )
    else:  # dq, whose state is the transpose of the forward's
        walk_segment(
            left=d_output,
            right=v,
            value=k_slice,
            output=dq,
            raw=q_raw,
            state_in=state,
            state_out=d_state,
            local=local,
            cu_seqlens=cu_seqlens,
            log_decay=log_decay,
            left_strides=d_output_strides,
            right_strides=v_strides,
            value_strides=k_strides,
            output_strides=dk_strides,
            raw_strides=raw_strides,
            state_strides=(state_strides[0], state_strides[1], state_strides[3], state_strides[2]),
            out_strides=(1, V),
            row=row,
            head=head,
            s=s,
            column=(part - OF_K - OF_V) * K_SLICE,
            sizes=sizes,
            ROWS=V,
            COLUMNS=K,
            BLOCK=V_BLOCK,
            SLICE=K_SLICE,
            C=C,
            REVERSE=False,
            DESCRIBED=DESCRIBED,
            SWISHED=SWISHED,
            PACKED=PACKED,
            HAS_STATE=HAS_STATE,
            STORE_STATE=False,
            SEGMENTED=SEGMENTED,
            STAGES=STAGES,
        )
