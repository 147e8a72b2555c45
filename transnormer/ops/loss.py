"""Head and cross entropy in slices: logits of all tokens, [B, T, vocab], never exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE_ELEMENTS = 2**22  # logits held at a time: 16 MiB in float32, which a large cache or a GPU's L2 still serves


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross entropy in nats of logits x @ weight^T against targets, with logits of few tokens at a time.

    x: [..., D] floating; weight: [vocab, D]; targets: [...] int64, `ignore_index` where a token does not count.
    reduction: "mean" over the tokens that count (0 if none does), "sum", or "none" for one loss a token, [...], 0
    where ignored. Matrix products run in x's dtype, the soft-max and sums in at least float32.
    Gradients are computed in the forward pass, slice by slice, where x or weight needs one.
    Raises ValueError where shapes do not fit or, on the CPU, a target is out of range (a GPU asserts on the device).
    """
    if targets.shape != x.shape[:-1] or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x [..., D], weight [vocab, D] and targets [...] do not fit: "
            f"{list(x.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}")
    flat, target = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= weight.shape[0])) & (target != ignore_index)]
        if len(wrong):
            raise ValueError(f"target {wrong[0].item()} is outside a vocabulary of {weight.shape[0]}")
    if reduction == "none":
        with torch.no_grad():
            return _SlicedLoss.apply(flat, weight, target, ignore_index, True).view(targets.shape)
    total = _SlicedLoss.apply(flat, weight, target, ignore_index, False)
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum().clamp(min=1)


class _SlicedLoss(torch.autograd.Function):
    """Sum of the losses of flat x [N, D] (or, without gradient, each of them)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, each: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        w = weight.to(x.dtype)
        size = max(1, SLICE_ELEMENTS // weight.shape[0])
        losses = x.new_empty(x.shape[0], dtype=wide)
        dx = torch.empty_like(x) if needs_x else None
        dw = torch.zeros_like(weight, dtype=wide) if needs_w else None
        for start in range(0, x.shape[0], size):
            rows = slice(start, start + size)
            target = targets[rows]
            counts = target != ignore_index
            index = target.where(counts, 0).unsqueeze(1)
            logits = (x[rows] @ w.T).to(wide)
            norm = logits.logsumexp(1, keepdim=True)
            losses[rows] = ((norm - logits.gather(1, index)).squeeze(1)) * counts
            if needs_x or needs_w:
                d_logits = logits.sub_(norm).exp_()  # the soft-max, then minus one at the target
                d_logits.scatter_add_(1, index, d_logits.new_full(index.shape, -1.0)).mul_(counts.unsqueeze(1))
                d_logits = d_logits.to(x.dtype)
                if dx is not None:
                    torch.mm(d_logits, w, out=dx[rows])
                if dw is not None:
                    dw += d_logits.T @ x[rows]
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return losses if each else losses.sum()

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        dx, dw = ctx.saved_tensors
        return (
            None if dx is None else dx * d_total.to(dx.dtype),
            None if dw is None else dw * d_total.to(dw.dtype),
            None, None, None,
        )  # fmt: skip
