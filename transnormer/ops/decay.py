"""What a log_decay may be, and how one of minus infinity is computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from .register import direct

# A stronger decay is as strong: exp(-1000) is 0 in float64. It stands for -inf, whose product with
# 0 tokens is NaN. The Triton kernels have the same number.
STRONGEST = -1_000.0


def finite(log_decay: Tensor) -> Tensor:
    """[H] in float64, with `STRONGEST` in the place of all that is stronger."""
    return log_decay.double().clamp(min=STRONGEST)


def check_decay(log_decay: Tensor, heads: int) -> None:
    """Raises ValueError where this is not one decay a head: [heads] real numbers from -inf to 0,
    without gradient.

    The numbers are looked at on the CPU only: a GPU would be waited for.
    """
    if log_decay.shape != (heads,):
        raise ValueError(
            f"log_decay must be [{heads}], one number a head; got {list(log_decay.shape)}"
        )
    if log_decay.is_complex() or log_decay.dtype == torch.bool:
        raise ValueError(f"log_decay must be real numbers; got {log_decay.dtype}")
    if log_decay.requires_grad:
        raise ValueError(
            "log_decay is fixed and gets no gradient; detach it (learned decay diverges: paper "
            "section 3.1)"
        )
    if log_decay.is_cpu and direct(log_decay) and not bool((log_decay <= 0).all()):
        raise ValueError(
            f"log_decay is the logarithm of a decay, from -inf to 0; got {log_decay.tolist()}"
        )
