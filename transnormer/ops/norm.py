"""SimpleRMSNorm: root-mean-square norm without a gain (paper equation 14)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose, triton_refusal


def simple_rms_norm(x: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension.

    x: [..., D], any floating dtype. Computed in at least float32; returned in x's dtype. There are no parameters.
    backend: "auto", "triton" (one kernel a direction) or "torch".
    """
    refusals = {"triton": _triton_refusal(x, named=backend == "triton"), "torch": None}
    if choose("simple_rms_norm", backend, refusals) == "triton":
        from . import norm_triton

        return norm_triton.norm(x, eps)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _triton_refusal(x: Tensor, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if not 1 <= x.shape[-1] <= 16_384:
        return f"D = {x.shape[-1]} is not from 1 to 16,384"
    return triton_refusal(x, named=named, interpreted=_interpreted)


def _interpreted() -> bool:
    from . import norm_triton

    return norm_triton.INTERPRETED
