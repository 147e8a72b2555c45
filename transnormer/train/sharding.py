"""What a mesh does to a model: tensor ranks get heads and columns, context ranks slices of rows,
and FSDP2 shards weights.

Between the products of the blocks a tensor rank holds a part of the tokens, [B, T / N, D], so norms
and additions work on that part. A mixer or GLU gathers all tokens, computes its own heads or
columns of them, and its last product adds up the ranks' results and scatters the sums over the
tokens. The modules say themselves which part is cut how (`SHARDS`).

With `tensor = 2`, for example, each rank computes the gate of the mixer for half of the heads, as
it does q, k and v. The norm over all heads then needs sums from both ranks (`_NormOfShards`), so
norm and gate are two operations instead of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..model.language_model import LanguageModel
from ..model.layers import SimpleRMSNorm, local
from ..planning.memory import gathered_at_once
from .mesh import Mesh


def cut(model: LanguageModel, mesh: Mesh) -> None:
    """Prepare the model for tensor and context parallelism, in place."""
    assert mesh.ranks is not None
    if mesh.tensor > 1:
        _cut_by_tensor(model, mesh.ranks["tensor"], mesh.tensor_rank)
    if mesh.context_mesh is not None:
        model.share_rows(mesh.context_mesh.get_group())


def shard(model: LanguageModel, mesh: Mesh, dtype: torch.dtype | None) -> None:
    """Shard the weights by FSDP2, in place: the blocks, and then the rest (embedding, last norm,
    head).

    dtype: the dtype in which weights are gathered; None keeps their own. Some always keep their
    own: the rest, because the residual stream begins as rows of the embedding; blocks with LRPE,
    because an angle times a million tokens needs all its bits; and blocks with LayerNorm, because
    the CPU takes its gains in float32 only."""
    assert mesh.ranks is not None
    over = mesh.ranks["replicate", "shard"] if mesh.replicate > 1 else mesh.ranks["shard"]
    blocks = model.blocks()
    keeps_dtype = [
        layer.position_parameters > 0
        or any(isinstance(module, nn.LayerNorm) for module in block.modules())
        for block, layer in zip(blocks, model.config.layers, strict=True)
    ]
    dtypes = [None if keeps else dtype for keeps in keeps_dtype]
    sizes = [
        sum(local(p).numel() * (narrow or p.dtype).itemsize for p in block.parameters())
        for block, narrow in zip(blocks, dtypes, strict=True)
    ]
    for numbers in gathered_at_once(sizes, dtypes):
        # The backward pass begins with the last blocks, so they stay gathered.
        narrow, last = dtypes[numbers[0]], numbers[-1] == len(blocks) - 1
        policy = MixedPrecisionPolicy(
            param_dtype=narrow, reduce_dtype=narrow and torch.float32, cast_forward_inputs=False
        )
        fully_shard(
            [blocks[n] for n in numbers],
            mesh=over,
            mp_policy=policy,
            reshard_after_forward=not last,
        )
    fully_shard(model, mesh=over, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # `forward` and `loss` call `hidden`, which reads all weights but the head's. What this root
    # group gathers stays gathered, so the head's weight can be read afterwards.
    register_fsdp_forward_method(model, "hidden")
    if over.size() == 1:
        # One rank sums nothing, and with a factor FSDP would divide a copy of all gradients by it.
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gradients are summed; gloo has no other reduction here
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """See `parallelize.reshard`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip(model: nn.Module, mesh: Mesh, most: float) -> Tensor:
    """See `parallelize.clip`."""
    assert mesh.ranks is not None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shares = [local(gradient) for gradient in gradients]
    # those that differ between tensor ranks, and those that are equal
    counted: list[list[Tensor]] = [[], []]
    for gradient, share in zip(gradients, shares, strict=True):
        counted[_is_whole(gradient)].append(share)
    nothing = torch.zeros((), device=mesh.device)
    squares = [
        torch.nn.utils.get_total_norm(part).square() if part else nothing for part in counted
    ]
    square = squares[0] + squares[1] / mesh.tensor
    for name in ("shard", "tensor"):
        if mesh.ranks[name].size() > 1:
            dist.all_reduce(square, group=mesh.ranks.get_group(name))
    norm = square.sqrt()
    if most:
        torch._foreach_mul_(shares, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _is_whole(x: Any) -> bool:
    """Whether every tensor rank holds the same values of it."""
    names = x.device_mesh.mesh_dim_names
    return "tensor" in names and x.placements[names.index("tensor")].is_replicate()


# Tensor parallelism.


def _cut_by_tensor(model: LanguageModel, mesh: DeviceMesh, rank: int) -> None:
    tokens, whole = Shard(1), Replicate()
    _distribute(model.embed_tokens, mesh, Shard(0))
    model.embed_tokens.forward = partial(_embed_tokens, model.embed_tokens, mesh)  # type: ignore[method-assign]
    if model.embed_positions is not None:
        _distribute(model.embed_positions, mesh, whole)
        model.embed_positions.forward = partial(_embed_positions, model.embed_positions, mesh)  # type: ignore[method-assign]
    if model.lm_head is not None:  # only its weight is ever used
        _distribute(model.lm_head, mesh, Shard(0))
    _cut_norm(model.norm, mesh)
    gather_tokens = PrepareModuleOutput(
        output_layouts=tokens, desired_output_layouts=whole, use_local_output=False
    )
    parallelize_module(model.norm, mesh, gather_tokens)
    for block in model.blocks():
        _cut_norm(block.mixer_norm, mesh)
        _cut_norm(block.glu_norm, mesh)
        block.mixer.keep_heads(rank, mesh.size())
        for module, others in ((block.mixer, 2), (block.glu, 0)):
            _cut_module(module, mesh)
            layouts = (tokens, *[None] * others), (whole, *[None] * others)
            parallelize_module(
                module,
                mesh,
                PrepareModuleInput(input_layouts=layouts[0], desired_input_layouts=layouts[1]),
            )


def _cut_module(module: Any, mesh: DeviceMesh) -> None:
    """Cut a mixer or GLU by its SHARDS, every weight of it."""
    parts = dict(module.named_modules())
    for path, how in module.SHARDS.items():
        part = parts.get(path)
        if part is None:
            continue
        assert how not in ("columns", "rows") or isinstance(part, nn.Linear), (
            f"{path} is adapted, and is not cut"
        )
        if how == "columns":
            parallelize_module(part, mesh, ColwiseParallel(), src_data_rank=None)
        elif how == "rows":
            parallelize_module(
                part, mesh, RowwiseParallel(output_layouts=Shard(1)), src_data_rank=None
            )
        elif how == "norm":
            setattr(module, path, _NormOfShards(part, mesh))
        else:
            _distribute(part, mesh, {"heads": Shard(0), "whole": Replicate()}[how])
    plain = [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]
    assert not plain, f"SHARDS of {type(module).__name__} says nothing of {plain}"


def _cut_norm(norm: nn.Module, mesh: DeviceMesh) -> None:
    """Let each rank norm its own tokens, which are whole. The gradients of the gains are summed
    over the ranks."""
    if any(True for _ in norm.parameters()):
        parallelize_module(norm, mesh, SequenceParallel(use_local_output=True))


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Any) -> None:
    """Make a module's own parameters DTensors."""
    for name, p in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=p.requires_grad))


def _embed_tokens(module: Any, mesh: DeviceMesh, ids: Tensor) -> Tensor:
    """Look up ids in an embedding that is sharded by the vocabulary. Each rank gives zeros for ids
    that it does not hold; the sum over the ranks is scattered over the tokens."""
    weight = local(module.weight)
    first = mesh.get_local_rank() * len(weight)
    index = ids - first
    inside = (index >= 0) & (index < len(weight))
    pad = -1 if module.padding_idx is None else module.padding_idx - first
    x = F.embedding(index.where(inside, 0), weight, pad if 0 <= pad < len(weight) else None)
    part = DTensor.from_local(x * inside.unsqueeze(-1), mesh, [Partial()], run_check=False)
    return part.redistribute(placements=[Shard(1)]).to_local()


def _embed_positions(module: Any, mesh: DeviceMesh, positions: Tensor) -> Tensor:
    """Look up the positions of this rank's own tokens in a learned table that every rank holds
    whole."""
    mine = positions.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]
    return F.embedding(mine, module.weight.to_local(grad_placements=[Partial()]))


Mean = Callable[[Tensor], Tensor]  # [..., H V / N] -> [..., 1], over the columns of all ranks


def _root_mean_square(x: Tensor, mean: Mean, eps: float) -> Tensor:
    return x * torch.rsqrt(mean(x.square()) + eps)


def _centred(x: Tensor, mean: Mean, eps: float) -> Tensor:
    return _root_mean_square(x - mean(x), mean, eps)


# For each norm: (a rank's columns [..., H V / N] of at least float32, mean, eps) -> them normed.
# Gains and biases are applied afterwards.
NORMS_OVER_RANKS: dict[type[nn.Module], Callable[[Tensor, Mean, float], Tensor]] = {
    SimpleRMSNorm: _root_mean_square,
    nn.RMSNorm: _root_mean_square,
    nn.LayerNorm: _centred,
}


class _NormOfShards(nn.Module):
    """The norm over all heads where each rank has some: one or two sums a token are exchanged, and
    it is exact."""

    def __init__(self, norm: Any, mesh: DeviceMesh) -> None:
        super().__init__()
        if type(norm) not in NORMS_OVER_RANKS:
            raise ValueError(
                f"parallel.tensor knows no sums over ranks for the norm {type(norm).__name__}"
            )
        self.eps, self.mesh, self.normed = norm.eps, mesh, NORMS_OVER_RANKS[type(norm)]
        self.weight, self.bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        _distribute(self, mesh, Shard(0))

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., H V / N]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = self.normed(wide, self._mean, self.eps)
        if self.weight is not None:
            y = y * local(self.weight)
        if self.bias is not None:
            y = y + local(self.bias)
        return y.to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the columns of all ranks, [..., 1]. Each rank uses it for its own columns,
        so its gradient is summed over the ranks."""
        part = DTensor.from_local(x.sum(-1, keepdim=True), self.mesh, [Partial()], run_check=False)
        total = part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return total / (x.shape[-1] * self.mesh.size())
