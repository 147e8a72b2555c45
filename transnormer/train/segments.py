"""Training on rows of any length in the memory of a segment: the state is all that one part of a
row tells the next.

A first pass reads the segments from left to right and keeps the states between them. A second goes
back from right to left: each segment is read again from its state, and its gradients and that of
its state are taken from its loss and from the gradient of the state it leaves. That is exact, where
a cut of the gradient (truncated backpropagation) is not. It takes a third more time than holding
the whole row, as recomputation of activations does. Sharded weights are gathered, and gradients
summed over the processes, for every segment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..model.mixer import LayerState
from ..model.state import State
from ..ops.loss import linear_cross_entropy


def backward(
    model: LanguageModel, ids: Tensor, targets: Tensor, segment: int, weight: Tensor | float
) -> Tensor:
    """Add the gradients of weight x the summed loss to the parameters. Returns weight x the summed
    loss, detached.

    ids, targets: int64 [B, T] as in `LanguageModel.loss`. segment: tokens of a row held at a time.
    Raises ValueError for softmax attention without a window, whose state is all that was read.
    """
    if not model.config.bounded:
        raise ValueError(
            "train.segment needs linear attention (model.mixer = gla), or a window, in every "
            "layer: the state of full_attention is all that was read"
        )
    starts = range(0, ids.shape[1], segment)
    states: list[State | None] = [None]
    with torch.no_grad():
        for start in starts[:-1]:
            states.append(model.hidden(ids[:, start : start + segment], states[-1])[1])
    total = ids.new_zeros((), dtype=torch.float64)
    d_state: list[Tensor | None] = []
    for start, before in zip(reversed(starts), reversed(states), strict=True):
        if before is not None:
            for leaf in _parts(before.layers):
                leaf.requires_grad_()
        part = slice(start, start + segment)
        # A weight's cast made for an earlier segment is older than this one's forward pass, and
        # backward would come to it last: after FSDP has summed the gradients of the weight's block,
        # which then lack it.
        torch.clear_autocast_cache()
        x, after = model.hidden(ids[:, part], before)
        loss = (
            linear_cross_entropy(x, model.head_weight, targets[:, part], reduction="sum") * weight
        )
        # A part of a state that no trained weight has touched has no gradient.
        left = list(zip(_parts(after.layers), d_state, strict=True)) if d_state else []
        left = [(part, d_part) for part, d_part in left if part.requires_grad]
        with torch.autocast(ids.device.type, enabled=False):  # which is for forward passes
            torch.autograd.backward(
                [loss, *(part for part, _ in left)], [None, *(d_part for _, d_part in left)]
            )
        total = total + loss.detach()
        d_state = [] if before is None else [leaf.grad for leaf in _parts(before.layers)]
    return total


def _parts(layers: list[LayerState]) -> list[Tensor]:
    return [part for layer in layers for part in layer]
