"""Fits the model to a mesh, and does there what is done otherwise on one process: clipping, and
gathering whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.language_model import LanguageModel
from .mesh import Mesh


def parallelize(
    model: LanguageModel,
    mesh: Mesh,
    *,
    recompute: bool = False,
    compile: bool = False,
    dtype: str = "float32",
    float8: str = "",
) -> None:
    """Turn the whole model into this rank's part of it, in place. The order of the steps matters:

    1. `tensor` replaces layers by their parallel forms, while weights are still plain tensors;
       `context` tells the mixers which ranks share their rows.
    2. float8 replaces the blocks' linear maps, which must be those that the rank will multiply
       with.
    3. Softmax blocks without a window drop their state, because training would otherwise keep all
       keys and values to the last block.
    4. Recomputation wraps a block's forward pass before the compiler does, so that the compiler
       sees it and skips the part of the recomputation whose results are not needed. With softmax
       attention under `tensor` it wraps the compiled block instead, because torch 2.13 would save
       the mesh as if it were a tensor.
    5. FSDP shards the weights last, because its hooks must run around all of that.

    The model may lie on the meta device; `model.to_empty` and `init_weights` then give it the
    values that one process would have. recompute: keep only each block's input in the forward pass
    and compute the rest again in the backward pass. compile: the blocks. dtype: of matrix products,
    as in the recipe; most weights are gathered in it (`sharding.shard` names the others).
    float8: how the blocks' products are scaled (`float8.convert`), "" for none.
    """
    if mesh.ranks is not None:
        from . import sharding

        sharding.cut(model, mesh)
    if float8:
        from .float8 import convert

        convert(model, float8, mesh.device)
    for block, layer in zip(model.layers, model.config.layers, strict=True):
        if not layer.bounded:
            block.forward = partial(_without_state, block.forward)
        outside = mesh.tensor > 1 and not layer.linear
        if recompute and not outside:
            block.forward = partial(_recompute(block), block.forward)
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if recompute and outside:
            block.forward = partial(_recompute(block), block.forward)
    if mesh.ranks is not None:
        sharding.shard(model, mesh, torch.bfloat16 if dtype == "bfloat16" else None)


def _recompute(block: nn.Module) -> Callable[..., Any]:
    """torch's checkpointing. It restores the random state, which a CUDA graph cannot record, only
    where dropout draws."""
    draws = any(isinstance(module, nn.Dropout) and module.p for module in block.modules())
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)


def _without_state(
    forward: Callable[..., tuple[Tensor, Any]], *inputs: Any
) -> tuple[Tensor, tuple[()]]:
    """A block's output without its state."""
    return forward(*inputs)[0], ()


def clip(model: nn.Module, mesh: Mesh, most: float) -> Tensor:
    """Scale the gradients so that their norm over all ranks is at most `most` (0: leave them);
    returns the norm.

    Nothing is read on the host; where the norm is not finite, neither are the gradients afterwards.
    """
    if mesh.ranks is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    from . import sharding

    return sharding.clip(model, mesh, most)


def reshard(model: nn.Module, mesh: Mesh) -> None:
    """Let go of gathered weights that a forward pass kept for a backward pass, where there was
    none."""
    if mesh.ranks is not None:
        from . import sharding

        sharding.reshard(model)


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, gathered where they are sharded. Every rank must iterate over all."""
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
