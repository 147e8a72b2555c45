"""Which backend of an op runs a call: the one asked for, or the first that can; with the reason when one cannot."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

import torch

_log = logging.getLogger("transnormer")
_said: set[tuple[str, str]] = set()
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # it is imported when a call takes it


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product would take x as: autocast's dtype where it is on (never for float64), else its own."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def triton_refusal(x: torch.Tensor, *, named: bool) -> str | None:
    """Why no Triton kernel can run on x, or None. On the CPU they run in the interpreter, and only if named."""
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

    refusals: every backend of the op, best first, with None where it can run this call and else the reason why not.
    Raises ValueError for an unknown backend and RuntimeError, with the reason, for one that cannot run this call.
    "auto" takes the first that can and logs its choice once.
    """
    if backend == "auto":
        chosen = next(name for name, refusal in refusals.items() if refusal is None)
        if not torch.compiler.is_compiling() and (op, chosen) not in _said:  # a log line would break the graph
            _said.add((op, chosen))
            passed_over = "".join(f"; not {name}: {why}" for name, why in refusals.items() if why)
            _log.info("%s runs on backend %s%s", op, chosen, passed_over)
        return chosen
    if backend not in refusals:
        raise ValueError(f"{op}: no backend {backend!r}; there are auto, {', '.join(refusals)}")
    if refusal := refusals[backend]:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run this call: {refusal}")
    return backend
