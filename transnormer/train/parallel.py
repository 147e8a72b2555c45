"""One run on many processes: the mesh they form, what each of them is in it, and the model made to fit.

The mesh has four dimensions, the last of which changes fastest from one rank to the next: `replicate` and `shard` read
different rows, `context` different segments of the same rows, `tensor` different heads and columns of the same tokens.
Losses are sums over tokens divided by the tokens of the whole step, and gradients are summed, never averaged: so every
mesh computes what one process does.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from ..data.loader import Batch
from ..model.language_model import LanguageModel, find_device
from ..planning.mesh_sizes import Parallel, sizes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


T = TypeVar("T")


class FailedOnOtherRank(Exception):
    """Raised on every rank but the one that failed, whose own error says what is wrong."""


@dataclass(frozen=True)
class Mesh:
    """What this process is in the run. One process alone has no process group and no meshes.

    ranks: the mesh (replicate, shard, tensor), whose shard is shard x context of these. segments: those of the same rows.
    """

    device: torch.device
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    rank: int = 0
    ranks: DeviceMesh | None = None
    segments: DeviceMesh | None = None

    @property
    def shape(self) -> dict[str, int]:
        return {"replicate": self.replicate, "shard": self.shard, "context": self.context, "tensor": self.tensor}

    @property
    def world(self) -> int:
        return math.prod(self.shape.values())

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """How many share the rows of a step."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        return self.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    def split(self, batch: Batch) -> Batch:
        """Of this data rank's rows the segment that this rank reads; cu_seqlens stay those of the whole rows.

        Raises ValueError where the rows' tokens are no multiple of context x tensor.
        """
        length = batch.ids.shape[1]
        if length % (self.context * self.tensor):
            raise ValueError(
                f"parallel.context x tensor = {self.context * self.tensor} does not divide rows of {length} tokens"
            )
        part = length // self.context
        mine = slice(self.context_rank * part, (self.context_rank + 1) * part)
        return Batch(batch.ids[:, mine], batch.targets[:, mine], batch.cu_seqlens)

    def gather(self, x: T) -> list[T]:
        """What every rank gives, in their order, on every rank. Small things: it goes through pickle, over the network."""
        if self.ranks is None:
            return [x]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, x)
        return found

    def together(self, work: Callable[[], T], first: bool = False) -> T | None:
        """What `work` returns, run on every rank, or on the first alone while the others wait (and get None).

        An OSError or ValueError anywhere ends all: the first rank that has one raises it, the others FailedOnOtherRank.
        """
        result, error = None, None
        if self.first or not first:
            try:
                result = work()
            except (OSError, ValueError) as caught:
                error = caught
        failed = [rank for rank, wrong in enumerate(self.gather(error is not None)) if wrong]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise FailedOnOtherRank
        return result

    def failure(self, message: str) -> Exception:
        """For what every rank raises alike: ValueError on the first, FailedOnOtherRank on the others."""
        return ValueError(message) if self.first else FailedOnOtherRank()

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all that read different tokens, the same on every rank. x: of any shape, on `device`."""
        if self.ranks is None:
            return x
        x = x.clone()
        for name in ("replicate", "shard"):
            if self.ranks[name].size() > 1:
                dist.all_reduce(x, group=self.ranks.get_group(name))
        return x


@contextmanager
def start(parallel: Parallel, device: str = "auto") -> Iterator[Mesh]:
    """This process' place among those that torchrun started, or alone; ends the process group afterwards.

    A process group that the caller has started is used as it is, with the caller's current GPU, and is left standing.
    device: as in `find_device`; of several GPUs each process takes the one of its LOCAL_RANK.
    Raises ValueError where the mesh does not fit the processes, or there are too few GPUs for them.
    """
    found, given = find_device(device), dist.is_initialized()
    world = dist.get_world_size() if given else int(os.environ.get("WORLD_SIZE", 1))
    sizes(parallel, world)
    if world == 1:
        yield Mesh(found)
        return
    if found.type == "cuda":
        local = torch.cuda.current_device() if given else int(os.environ["LOCAL_RANK"])
        there = torch.cuda.device_count()
        if found.index is not None:
            raise ValueError(f"train.device = {device} names one GPU, and there are {world} processes; write cuda")
        if local >= there:
            raise ValueError(f"{there} GPUs are here for more processes; start torchrun with --nproc-per-node={there}")
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    if not given:
        backend, gpu = ("cpu:gloo,cuda:nccl", found) if found.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu)
    try:
        yield make_mesh(parallel, found)
        dist.barrier()
    finally:
        gc.collect()  # what still holds a group's buffers would outlive it and abort the process at its exit
        if not given:
            dist.destroy_process_group()


def make_mesh(parallel: Parallel, device: torch.device) -> Mesh:
    """The mesh over all processes of the default process group, whatever its backend. ValueError as in `sizes`."""
    from torch.distributed.device_mesh import init_device_mesh

    replicate, shard, context, tensor = found = sizes(parallel, dist.get_world_size())
    ranks = init_device_mesh(
        device.type, (replicate, shard * context, tensor), mesh_dim_names=("replicate", "shard", "tensor")
    )
    segments = None
    if context > 1:
        names = ("replicate", "shard", "context", "tensor")
        segments = init_device_mesh(device.type, found, mesh_dim_names=names)["context"]
    return Mesh(device, *found, rank=dist.get_rank(), ranks=ranks, segments=segments)


def parallelize(
    model: LanguageModel, mesh: Mesh, *, recompute: bool = False, compile: bool = False, dtype: str = "float32",
    float8: str = "",
) -> None:  # fmt: skip
    """Make the model this rank's, in place: tensor, context, float8, recompute, compile, shard, in this order.

    The model may lie on the meta device; `model.to_empty` and `init_weights` then give it the values that one process
    would have. recompute: keep only each block's input in the forward pass, the rest is computed again in the backward
    pass. compile: the blocks. dtype: of matrix products, as in the recipe; in it weights are gathered and multiplied.
    float8: how the blocks' products are scaled (`float8.convert`), "" for none.
    """
    if mesh.ranks is not None:
        from . import sharding

        sharding.cut(model, mesh)
    if float8:
        from .float8 import convert

        convert(model, float8, mesh.device)
    for block in model.layers:
        if model.config.mixer == "softmax":
            block.forward = partial(_forgetting, block.forward)
        # The compiler spares what nobody reads of a recomputation it sees, but saves a mesh as a tensor beside softmax
        # attention's (torch 2.13).
        seen = model.config.mixer != "softmax" or mesh.tensor == 1
        draws = any(isinstance(module, nn.Dropout) and module.p for module in block.modules())
        again = partial(recomputed, use_reentrant=False, preserve_rng_state=draws)  # read on the host: no graph can
        if recompute and seen:
            block.forward = partial(again, block.forward)
        if compile:
            block.forward = torch.compile(block.forward, fullgraph=True)
        if recompute and not seen:
            block.forward = partial(again, block.forward)
    if mesh.ranks is not None:
        sharding.shard(model, mesh, torch.bfloat16 if dtype == "bfloat16" else None)


def _forgetting(forward: Callable[..., tuple[Tensor, Any]], *inputs: Any) -> tuple[Tensor, tuple[()]]:
    """A softmax block without its state: all keys and values, which would be kept from every block to the last."""
    return forward(*inputs)[0], ()


def clip(model: nn.Module, mesh: Mesh, most: float) -> Tensor:
    """Scale the gradients so that their norm over all ranks is at most `most` (0: leave them); returns the norm.

    Nothing is read on the host; where the norm is not finite, neither are the gradients afterwards.
    """
    if mesh.ranks is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    from . import sharding

    return sharding.clip(model, mesh, most)


def reshard(model: nn.Module, mesh: Mesh) -> None:
    """Let go of gathered weights that a forward pass kept for a backward pass, where there was none."""
    if mesh.ranks is not None:
        from . import sharding

        sharding.reshard(model)


def full_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of whole weights by name on the CPU of rank 0, gathered one at a time; {} on the others. All ranks call it."""
    first, found = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in whole(model.state_dict()):
        if first:
            found[name] = tensor.detach().to("cpu", copy=True)
    return found


def whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """One after another, gathered where they are sharded. All ranks must read all."""
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
