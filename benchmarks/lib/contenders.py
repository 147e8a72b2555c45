"""What ours is measured against: other libraries' ops, softmax attention, and plain forms of the
same functions."""

# mypy: allow-untyped-defs

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from transnormer.ops import lightning_attention, linear_cross_entropy

# The paper's first algorithm, kept here to be compared with: tiles of the left product, O(T^2)
# work, and nothing of T x T stored.


@triton.jit(do_not_specialize=["T"])
def _left_product_kernel(
    q,
    k,
    v,
    output,
    log_decay,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """output_i = sum over j <= i (REVERSE: j >= i) of lambda^|i-j| (q_i . k_j) v_j, contiguous [B,
    T, H, D]."""
    blocks = tl.cdiv(T, ROWS)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % H
    base = (tl.program_id(0) // blocks // H).to(tl.int64) * T * H * D + head * D
    rate = tl.load(log_decay + head)
    c = tl.arange(0, D)
    i = block * ROWS + tl.arange(0, ROWS)
    at = base + i.to(tl.int64)[:, None] * (H * D) + c[None, :]
    qi = tl.load(q + at, mask=(i < T)[:, None], other=0.0)
    total = tl.zeros((ROWS, D), dtype=tl.float32)
    low = block * ROWS // COLUMNS if REVERSE else 0
    high = tl.cdiv(T, COLUMNS) if REVERSE else tl.cdiv(tl.minimum((block + 1) * ROWS, T), COLUMNS)
    for n in range(low, high):
        j = n * COLUMNS + tl.arange(0, COLUMNS)
        from_ = base + j.to(tl.int64)[:, None] * (H * D) + c[None, :]
        kj = tl.load(k + from_, mask=(j < T)[:, None], other=0.0)
        vj = tl.load(v + from_, mask=(j < T)[:, None], other=0.0)
        distance = (j[None, :] - i[:, None]) if REVERSE else (i[:, None] - j[None, :])
        decay = tl.where(distance >= 0, tl.exp(rate * tl.maximum(distance, 0)), 0.0)
        total = tl.dot((tl.dot(qi, tl.trans(kj)) * decay).to(vj.dtype), vj, total)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=(i < T)[:, None])


class LeftProduct(torch.autograd.Function):
    """Lightning Attention 1: the output, and with other tensors in the three places its
    gradients."""

    @staticmethod
    def launch(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
        output = torch.empty_like(v)
        B, T, H, D = q.shape
        _left_product_kernel[(triton.cdiv(T, 128) * H * B,)](
            q, k, v, output, log_decay, T, H, D, 128, 64, reverse, num_warps=8, num_stages=2
        )
        return output

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v, log_decay)
        return LeftProduct.launch(q, k, v, log_decay, False)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> Any:  # type: ignore[override]
        q, k, v, log_decay = ctx.saved_tensors
        dq = LeftProduct.launch(d_output, v, k, log_decay, False)
        dk = LeftProduct.launch(v, d_output, q, log_decay, True)
        return dq, dk, LeftProduct.launch(k, q, d_output, log_decay, True), None


# Contenders: name -> function of q, k, v [B, T, H, 128] and log_decay [H].

HEADS_FIRST = {"lightning-attn"}  # which want [B, H, T, 128], with nothing copied


def _ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return lightning_attention(q, k, v, log_decay, backend="triton")  # type: ignore[return-value]


def attention_inputs(
    B: int, H: int, T: int, sets: int = 1, heads_first: bool = False
) -> tuple[list[Any], Tensor]:
    """(sets of q, k, v and the output's gradient, log_decay by ALiBi)."""
    log_decay = -torch.exp2(-8 * torch.arange(1, H + 1, device="cuda") / H)
    shape = (B, H, T, 128) if heads_first else (B, T, H, 128)
    tensors = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for _ in range(sets)
    ]
    for q, k, v, _ in tensors:
        k.mul_(0.1)
        for x in (q, k, v):
            x.requires_grad_()
    return tensors, log_decay


def attention_contenders() -> dict[str, Callable[..., Tensor]]:
    def softmax(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        return attend

    found: dict[str, Callable[..., Tensor]] = {
        "ours": _ours,
    }
    with contextlib.suppress(ImportError):
        from fla.ops.simple_gla import chunk_simple_gla, fused_chunk_simple_gla

        found["fla fused"] = lambda q, k, v, decay: fused_chunk_simple_gla(
            q, k, v, g_gamma=decay, scale=1.0
        )[0]
        found["fla chunk"] = lambda q, k, v, decay: chunk_simple_gla(
            q, k, v, g_gamma=decay, scale=1.0
        )[0]
    with contextlib.suppress(ImportError):
        from lightning_attn.ops import lightning_attn_func

        found["lightning-attn"] = lambda q, k, v, decay: lightning_attn_func(
            q, k, v, -decay.view(1, -1, 1, 1)
        )
    found["SDPA cuDNN"] = softmax(SDPBackend.CUDNN_ATTENTION)
    found["SDPA flash"] = softmax(SDPBackend.FLASH_ATTENTION)
    return found


def plain(length: int, log_decay: Tensor) -> Callable[..., Tensor]:
    """Linear attention as written, with its mask made beforehand: it stores [B, H, T, T]."""
    index = torch.arange(length, device="cuda")
    distance = (index[:, None] - index[None, :]).clamp(min=0)
    mask = torch.stack([(rate * distance).exp().tril().bfloat16() for rate in log_decay])

    def attend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT) * mask @ v).transpose(1, 2)

    return attend


# Head and loss.


def loss_contenders() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> mean loss of hidden [N, D], head [vocab, D] and targets [N]."""

    def plain(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, head), targets)

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": functools.partial(linear_cross_entropy, backend="triton"),
        "ours, backend torch": functools.partial(linear_cross_entropy, backend="torch"),
        "plain": plain,
        "plain, compiled": torch.compile(plain),
    }
    with contextlib.suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        # the last one: sums over slices
        wide = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32)
        found["Liger"] = lambda *tensors: Liger.apply(*tensors)[0]
        found["Liger, float32 sums"] = lambda *tensors: Liger.apply(*tensors, *wide)[0]
    with contextlib.suppress(ImportError):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut-cross-entropy"] = cut  # leaves out gradients where the soft-max is below 2^-12
        found["cut-cross-entropy, whole"] = functools.partial(cut, filter_eps=None)
    return found
