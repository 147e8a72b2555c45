"""A short causal convolution of each channel: what a token's neighbours add to it, before attention
reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_devices, choose, forward_mode, triton_refusal

MOST_TAPS = 8  # that the kernels take


def short_convolution(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = sum over j < J of weight_j x_(t - j), and the last J - 1 tokens, which the next call
    begins with.

    x: [B, T, C]. weight: [C, J], of each channel first what multiplies the token itself.
    past: [B or N, J - 1, C], the tokens before the first, from the earliest on; None: zeros.
    cu_seqlens: [N + 1], where the one row of x holds N sequences, none of which reads another.
    positions: without cu_seqlens, [T] or [B or 1, T]: each token's place in its own sequence, where
        the rows hold parts of packed ones and past what lies before the part; tokens before place 0
        are not read.
    Sums are in at least float32; y has the dtype of x.
    backend: "auto", "triton" (one kernel a direction, and a small one for the last tokens) or
    "torch", which has forward-mode and second derivatives too. Raises ValueError where shapes or
    devices do not fit, RuntimeError where the named backend cannot run the call."""
    check_devices(
        "short_convolution",
        x=x,
        weight=weight,
        past=past,
        cu_seqlens=cu_seqlens,
        positions=positions,
    )
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight must be [C, J], J at least 1; got {list(weight.shape)}")
    channels, taps = weight.shape
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x must be [B, T, {channels}]; got {list(x.shape)}")
    if rows < 0:
        raise ValueError("cu_seqlens must be [N + 1]; got no number")
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(f"packed sequences stand in one row; got {x.shape[0]} rows")
    if past is not None and past.shape != (rows, taps - 1, channels):
        raise ValueError(f"past must be [{rows}, {taps - 1}, {channels}]; got {list(past.shape)}")
    if cu_seqlens is not None and positions is not None:
        raise ValueError("positions and cu_seqlens both say where sequences begin: give one")
    length = x.shape[1]
    if positions is not None and positions.shape not in (x.shape[:2], (1, length), (length,)):
        raise ValueError(f"positions must be [B or 1, T] of x; got {list(positions.shape)}")
    past = None if past is None else past.to(x.dtype)
    refusal = _triton_refusal(x, weight, past, named=backend == "triton")
    if choose("short_convolution", backend, {"triton": refusal, "torch": None}) == "triton":
        from . import convolution_triton

        return convolution_triton.convolve(x, weight, past, cu_seqlens, positions)  # type: ignore[no-any-return]
    if past is None:
        past = x.new_zeros(rows, taps - 1, channels)
    if cu_seqlens is not None:
        return _packed(x, weight, past, cu_seqlens)
    row = torch.cat([past, x], dim=1)
    earlier = [row[:, taps - 1 - j :][:, :length] for j in range(taps)]
    if positions is not None:
        earlier = [
            part.masked_fill((positions < j)[..., None], 0) for j, part in enumerate(earlier)
        ]
    # a copy, because a view would keep the whole row in memory
    return _weighted(earlier, weight), row[:, length:].clone()


def short_convolution_step_(
    x: Tensor,
    weight: Tensor,
    memory: Tensor,
    slots: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One token of decoding: y [S, 1, C], while the tokens that are remembered move on in place.

    x: [S, 1, C]. weight: [C, J], as above. memory: [N + 1, J - 1, C], the last tokens of N slots,
        and a place for those of rows without one.
    slots: int64 [S], the slot of each row, or -1 for a row without one, whose y means nothing;
        None: row i is slot i.
    One launch on a GPU, without gradients: raises ValueError where one would be wanted, and as
    `short_convolution` does."""
    check_devices("short_convolution_step_", x=x, weight=weight, memory=memory, slots=slots)
    channels, taps = weight.shape
    if x.dim() != 3 or x.shape[1:] != (1, channels):
        raise ValueError(f"x must be [S, 1, {channels}]; got {list(x.shape)}")
    if memory.dim() != 3 or memory.shape[1:] != (taps - 1, channels):
        raise ValueError(
            f"memory must be [slots, {taps - 1}, {channels}]; got {list(memory.shape)}"
        )
    if slots is None and len(memory) < len(x):
        raise ValueError(f"{len(x)} rows have no slot each in a memory of {len(memory)}")
    if slots is not None and slots.shape != x.shape[:1]:
        raise ValueError(f"slots must be [{len(x)}], one a row; got {list(slots.shape)}")
    if torch.is_grad_enabled() and any(part.requires_grad for part in (x, weight, memory)):
        raise ValueError(
            "short_convolution_step_ has no gradient: call it under torch.no_grad(), or "
            "short_convolution"
        )
    refusals = {
        "triton": _triton_refusal(x, weight, memory, named=backend == "triton"),
        "torch": forward_mode(x, weight, memory),
    }
    if not memory.is_contiguous():
        refusals["triton"] = "memory is not contiguous"
    if choose("short_convolution_step_", backend, refusals) == "triton":
        from . import convolution_triton

        return convolution_triton.step_in_place(x, weight, memory, slots)
    if slots is None:
        slots = torch.arange(len(x), device=x.device)
    y, last = short_convolution(x, weight, memory[slots], backend="torch")
    memory[slots] = last.to(memory.dtype)
    return y


def _triton_refusal(x: Tensor, weight: Tensor, past: Tensor | None, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if not 1 <= weight.shape[1] <= MOST_TAPS:
        return f"J = {weight.shape[1]} is not from 1 to {MOST_TAPS}"
    return triton_refusal(x, weight, past, named=named)


def _packed(x: Tensor, weight: Tensor, past: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`short_convolution` of a row that holds N sequences. past: [N, J - 1, C]."""
    # Before the tokens of each sequence stand its own J - 1 earlier ones.
    rows, before, channels = past.shape
    cu = cu_seqlens.to(torch.int64)
    numbers = torch.arange(x.shape[1], device=x.device)
    owner = torch.searchsorted(cu, numbers, right=True) - 1
    at = numbers + (owner + 1) * before
    places = torch.arange(before, device=x.device)
    ends = cu + torch.arange(rows + 1, device=x.device) * before
    row = x.new_zeros(x.shape[1] + rows * before, channels)
    row = row.index_copy(0, at, x[0])
    row = row.index_copy(0, (ends[:-1, None] + places).flatten(), past.flatten(0, 1))
    earlier = [row[at - j][None] for j in range(before + 1)]
    return _weighted(earlier, weight), row[ends[1:, None] - before + places]


def _weighted(earlier: list[Tensor], weight: Tensor) -> Tensor:
    """The sum of weight[:, j] x earlier[j]."""
    dtype = earlier[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = earlier[0].to(wide) * weight[:, 0].to(wide)
    for j, part in enumerate(earlier[1:], start=1):
        total = total + part.to(wide) * weight[:, j].to(wide)
    return total.to(dtype)
