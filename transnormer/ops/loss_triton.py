"""The soft-max and cross entropy of a slice of logits on the GPU, in Triton: two passes over a row,
the second in place.

With m = max(x), s = sum(exp(x - m)) and the target t of a row x: loss = m - x_t + log(s), dx =
exp(x - m) / s - [c = t]. Where each rank holds a part of the vocabulary, two kernels run instead of
one: the first stores m + log(s) and x_t of its part, the ranks combine these, and the second kernel
begins from the result."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .register import define, direct

BLOCK = 4_096  # columns of a row that a program reads at a time, at most
WARPS = 16  # of a program with so many columns; one with fewer columns has fewer, down to 4


@triton.jit(do_not_specialize=["ignore_index"])
def softmax_loss_kernel(
    logits, targets, losses, norms, pitch, vocab, ignore_index,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr, SUMS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One program a row. Columns are read and written up to the pitch, whose divisors make wide
    loads of any vocab.

    SUMS: the first pass is made, else norms holds what it is for. SHARED: norms and target logits
    are stored, not losses."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * pitch
    c = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    blocks = tl.cdiv(pitch, BLOCK)
    if target == ignore_index:
        if SUMS:
            tl.store(losses + row, 0.0)
        if SUMS and SHARED:
            tl.store(norms + row, 0.0)
        if GRADIENT:
            for n in range(blocks):
                place = n * BLOCK + c
                tl.store(
                    at + place,
                    tl.zeros((BLOCK,), dtype=logits.dtype.element_ty),
                    mask=place < pitch,
                )
    else:
        if SUMS:
            inside = (target >= 0) & (target < vocab)
            known = tl.load(at + target, mask=inside, other=0.0 if SHARED else float("nan")).to(
                tl.float32
            )
            # A maximum and a sum for each of BLOCK columns: warps need not meet before the row's
            # end.
            top = tl.full((BLOCK,), -3.4e38, dtype=tl.float32)
            sums = tl.zeros((BLOCK,), dtype=tl.float32)
            for n in range(blocks):
                place = n * BLOCK + c
                x = tl.load(at + place, mask=place < pitch, other=0.0).to(tl.float32)
                x = tl.where(place < vocab, x, float("-inf"))
                step = x - top
                less = tl.exp(-tl.abs(step))  # what the smaller of both counts beside the larger
                sums = tl.where(step > 0, sums * less + 1, sums + less)
                top = tl.maximum(top, x)
            highest = tl.max(top, axis=0)
            total = tl.sum(sums * tl.exp(top - highest), axis=0)
            if SHARED:
                tl.store(norms + row, highest + tl.log(total))
                tl.store(losses + row, known)
            else:
                tl.store(losses + row, highest - known + tl.log(total))
        else:
            highest = tl.load(norms + row)
            total = 1.0
        if GRADIENT:
            tl.debug_barrier()  # all that is overwritten now has been read by every warp
            share = 1 / total
            for n in range(blocks):
                place = (blocks - 1 - n) * BLOCK + c  # what was read last is still near
                x = tl.load(at + place, mask=place < pitch, other=0.0).to(tl.float32)
                x = tl.where(place < vocab, x, float("-inf"))
                d = tl.exp(x - highest) * share - tl.where(place == target, 1.0, 0.0)
                tl.store(at + place, d.to(logits.dtype.element_ty), mask=place < pitch)


def softmax_loss_(
    logits: Tensor, targets: Tensor, losses: Tensor, vocab: int, ignore_index: int, gradient: bool,
    shard: Any = None,
) -> None:  # fmt: skip
    """Fill in the losses of a slice of n tokens and, where the gradient is wanted, overwrite the
    logits with it.

    logits: [n, pitch] contiguous, bfloat16, float16 or float32, of which the first `vocab` columns
    count; the gradient of the others is 0. targets: [n] contiguous integers; losses: [n] float32.
    Tokens of `ignore_index` get zeros.
    shard: which part of the vocabulary these logits are, where other processes have the rest
    (`loss.VocabShard`)."""
    call = _launch if direct(logits, targets, losses) else op
    if shard is None:
        call(
            logits, targets, losses, losses.new_empty(0), vocab, ignore_index, gradient, True, False
        )
        return
    counts = targets != ignore_index
    index = targets - shard.first
    elsewhere = logits.shape[1]  # no column
    index = index.where((index >= 0) & (index < vocab), elsewhere).where(counts, -1)
    norms = torch.empty_like(losses)
    call(logits, index, losses, norms, vocab, -1, False, True, True)
    norms, at_target = shard.combined(norms, losses)
    losses.copy_((norms - at_target).where(counts, 0))
    if gradient:
        call(logits, index, losses, norms, vocab, -1, True, False, True)


def _launch(
    logits: Tensor, targets: Tensor, losses: Tensor, norms: Tensor, vocab: int, ignore_index: int,
    gradient: bool, sums: bool, shared: bool,
) -> None:  # fmt: skip
    rows, pitch = logits.shape
    if rows == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(pitch))
    tensors = (logits, targets, losses, norms)
    kinds = tuple((x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
    wide = not -(2**31) <= ignore_index < 2**31
    key = (kinds, pitch, vocab, wide, block, gradient, sums, shared)
    arguments = (*tensors, pitch, vocab, ignore_index, block, gradient, sums, shared)
    launch(
        softmax_loss_kernel,
        logits,
        key,
        rows,
        arguments,
        warps=min(WARPS, max(4, block * WARPS // BLOCK)),
    )


op = define(
    "softmax_loss_",
    "(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, Tensor(c!) norms,"
    " int vocab, int ignore_index,"
    " bool gradient, bool sums, bool shared) -> ()",
    _launch,
    lambda *_: None,
)
