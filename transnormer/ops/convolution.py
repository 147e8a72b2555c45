"""A short causal convolution of each channel: what a token's neighbours add to it, before attention
reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_devices


def short_convolution(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = sum over j < J of weight_j x_(t - j), and the last J - 1 tokens, which the next call
    begins with.

    x: [B, T, C]. weight: [C, J], of each channel first what multiplies the token itself.
    past: [B or N, J - 1, C], the tokens before the first, from the earliest on; None: zeros.
    cu_seqlens: [N + 1], where the one row of x holds N sequences, none of which reads another.
    positions: [B or 1, T], each token's place in its own sequence, where the rows hold parts of
        packed ones and past what lies before the part; tokens before place 0 are not read.
    Sums are in at least float32; y has the dtype of x. Raises ValueError where shapes do not fit.
    """
    check_devices("short_convolution", x=x, weight=weight, past=past, cu_seqlens=cu_seqlens)
    rows = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    channels, taps = weight.shape
    if x.dim() != 3 or x.shape[2] != channels:
        raise ValueError(f"x must be [B, T, {channels}]; got {list(x.shape)}")
    if past is None:
        past = x.new_zeros(rows, taps - 1, channels)
    elif past.shape != (rows, taps - 1, channels):
        raise ValueError(f"past must be [{rows}, {taps - 1}, {channels}]; got {list(past.shape)}")
    past = past.to(x.dtype)
    if cu_seqlens is None:
        row = torch.cat([past, x], dim=1)
        length = x.shape[1]
        earlier = [row[:, taps - 1 - j :][:, :length] for j in range(taps)]
        if positions is not None:
            earlier = [x * (positions >= j)[..., None] for j, x in enumerate(earlier)]
        # a copy, because a view would keep the whole row in memory
        return _weighted(earlier, weight), row[:, length:].clone()
    # Before the tokens of each sequence stand its own J - 1 earlier ones.
    cu = cu_seqlens.to(torch.int64)
    numbers = torch.arange(x.shape[1], device=x.device)
    owner = torch.searchsorted(cu, numbers, right=True) - 1
    at = numbers + (owner + 1) * (taps - 1)
    places = torch.arange(taps - 1, device=x.device)
    ends = cu + torch.arange(rows + 1, device=x.device) * (taps - 1)
    row = x.new_zeros(x.shape[1] + rows * (taps - 1), channels)
    row = row.index_copy(0, at, x[0])
    row = row.index_copy(0, (ends[:-1, None] + places).flatten(), past.flatten(0, 1))
    earlier = [row[at - j][None] for j in range(taps)]
    return _weighted(earlier, weight), row[ends[1:, None] - (taps - 1) + places]


def _weighted(earlier: list[Tensor], weight: Tensor) -> Tensor:
    """The sum of weight[:, j] x earlier[j]."""
    dtype = earlier[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = earlier[0].to(wide) * weight[:, 0].to(wide)
    for j, part in enumerate(earlier[1:], start=1):
        total = total + part.to(wide) * weight[:, j].to(wide)
    return total.to(dtype)
