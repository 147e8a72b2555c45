"""LRPE: linearized relative position encoding by learned angles (paper equation 9), after swish as
the mixer has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_devices, choose, triton_refusal


def angles(positions: Tensor, theta: Tensor, dtype: torch.dtype) -> Tensor:
    """positions x theta modulo 2 pi, [*positions, *theta], in float32 (float64 where `dtype` is).

    The product is taken in float64: at position 1,000,000 a float32 product is off by 3e-2 radians.
    """
    places = positions.double().reshape(*positions.shape, *[1] * theta.dim())
    turns = torch.remainder(places * theta.double(), 2 * torch.pi)
    return turns if dtype == torch.float64 else turns.float()


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta t), x sin(theta t)]: then q_t . k_s = sum_j q_j k_j cos(theta_j (t - s)).

    x: [B, T, H, K]; theta: [H, K] radians a token; positions: integers [T] or [B, T]. Returns [B,
    T, H, 2 K]. Raises ValueError where the tensors are not on one device."""
    check_devices("lrpe", x=x, theta=theta, positions=positions)
    turns = angles(positions, theta, x.dtype)  # [T, H, K] or [B, T, H, K]
    return torch.cat([x * turns.cos().to(x.dtype), x * turns.sin().to(x.dtype)], dim=-1)


def swish_lrpe(
    q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """lrpe(swish(q)) and lrpe(swish(k)), in one kernel a direction where Triton runs.

    q, k: [B, T, H, K] of one dtype, any strides. Gradients of q, k and theta. Other arguments as in
        `lrpe`.
    backend: "auto", "triton" or "torch", which has forward-mode and second derivatives too. Raises
    ValueError where the tensors are not on one device, RuntimeError where the named backend cannot
    run the call."""
    check_devices("swish_lrpe", q=q, k=k, theta=theta, positions=positions)
    refusals = {"triton": _triton_refusal(q, k, theta, named=backend == "triton"), "torch": None}
    if choose("swish_lrpe", backend, refusals) == "triton":
        from . import lrpe_triton

        return lrpe_triton.swish_lrpe(q, k, theta, positions)
    return lrpe(F.silu(q), theta, positions), lrpe(F.silu(k), theta, positions)


def _triton_refusal(q: Tensor, k: Tensor, theta: Tensor, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if q.shape != k.shape or q.dtype != k.dtype:
        return "q and k differ in shape or dtype"
    if q.shape[-1] > 1_024:
        return f"K = {q.shape[-1]} is more than 1,024"
    return triton_refusal(q, k, theta, named=named)
