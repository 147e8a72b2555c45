"""Gated Linear Attention between its projections, as one op: o = norm(attention(swish q, swish k,
v)) * u."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_devices, choose
from .lightning import check, lightning_attention
from .lightning import refusal as attention_refusal
from .norm import refusal as norm_refusal
from .norm import simple_rms_norm


def gated_linear_attention(
    qkvu: Tensor,
    log_decay: Tensor,
    eps: float = 1e-6,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Equation 11 of the paper from the one projection's output to the other's input: ([B, T, H V],
    last state).

    qkvu: [B, T, H, 4, V], columns adjacent: of every head q, k, v and the gate u. Other arguments
    and the state as in `lightning_attention`, eps as in `simple_rms_norm`.
    backend: "auto", "triton" (kernels that write the gradients where the projection's is read) or
    "torch" (the ops one after another, each with its own backend). Derivatives as of
    `lightning_attention`; in forward mode, "torch" runs. Raises ValueError where shapes or devices
    do not fit, RuntimeError where the named backend cannot run the call."""
    if qkvu.dim() != 5 or qkvu.shape[3] != 4:
        raise ValueError(f"qkvu must be [B, T, H, 4, V]; got {list(qkvu.shape)}")
    check_devices(
        "gated_linear_attention", qkvu=qkvu, log_decay=log_decay, state=state, cu_seqlens=cu_seqlens
    )
    v = qkvu[..., 2, :]
    check(v, v, v, log_decay, state, cu_seqlens)
    refusals = {"triton": _triton_refusal(qkvu, state, named=backend == "triton"), "torch": None}
    if choose("gated_linear_attention", backend, refusals) == "triton":
        from . import gla_triton

        y, last, *_ = gla_triton.attend(qkvu, log_decay, state, cu_seqlens, eps)
        return y, last
    q, k, v, u = qkvu.unbind(3)
    mixed, last = lightning_attention(
        F.silu(q), F.silu(k), v, log_decay, state=state, cu_seqlens=cu_seqlens, return_state=True
    )
    return simple_rms_norm(mixed.flatten(-2), eps, gate=u), last


def _triton_refusal(qkvu: Tensor, state: Tensor | None, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if not qkvu.is_contiguous():
        return "qkvu is not contiguous"
    if qkvu.shape[1] == 1:
        return "one token is a step"
    v = qkvu[..., 2, :]
    return attention_refusal(v, v, v, state, named=named) or norm_refusal(
        v.flatten(-2), named=named
    )
