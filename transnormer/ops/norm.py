"""SimpleRMSNorm: root-mean-square norm without a gain (paper equation 14)."""

from __future__ import annotations

import torch
from torch import Tensor


def simple_rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension.

    x: [..., D], any floating dtype. Computed in at least float32; returned in x's dtype. There are no parameters.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
