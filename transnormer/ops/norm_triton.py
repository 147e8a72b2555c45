"""SimpleRMSNorm on the GPU, in Triton, alone or with what stands around it: a residual added
before, a gate after.

    s = x + update (or x)      r = 1 / sqrt(mean(s^2) + eps)      y = r s * gate (or r s)

    ds = r (h - r^2 mean(h s) s) + gradient of s itself, with h = dy * gate      dgate = dy * r s

A row is read once in either direction. r is computed again in backward, from an s that has to be
read anyway. Counted in units of one [rows, D] tensor the norm alone moves 2 and 3, with the
residual 4 and 4, with the gate 3 and 5."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .register import define_backward, differentiable


@triton.jit
def gate_offsets(row, c, g_row, g_head, HEAD: tl.constexpr):
    """Where column c of a row of the gate lies: its rows are cut into pieces of HEAD columns,
    g_head elements apart."""
    return row * g_row + c // HEAD * g_head + c % HEAD


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    x, update, gate, s, y, x_row, u_row, g_row, g_head, rows, eps,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """s and y are contiguous [rows, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (c < D)
    wide = tl.load(x + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        added = wide + tl.load(update + row * u_row + c, mask=mask, other=0.0).to(tl.float32)
        rounded = added.to(s.dtype.element_ty)
        tl.store(s + row * D + c, rounded, mask=mask)
        wide = rounded.to(tl.float32)
    result = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
    if GATED:
        result *= tl.load(
            gate + gate_offsets(row, c, g_row, g_head, HEAD), mask=mask, other=0.0
        ).to(tl.float32)
    tl.store(y + row * D + c, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    s, gate, dy, d_sum, dx, d_gate, s_row, g_row, g_head, dy_row, ds_row, dg_row, dg_head, rows,
    eps,
    D: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """dx is contiguous [rows, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (c < D)
    wide = tl.load(s + row * s_row + c, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(dy + row * dy_row + c, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
    if GATED:
        to = gate_offsets(row, c, dg_row, dg_head, HEAD)
        tl.store(d_gate + to, (h * wide * r).to(d_gate.dtype.element_ty), mask=mask)
        h *= tl.load(gate + gate_offsets(row, c, g_row, g_head, HEAD), mask=mask, other=0.0).to(
            tl.float32
        )
    result = h * r - wide * (r * r * r * (tl.sum(wide * h, axis=1) / D)[:, None])
    if ADDS:
        result += tl.load(d_sum + row * ds_row + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + row * D + c, result.to(dx.dtype.element_ty), mask=mask)


def flat_rows(x: Tensor) -> Tensor:
    """x as [rows, D], columns adjacent; without a copy where strides allow."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def gate_pieces(gate: Tensor | None, flat: Tensor) -> Tensor:
    """A gate [..., D] or [..., H, V] as [rows, H, V], columns adjacent; any such tensor where there
    is none."""
    if gate is None:
        return flat.unsqueeze(1)
    pieces = gate.reshape(flat.shape[0], -1, gate.shape[-1])
    return pieces if pieces.stride(2) == 1 else pieces.contiguous()


def _options(D: int) -> tuple[int, int, int]:
    """(padded D, rows a program, warps): 1,024 numbers or more together, 8 to 32 a thread."""
    block = 1 << (D - 1).bit_length()
    return block, max(1, 1024 // block), min(16, max(4, block // 512))


def _launch(kernel: Any, tensors: Sequence[Tensor], strides: tuple[int, ...], head: int,
            flags: tuple[bool, ...],
            eps: float) -> None:  # fmt: skip
    """tensors: the first is [rows, D]."""
    rows, D = tensors[0].shape
    block, together, warps = _options(D)
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    key = (kinds, strides, D, head, flags)
    arguments = (*tensors, *strides, rows, eps, D, head, block, together, *flags)
    launch(kernel, tensors[0], key, -(-rows // together), arguments, warps=warps)


def forward(
    x: Tensor, update: Tensor | None, gate: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(s, y); s, in x's dtype, is empty without an update. y comes in the dtype asked for."""
    s, y = _fake(x, update, gate, eps, dtype)
    if x.numel():
        flat = flat_rows(x)
        pieces = gate_pieces(gate, flat)
        added = flat if update is None else flat_rows(update)
        strides = (flat.stride(0), added.stride(0), *pieces.stride()[:2])
        flags = (update is not None, gate is not None)
        _launch(norm_kernel, (flat, added, pieces, s, y), strides, pieces.shape[2], flags, eps)
    return s, y


def backward(
    s: Tensor,
    gate: Tensor | None,
    dy: Tensor,
    d_sum: Tensor | None,
    eps: float,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(ds, dgate); dgate is empty without a gate. ds is also the gradient of x and of the update.

    into: where to write dgate, [..., H, V] with rows evenly apart and columns adjacent.
    """
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    d_gate = into
    if d_gate is None:
        d_gate = (
            s.new_empty(0)
            if gate is None
            else torch.empty_like(gate, memory_format=torch.contiguous_format)
        )
    if s.numel():
        flat, g = flat_rows(s), flat_rows(dy)
        pieces = gate_pieces(gate, flat)
        written = pieces if gate is None else d_gate.view(flat.shape[0], *pieces.shape[1:])
        along = g if d_sum is None else flat_rows(d_sum)
        strides = (
            flat.stride(0),
            *pieces.stride()[:2],
            g.stride(0),
            along.stride(0),
            *written.stride()[:2],
        )
        flags = (d_sum is not None, gate is not None)
        _launch(
            norm_backward_kernel,
            (flat, pieces, g, along, ds, written),
            strides,
            pieces.shape[2],
            flags,
            eps,
        )
    return ds, d_gate


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, update, gate, ctx.eps, _ = inputs
    ctx.adds = update is not None
    ctx.save_for_backward(output[0] if ctx.adds else x, gate)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_sum, dy):  # type: ignore[no-untyped-def]
    s, gate = ctx.saved_tensors
    if not ctx.adds:
        d_sum = None
    if dy is None:
        return d_sum, d_sum if ctx.adds else None, None, None, None
    ds, d_gate = _backward(s, gate, dy, d_sum, ctx.eps)
    return ds, ds if ctx.adds else None, None if gate is None else d_gate, None, None


def _fake(x, update, gate, eps, dtype):  # type: ignore[no-untyped-def]
    s = (
        x.new_empty(0)
        if update is None
        else torch.empty_like(x, memory_format=torch.contiguous_format)
    )
    return s, torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _fake_backward(s, gate, dy, d_sum, eps):  # type: ignore[no-untyped-def]
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    return ds, s.new_empty(0) if gate is None else torch.empty_like(
        gate, memory_format=torch.contiguous_format
    )


_backward = define_backward(
    "rms_norm_backward",
    "(Tensor s, Tensor? gate, Tensor dy, Tensor? d_sum, float eps) -> (Tensor, Tensor)",
    backward, _fake_backward, "simple_rms_norm", "those of backend='torch'",
)  # fmt: skip
norm = differentiable(
    "rms_norm",
    "(Tensor x, Tensor? update, Tensor? gate, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    forward, _fake, _save_for_backward, _differentiate,
)  # fmt: skip
