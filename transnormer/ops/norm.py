"""SimpleRMSNorm: root-mean-square norm without a gain (paper equation 14), alone or with what
stands around it."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_devices, choose, product_dtype, triton_refusal


def simple_rms_norm(
    x: Tensor, eps: float = 1e-6, *, gate: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times a gate where there is one (paper
    equation 11).

    x: [..., D], any floating dtype. Computed in at least float32; returned in x's dtype, or
    autocast's where it is on, for a product is what reads it. There are no parameters.
    gate: [..., D], or [..., H, V] with H V = D, any strides.
    backend: "auto", "triton" (one kernel a direction) or "torch", which is what auto takes while
    torch.compile looks on: it fuses that form with whatever stands around it. Forward-mode and
    second derivatives are torch's, and auto takes it under torch.func.jvp. Raises ValueError where
    shapes or devices do not fit, RuntimeError where the named backend cannot run the call."""
    check_devices("simple_rms_norm", x=x, gate=gate)
    if gate is not None and (
        gate.numel() != x.numel() or x.shape[:-1] != gate.shape[: x.dim() - 1]
    ):
        raise ValueError(
            f"a gate is [..., D] or [..., H, V] like x; got {list(x.shape)} and {list(gate.shape)}"
        )
    if _chosen(x, gate, backend) == "triton":
        from . import norm_triton

        return norm_triton.norm(x, None, gate, eps, product_dtype(x))[1]
    y = _norm(x, eps)
    return y if gate is None else (y * gate.reshape(x.shape)).to(y.dtype)


def add_rms_norm(
    x: Tensor, update: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(x + update, simple_rms_norm(x + update)): one more step of the residual stream, and what the
    next layer reads.

    x, update: [..., D]; the sum has the dtype that torch promotes both to. Other arguments as in
    `simple_rms_norm`."""
    check_devices("add_rms_norm", x=x, update=update)
    if x.shape != update.shape:
        raise ValueError(
            f"x and its update are [..., D] alike; got {list(x.shape)} and {list(update.shape)}"
        )
    if (
        torch.promote_types(x.dtype, update.dtype) == x.dtype
        and _chosen(x, update, backend) == "triton"
    ):
        from . import norm_triton

        return norm_triton.norm(x, update, None, eps, product_dtype(x))
    s = x + update
    return s, simple_rms_norm(s, eps, backend=backend)


def _norm(x: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(product_dtype(x))


def _chosen(x: Tensor, other: Tensor | None, backend: str) -> str:
    if backend == "auto" and torch.compiler.is_compiling():
        return "torch"
    return choose(
        "simple_rms_norm",
        backend,
        {"triton": refusal(x, other, named=backend == "triton"), "torch": None},
    )


def refusal(x: Tensor, other: Tensor | None = None, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if not 1 <= x.shape[-1] <= 16_384:
        return f"D = {x.shape[-1]} is not from 1 to 16,384"
    return triton_refusal(x, other, named=named)
