"""The step of one token of Lightning Attention, as a kernel in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .launch_triton import wait_for_previous
from .lightning_walk_triton import state_offsets


@triton.jit(do_not_specialize=["H"])
def step_kernel(
    # tensors
    q,  # [B, H, K]
    k,  # [B, H, K]
    v,  # [B, H, V]
    output,  # [B, H, V] contiguous
    state,  # [N, H, K, V], read if HAS_STATE
    new_state,  # [N, H, K, V], which may be `state`
    log_decay,  # [H]
    slots,  # [B], which of the N states each row has, or -1; read if HAS_SLOTS
    # strides: (row, head, column), and of states (slot, head, row, column)
    q_strides,
    k_strides,
    v_strides,
    state_strides,
    new_state_strides,
    # sizes
    H,
    # compile-time constants
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # K, padded
    SLICE: tl.constexpr,  # columns of V that a program has
    HAS_STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    SWISH: tl.constexpr,  # of q and k
    EARLY: tl.constexpr,
):
    """state <- lambda state + k^T v; output = q state. With SWISH, of swish(q) and swish(k).

    Without slots, a row's state is where the row is. No state is read or written for a row whose
    slot is -1."""
    wait_for_previous(EARLY)  # because a step of the same state may have been just before
    SLICES: tl.constexpr = (V + SLICE - 1) // SLICE
    column = tl.program_id(0) % SLICES * SLICE
    rest = tl.program_id(0) // SLICES
    head = (rest % H).to(tl.int64)
    row = (rest // H).to(tl.int64)
    r = tl.arange(0, BLOCK)
    c = column + tl.arange(0, SLICE)
    qt = _load(q, q_strides, row, head, r, K)  # [BLOCK]
    kt = _load(k, k_strides, row, head, r, K)  # [BLOCK]
    vt = _load(v, v_strides, row, head, c, V)  # [SLICE]
    if SWISH:
        qt *= tl.sigmoid(qt)
        kt *= tl.sigmoid(kt)
    s = kt[:, None] * vt[None, :]  # [BLOCK, SLICE]
    place = row
    if HAS_SLOTS:
        place = tl.load(slots + row).to(tl.int64)
    if HAS_STATE:
        offsets, mask = state_offsets(
            column, state_strides[2], state_strides[3], K, V, BLOCK, SLICE
        )
        if HAS_SLOTS:
            mask = mask & (place >= 0)
        at = state + place * state_strides[0] + head * state_strides[1] + offsets
        old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        s += tl.exp(tl.load(log_decay + head).to(tl.float32)) * old
    offsets, mask = state_offsets(
        column, new_state_strides[2], new_state_strides[3], K, V, BLOCK, SLICE
    )
    if HAS_SLOTS:
        mask = mask & (place >= 0)
    at = new_state + place * new_state_strides[0] + head * new_state_strides[1] + offsets
    tl.store(at, s.to(new_state.dtype.element_ty), mask=mask)
    result = tl.sum(qt[:, None] * s, axis=0)  # [BLOCK] @ [BLOCK, SLICE]
    tl.store(output + (row * H + head) * V + c, result.to(output.dtype.element_ty), mask=c < V)


@triton.jit
def _load(
    x,  # [B, H, WIDTH]
    strides,
    row,
    head,
    columns,
    WIDTH: tl.constexpr,
):
    """Columns of a row and head of x in float32, zero beyond the width."""
    mask = columns < WIDTH
    at = x + row * strides[0] + head * strides[1] + columns * strides[2]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)
