"""What the Triton ops share: cheap launches of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# triton reads it where a kernel is defined, so once is right
INTERPRETED = bool(triton.knobs.runtime.interpret)
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    x: Tensor,
    key: tuple[Any, ...],
    programs: int,
    arguments: Sequence[Any],
    *,
    warps: int,
    stages: int = 3,
) -> None:
    """Launch a kernel on the device of x, with all of its parameters in order.

    key: all that the code compiled for these arguments depends on. Triton would find the same by
        looking at every argument, which takes tens of microseconds a call."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return launch(kernel, x, key, programs, arguments, warps=warps, stages=stages)
    key = (kernel.__name__, x.device.index, warps, stages, *key)
    if found := _compiled.get(key):
        found[(programs, 1, 1)](*arguments)
        return None
    compiled = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages)
    if not INTERPRETED:
        if len(_compiled) >= 16_384:  # of as many strides and alignments
            _compiled.clear()
        _compiled[key] = compiled
    return None
