"""What the Triton ops share: cheap launches of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# triton reads it where a kernel is defined, so once is right
INTERPRETED = bool(triton.knobs.runtime.interpret)
_compiled: dict[tuple[Any, ...], Any] = {}
# Whether decoding's kernels begin before the kernel before them has ended (`wait_for_previous`).
# Off until it has been measured.
EARLY = False


def can_begin_early(x: Tensor) -> bool:
    """Whether a kernel on the device of x may be launched with `early`: GPUs since Hopper can."""
    return EARLY and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


@triton.jit
def wait_for_previous(EARLY: tl.constexpr) -> None:
    """The point up to which a kernel that was launched `early` may not read what any kernel before
    it has written, nor write. From here on the kernel after it may begin, which therefore waits
    until this one has ended before it passes its own such point."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch(
    kernel: Any,
    x: Tensor,
    key: tuple[Any, ...],
    programs: int,
    arguments: Sequence[Any],
    *,
    warps: int,
    stages: int = 3,
    early: bool = False,
) -> None:
    """Launch a kernel on the device of x, with all of its parameters in order.

    key: all that the code compiled for these arguments depends on. Triton would find the same by
        looking at every argument, which takes tens of microseconds a call.
    early: the kernel may begin while the one before it still runs; it calls `wait_for_previous`.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return launch(
                kernel, x, key, programs, arguments, warps=warps, stages=stages, early=early
            )
    key = (kernel.__name__, x.device.index, warps, stages, early, *key)
    if found := _compiled.get(key):
        found[(programs, 1, 1)](*arguments)
        return None
    options = {"launch_pdl": True} if early else {}
    compiled = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, **options)
    if not INTERPRETED:
        if len(_compiled) >= 16_384:  # of as many strides and alignments
            _compiled.clear()
        _compiled[key] = compiled
    return None
