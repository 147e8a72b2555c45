"""One run on many processes: the mesh they form, and what each of them is in it.

The mesh has four dimensions, the last of which changes fastest from one rank to the next:
`replicate` and `shard` read different rows, `context` different slices of the same rows, `tensor`
different heads and columns of the same tokens. Losses are sums over tokens divided by the tokens of
the whole step, and gradients are summed, never averaged: so every mesh computes what one process
does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.loader import Batch
from ..model.language_model import find_device
from ..planning.mesh_sizes import MeshSizes, Parallel, resolve

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


T = TypeVar("T")


class FailedOnOtherRank(Exception):
    """Raised on every rank but the one that failed, whose own error says what is wrong."""


@dataclass(frozen=True)
class Mesh(MeshSizes):
    """What this process is in the run. One process alone has no process group and no meshes.

    ranks: the DeviceMesh with the dimensions replicate, shard and tensor. Its `shard` joins shard
        and context, because FSDP shards weights over both.
    context_mesh: the DeviceMesh of the ranks that read slices of the same rows.
    """

    device: torch.device
    rank: int = 0
    ranks: DeviceMesh | None = None
    context_mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes the files of which there is one. Every rank
        writes pieces of checkpoints."""
        return self.rank == 0

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
        """The slice of each row that this context rank reads. cu_seqlens stay those of the whole
        rows.

        Raises ValueError where the rows' tokens are no multiple of context x tensor.
        """
        length = batch.ids.shape[1]
        if length % (self.context * self.tensor):
            raise ValueError(
                f"parallel.context x tensor = {self.context * self.tensor} does not divide rows "
                f"of {length} tokens"
            )
        part = length // self.context
        mine = slice(self.context_rank * part, (self.context_rank + 1) * part)
        return Batch(batch.ids[:, mine], batch.targets[:, mine], batch.cu_seqlens)

    def gather(self, x: T) -> list[T]:
        """What every rank gives, in their order, on every rank. Small things: it goes through
        pickle, over the network."""
        if self.ranks is None:
            return [x]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, x)
        return found

    def together(self, work: Callable[[], T], first: bool = False) -> T | None:
        """What `work` returns, run on every rank, or on the first alone while the others wait (and
        get None).

        An OSError or ValueError anywhere ends all: the first rank that has one raises it, the
        others FailedOnOtherRank."""
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
        """For what every rank raises alike: ValueError on the first, FailedOnOtherRank on the
        others."""
        return ValueError(message) if self.first else FailedOnOtherRank()

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all that read different tokens, the same on every rank. x: of any
        shape, on `device`."""
        if self.ranks is None:
            return x
        x = x.clone()
        for name in ("replicate", "shard"):
            if self.ranks[name].size() > 1:
                dist.all_reduce(x, group=self.ranks.get_group(name))
        return x


@contextmanager
def start(parallel: Parallel, device: str = "auto") -> Iterator[Mesh]:
    """This process' place among those that torchrun started, or alone; ends the process group
    afterwards.

    A process group that the caller has started is used as it is, with the caller's current GPU, and
    is left standing.
    device: as in `find_device`; of several GPUs each process takes the one of its LOCAL_RANK.
    Raises ValueError where the mesh does not fit the processes, or there are too few GPUs for them.
    """
    found, given = find_device(device), dist.is_initialized()
    world = dist.get_world_size() if given else int(os.environ.get("WORLD_SIZE", 1))
    resolve(parallel, world)
    if world == 1:
        yield Mesh(found)
        return
    if found.type == "cuda":
        local = torch.cuda.current_device() if given else int(os.environ["LOCAL_RANK"])
        there = torch.cuda.device_count()
        if found.index is not None:
            raise ValueError(
                f"train.device = {device} names one GPU, and there are {world} processes; write "
                "cuda"
            )
        if local >= there:
            raise ValueError(
                f"this machine has {there} GPUs, and torchrun started more processes; start it "
                f"with --nproc-per-node={there}"
            )
        found = torch.device("cuda", local)
        torch.cuda.set_device(found)
    if not given:
        backend, gpu = ("cpu:gloo,cuda:nccl", found) if found.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, device_id=gpu)
    try:
        yield make_mesh(parallel, found)
        dist.barrier()
    finally:
        # what still holds a group's buffers would outlive it and abort the process at its exit
        gc.collect()
        if not given:
            dist.destroy_process_group()


def make_mesh(parallel: MeshSizes, device: torch.device) -> Mesh:
    """The mesh over all processes of the default process group, whatever its backend. ValueError as
    in `resolve`."""
    from torch.distributed.device_mesh import init_device_mesh

    found = resolve(parallel, dist.get_world_size())
    ranks = init_device_mesh(
        device.type,
        (found.replicate, found.shard * found.context, found.tensor),
        mesh_dim_names=("replicate", "shard", "tensor"),
    )
    context_mesh = None
    if found.context > 1:
        names, lengths = zip(*found.sizes.items(), strict=True)
        context_mesh = init_device_mesh(device.type, lengths, mesh_dim_names=names)["context"]
    return Mesh(device, rank=dist.get_rank(), ranks=ranks, context_mesh=context_mesh, **found.sizes)
