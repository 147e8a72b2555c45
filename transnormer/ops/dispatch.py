"""Which backend of an op runs a call: the one asked for, or the first that can; with the reason
when one cannot."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

_log = logging.getLogger("transnormer")
_said: set[tuple[str, str]] = set()
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # it is imported when a call takes it


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product would take x as: autocast's dtype where it is on (never for float64),
    else its own."""
    kind = x.device.type
    if x.dtype != torch.float64 and autocast_is_on(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def autocast_is_on(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; others than these have none that we know."""
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError where the tensors of a call of `op`, by their names, are not all on one
    device.

    A kernel would read memory of another device as its own. Beside a tensor on meta, torch would
    run only the function that tells an op's shapes, and return memory that nobody has written."""
    first = None
    for x in tensors.values():  # a plain loop, because small models wait for the host
        if x is None:
            continue
        if first is None:
            first = x.device
        elif x.device != first:
            given = {name: x for name, x in tensors.items() if x is not None}
            found = ", ".join(f"{name} on {x.device}" for name, x in given.items())
            hint = (
                "; what is on meta was given no values"
                if any(x.is_meta for x in given.values())
                else ""
            )
            raise ValueError(f"{op}: all tensors must be on one device; got {found}{hint}")


def forward_mode(*tensors: Tensor | None) -> str | None:
    """Why an op without forward-mode derivatives cannot take these tensors, or None: torch.func.jvp
    watches them.

    No tangent would come out of a kernel, and torch would take that for a derivative of zero.
    """
    if forward_ad._current_level < 0:
        return None
    watched = torch._C._are_functorch_transforms_active()
    if watched or any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        return "no forward-mode derivative (torch.func.jvp)"
    return None


def triton_refusal(x: Tensor, *others: Tensor | None, named: bool) -> str | None:
    """Why no Triton kernel can run on these, or None. On the CPU they run in the interpreter, and
    only if named."""
    if refusal := forward_mode(x, *others):
        return refusal
    if x.dtype == torch.float64:
        return "float64 inputs"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (named and _interpreted()):
        return "no CUDA tensor and the interpreter is off" if named else "no CUDA tensor"
    return None


def _interpreted() -> bool:
    from .launch_triton import INTERPRETED

    return INTERPRETED


def choose(op: str, backend: str, refusals: Mapping[str, str | None]) -> str:
    """The name of the backend to run.

    refusals: every backend of the op, best first, with None where it can run this call and else the
    reason why not. Raises ValueError for an unknown backend and RuntimeError, with the reason, for
    one that cannot run this call. "auto" takes the first that can and logs its choice once;
    RuntimeError where none can."""
    if backend == "auto":
        chosen = next((name for name, refusal in refusals.items() if refusal is None), "")
        if not chosen:
            reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
            raise RuntimeError(f"{op}: no backend can run this call: {reasons}")
        # a log line would break the graph
        if not torch.compiler.is_compiling() and (op, chosen) not in _said:
            _said.add((op, chosen))
            passed_over = "".join(f"; not {name}: {why}" for name, why in refusals.items() if why)
            _log.info("%s runs on backend %s%s", op, chosen, passed_over)
        return chosen
    if backend not in refusals:
        raise ValueError(f"{op}: no backend {backend!r}; there are auto, {', '.join(refusals)}")
    if refusal := refusals[backend]:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {refusal}")
    return backend
