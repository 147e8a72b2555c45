"""Sharded tensors in safetensors files, read by torch.distributed.checkpoint onto any mesh. Nothing
is pickled."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from .mesh import Mesh

RANDOM = "_rng/"  # in the name of a random state, before the rank whose it is


def pieces(
    tensors: Iterable[tuple[str, Any]], mesh: Mesh
) -> Iterator[tuple[str, Tensor, list[int], list[int]]]:
    """(name, local tensor, where it begins in the whole, the whole's shape) of what this process is
    to write.

    Of what several processes hold alike one writes, chosen by the name. Plain tensors are the first
    process', but for the random states, of which each has its own."""
    from torch.distributed.checkpoint import DefaultSavePlanner

    for name, tensor in tensors:
        if not hasattr(tensor, "placements"):
            if mesh.first or RANDOM in name:
                yield name, tensor.detach(), [0] * tensor.dim(), list(tensor.shape)
            continue
        grid, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        alike = [n for n, placement in enumerate(tensor.placements) if placement.is_replicate()]
        if place is None or any(
            place[n] != zlib.crc32(name.encode()) % grid.size(n) for n in alike
        ):
            continue
        planner = DefaultSavePlanner()
        planner.set_up_planner({name: tensor.detach()})
        for item in planner.create_local_plan().items:
            piece, described = planner.resolve_data(item), item.tensor_data
            assert isinstance(piece, Tensor)
            assert described is not None
            if piece.numel():
                yield name, piece, list(described.chunk.offsets), list(described.size)


def optimizer_state(folder: Path, model: LanguageModel) -> dict[str, Tensor]:
    """Room for every tensor of the folder's files that is not a weight ("kind/name"), by name.

    It is sharded as its parameter is, where it has the parameter's shape.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    room: dict[str, Tensor] = {}
    stored: dict[str, Any] = dict(
        HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    )
    for name, kind in stored.items():
        if "/" not in name:
            continue
        like, dtype = parameters.get(name.partition("/")[2]), kind.properties.dtype
        if like is not None and like.shape == kind.size:
            room[name] = torch.empty_like(like, dtype=dtype)
        else:
            room[name] = torch.empty(kind.size, dtype=dtype)
    return room


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, sharded or not, from the folder's files by name; each process reads what it
    needs by itself."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():  # that this process reads alone, as it is asked to
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
