"""Head and cross entropy in slices: logits of all tokens, [B, T, vocab], never exist.

With N tokens the three products take 6 N D vocab operations. Every slice reads the weight twice
and, in float32, reads and writes its gradient once: slices are as large as a cache on the CPU and
as large as products need on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .collectives import all_gather
from .dispatch import check_devices, choose, forward_mode, product_dtype, triton_refusal
from .register import define, define_backward, refuse_second_derivative, without_autocast

# logits held at a time on the CPU: 16 MiB in float32, which a large cache still serves
SLICE_ELEMENTS = 2**22
CUDA_SLICE_BYTES = 2**29  # and on a GPU: 2^28 logits in bfloat16, 4,194 tokens of 64,000 words


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy in nats of logits x @ weight^T against targets, with logits of few tokens at a
    time.

    x: [..., D] floating; weight: [vocab, D]; targets: [...] int64, `ignore_index` where a token
        does not count.
    reduction: "mean" over the tokens that count (0 if none does), "sum", or "none" for one loss a
    token, [...], 0 where ignored. Matrix products run in x's dtype, or autocast's where it is on,
    the soft-max and sums in at least float32. Gradients are computed in the forward pass, slice by
    slice, where x or weight needs one; those of "none", which depend on every token's factor, by a
    second pass over the slices in backward.
    backend: how a slice of logits becomes losses and gradients: "auto", "triton" (one kernel) or
    "torch". weight may be a DTensor that is sharded by the vocabulary, Shard(0) of one mesh
    dimension; x is then a DTensor on the same mesh, equal on all its ranks. Each rank computes the
    logits of its part of the vocabulary, and the ranks exchange two numbers a token: the softmax's
    log sum and the target's logit. Raises ValueError where shapes or devices do not fit or, on the
    CPU, a target is out of range; a GPU, which is not waited for, and compiled code assert it.
    RuntimeError where a forward-mode or a second derivative is asked for."""
    check_devices("linear_cross_entropy", x=x, weight=weight, targets=targets)
    if targets.shape != x.shape[:-1] or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x [..., D], weight [vocab, D] and targets [...] do not fit: "
            f"{list(x.shape)}, {list(weight.shape)}, {list(targets.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}")
    target = targets.reshape(-1).contiguous()
    _check_range(target, weight.shape[0], ignore_index)
    shard = None
    if hasattr(weight, "device_mesh"):
        x, weight, shard = _unshard(x, weight)
    x = x.to(product_dtype(x))
    refusals = {
        "triton": triton_refusal(x, weight, named=backend == "triton"),
        "torch": forward_mode(x, weight),
    }
    backend = choose("linear_cross_entropy", backend, refusals)
    flat = x.flatten(0, -2) if x.dim() > 1 else x[None]
    each = reduction == "none"
    needs_x, needs_w = (torch.is_grad_enabled() and leaf.requires_grad for leaf in (flat, weight))
    arguments = (flat, weight, target, ignore_index, backend, each, needs_x, needs_w)
    if torch.compiler.is_compiling() and shard is None:
        loss = _op(*arguments)[0]
    elif needs_x or needs_w:
        loss = _SlicedLoss.apply(*arguments, shard)[0]
    else:
        loss = _sliced_loss(*arguments, shard)[0]
    if each:
        return loss.view(targets.shape)  # type: ignore[no-any-return]
    if reduction == "sum":
        return loss  # type: ignore[no-any-return]
    return loss / (target != ignore_index).sum().clamp(min=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary that this rank holds, beginning at id `first`. The ranks of
    `group` hold all of it."""

    first: int
    group: dist.ProcessGroup

    def combined(self, norms: Tensor, at_target: Tensor) -> tuple[Tensor, Tensor]:
        """The softmax's log sums and the targets' logits over the whole vocabulary, from those of
        each part: two of [n]."""
        mine = torch.stack([norms, at_target])
        parts = mine.new_empty(self.group.size(), *mine.shape)
        all_gather(parts.flatten(0, 1), mine, group=self.group)
        return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)


def _unshard(x: Any, weight: Any) -> tuple[Tensor, Tensor, VocabShard]:
    """The local tensors of one rank: all of x, to whose gradient the rank contributes a part, and
    its part of weight."""
    from torch.distributed.tensor import Partial, Shard

    mesh = weight.device_mesh
    if weight.placements != (Shard(0),) or getattr(x, "device_mesh", None) != mesh:
        raise ValueError(
            "weight must be Shard(0) of one mesh, and x on the same mesh; got "
            f"{weight.placements}, {type(x)}"
        )
    mine = weight.to_local()
    return (
        x.to_local(grad_placements=[Partial()]),
        mine,
        VocabShard(mesh.get_local_rank() * len(mine), mesh.get_group()),
    )


def _check_range(target: Tensor, vocab: int, ignore_index: int) -> None:
    right = ((target >= 0) & (target < vocab)) | (target == ignore_index)
    if target.is_cpu and type(target) is Tensor and not torch.compiler.is_compiling():
        if not right.all():
            raise ValueError(
                f"target {target[~right][0].item()} is outside a vocabulary of {vocab}"
            )
    else:
        torch._assert_async(right.all(), f"a target is outside a vocabulary of {vocab}")


@torch.no_grad()
@without_autocast
def _sliced_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    backend: str,
    each: bool,
    needs_x: bool,
    needs_w: bool,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N] or their sum, its gradient by x [N, D], its gradient by weight), gradients [0]
    where not wanted.

    Of single losses there are no gradients yet: they are `_gradients_of_each`.
    Losses and the weight's gradient come in at least float32, x's gradient in x's dtype.
    """
    needs_x, needs_w = needs_x and not each, needs_w and not each
    losses, dx, dw = _walk(x, weight, targets, ignore_index, backend, needs_x, needs_w, shard)
    return losses if each else losses.sum(), dx, dw


@torch.no_grad()
@without_autocast
def _gradients_of_each(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    d_losses: Tensor,
    ignore_index: int,
    backend: str,
    needs_x: bool,
    needs_w: bool,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients by x [N, D] and weight of the losses times d_losses [N]; [0] where not wanted.
    Logits are made again.

    For the weight a slice's gradient is multiplied by factors of at most 1, and the sum of the
    products by the largest: half precision would round small factors, such as 1 / N of a mean, to
    zero."""
    factors = d_losses.where(targets != ignore_index, 0)
    least = torch.finfo(factors.dtype).tiny  # where there is no token, or all factors are zero
    largest = F.pad(factors.abs().nan_to_num(0, 0, 0), (0, 1), value=least).amax()
    _, dx, dw = _walk(
        x, weight, targets, ignore_index, backend, needs_x, needs_w, shard, factors / largest
    )
    return dx.mul_(factors.unsqueeze(1)) if needs_x else dx, _times(dw, largest, weight.dtype)


def _walk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    backend: str,
    needs_x: bool,
    needs_w: bool,
    shard: VocabShard | None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], gradients of their sum by x and weight), slice by slice.

    factors: [N], by which each loss counts in the sum whose gradient by the weight is taken.
    """
    softmax_loss_ = _softmax_loss_
    if backend == "triton":
        from .loss_triton import softmax_loss_
    tokens, vocab, w = x.shape[0], weight.shape[0], weight.to(x.dtype)
    most = SLICE_ELEMENTS // vocab
    if x.is_cuda:
        # products and kernels are slow on rows that begin anywhere, so rows of zeros are added
        if vocab % 64:
            w = x.new_zeros(-(-vocab // 64) * 64, x.shape[1])
            w[:vocab] = weight
        # torch holds a slice in float32 too
        held = x.itemsize + (4 if backend == "torch" and x.itemsize == 2 else 0)
        most = CUDA_SLICE_BYTES // (len(w) * held)
    losses, dx, dw = _results(x, w, True, needs_x, needs_w)
    dw.zero_()
    # slices of one size, as far as that can be
    size = -(-tokens // -(-tokens // max(1, most))) if tokens else 1
    buffer = x.new_empty(size, len(w))
    for start in range(0, tokens, size):
        rows = slice(start, start + size)
        target = targets[rows]
        logits = buffer[: len(target)]
        torch.mm(x[rows], w.T, out=logits)
        softmax_loss_(logits, target, losses[rows], vocab, ignore_index, needs_x or needs_w, shard)
        if needs_x:
            torch.mm(logits, w, out=dx[rows])
        if needs_w:
            if factors is not None:
                logits.mul_(factors[rows].unsqueeze(1))
            _add_product(dw, logits.T, x[rows])
    return losses, dx, dw[:vocab]


def _softmax_loss_(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    vocab: int,
    ignore_index: int,
    gradient: bool,
    shard: VocabShard | None = None,
) -> None:
    """Fill in the losses [n] and, where wanted, write the gradient of their sum over the logits [n,
    pitch], which are lost."""
    of_vocab = logits[:, :vocab]
    counts = targets != ignore_index
    index = targets if shard is None else targets - shard.first
    # the target lies in this part of the vocabulary
    known = counts & (index >= 0) & (index < vocab)
    index = index.where(known, 0).unsqueeze(1)
    wide = of_vocab.to(losses.dtype)
    at_target = wide.gather(1, index).squeeze(1).where(known, 0)
    # finite where all is -inf
    top = wide.amax(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
    sums = wide.sub_(top).exp_().sum(1).clamp(min=torch.finfo(wide.dtype).tiny)
    norm = own = sums.log() + top.squeeze(1)
    if shard is not None:
        norm, at_target = shard.combined(own, at_target)
    losses.copy_((norm - at_target).where(counts, 0))
    if gradient:
        # the soft-max, then minus one at the target
        wide.mul_(((own - norm).exp() / sums).unsqueeze(1))
        wide.scatter_add_(1, index, -known.to(wide.dtype).unsqueeze(1)).masked_fill_(
            ~counts.unsqueeze(1), 0
        )
        of_vocab.copy_(wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. Where total is wider than a and b, old GPUs and the CPU round the product to
    their dtype first."""
    if total.dtype == b.dtype:
        total.addmm_(a, b)
    elif b.is_cuda and torch.cuda.get_device_capability(b.device)[0] >= 8:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _results(
    x: Tensor, weight: Tensor, each: bool, needs_x: bool, needs_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(x.shape[:1] if each else (), dtype=wide),
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(weight.shape if needs_w else (0,), dtype=wide),
    )


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, targets, *ctx.options, ctx.each, ctx.needs_x, ctx.needs_w = inputs[:8]
    ctx.shard, ctx.inputs = inputs[8] if len(inputs) > 8 else None, len(inputs)
    if len(inputs) == 8:  # the op of compiled graphs, which torch itself differentiates only once
        ctx.mark_non_differentiable(*output[1:])
    ctx.weight_dtype = weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((x, weight, targets) if ctx.each else output[1:]))


def _differentiate(
    ctx: Any, d_loss: Tensor | None, *d_gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    if any(d is not None for d in d_gradients):
        refuse_second_derivative("linear_cross_entropy", INSTEAD)
    rest = [None] * (ctx.inputs - 2)
    if d_loss is None:
        return None, None, *rest
    if ctx.each:
        arguments = (*ctx.saved_tensors, d_loss, *ctx.options, ctx.needs_x, ctx.needs_w)
        dx, dw = (
            _backward(*arguments)
            if ctx.shard is None
            else _gradients_of_each(*arguments, ctx.shard)
        )
    else:
        dx, dw = ctx.saved_tensors
        dx, dw = _times(dx, d_loss, dx.dtype), _times(dw, d_loss, ctx.weight_dtype)
    return dx if ctx.needs_x else None, dw if ctx.needs_w else None, *rest


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass, rounded once. Not in place: the same graph may be gone through again.

    Where somebody differentiates again, autograd must see it: the factor has a derivative, the
    gradient refuses one."""
    if torch.is_grad_enabled():
        return (gradient * factor.reshape(1)).to(dtype)
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return _sliced_loss(*inputs)

    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_differentiate)


# One op in a compiled graph: traced, the loop would be unrolled, and what it writes in place would
# be copied.


def _fake(x, weight, targets, ignore_index, backend, each, needs_x, needs_w):  # type: ignore[no-untyped-def]
    return _results(x, weight, each, needs_x and not each, needs_w and not each)


def _fake_backward(x, weight, targets, d_losses, ignore_index, backend, needs_x, needs_w):  # type: ignore[no-untyped-def]
    _, dx, dw = _results(x, weight, False, needs_x, needs_w)
    return dx, dw.to(weight.dtype)


INSTEAD = "those of torch.nn.functional.cross_entropy of all logits"
_INPUTS = "Tensor x, Tensor weight, Tensor targets"
_op = define(
    "linear_cross_entropy",
    f"({_INPUTS}, int ignore_index, str backend, bool each, bool needs_x, bool needs_w)"
    " -> (Tensor, Tensor, Tensor)",
    _sliced_loss,
    _fake,
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
)
_backward = define_backward(
    "linear_cross_entropy_backward",
    f"({_INPUTS}, Tensor d_losses, int ignore_index, str backend, bool needs_x, bool needs_w)"
    " -> (Tensor, Tensor)",
    _gradients_of_each,
    _fake_backward,
    op="linear_cross_entropy",
    instead=INSTEAD,
)
