"""The recurrent state of one model: an argument and a result of every forward, never kept on a
module."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import read_tensors, write_tensors

if TYPE_CHECKING:
    from .language_model import LanguageModel
    from .mixer import LayerState


@dataclass(frozen=True)
class State:
    """What a model remembers of the tokens so far, for B rows.

    layers: per layer what its mixer keeps: Gated Linear Attention one [B, H, K, V] in float32,
        whose size does not depend on how much was read; softmax attention all keys and values or,
        with a window, the last ones; and a short convolution the last tokens that it read.
    seen: [B] int64, the tokens read by each row.
    """

    layers: list[LayerState]
    seen: Tensor

    @classmethod
    def new(cls, model: LanguageModel, rows: int = 1) -> State:
        """The state before the first token."""
        layers = [block.mixer.new_state(rows) for block in model.blocks()]
        return cls(layers, torch.zeros(rows, dtype=torch.int64, device=model.device))

    @classmethod
    def stack(cls, states: Sequence[State]) -> State:
        """One state with the rows of all of these, which are of one model.

        Keys and values of softmax attention, whose number differs, stand at the right of their
        places."""
        layers = []
        for layer in zip(*(state.layers for state in states), strict=True):
            parts = []
            for tensors in zip(*layer, strict=True):
                most = max(part.shape[1] for part in tensors)
                parts.append(torch.cat([_padded_left(part, most) for part in tensors]))
            layers.append(tuple(parts))
        return cls(layers, torch.cat([state.seen for state in states]))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer) + self.seen.nbytes

    def clone(self) -> State:
        """A copy that shares no memory: a fork of the conversation so far."""
        return State(
            [tuple(part.clone() for part in layer) for layer in self.layers], self.seen.clone()
        )

    def trimmed(self, model: LanguageModel) -> State:
        """The same state, in the same memory, without places of keys and values that are empty in
        every row, which reading several texts together may leave."""
        most, layers = int(self.seen.max()), []
        for own, layer in zip(model.config.layers, self.layers, strict=True):
            spare = 0 if own.linear else layer[0].shape[1] - own.kept(most)
            layers.append((*(part[:, spare:] for part in layer[:2]), *layer[2:]))
        return State(layers, self.seen)

    def finite(self) -> bool:
        """Whether every number in it is finite. On a GPU this waits for the device."""
        checks = [part.isfinite().all() for layer in self.layers for part in layer]
        return bool(torch.stack(checks).all())

    def for_autograd(self) -> State:
        """Itself or, where it was made under torch.inference_mode, a copy that gradients can be
        computed with."""
        parts = (part for layer in (*self.layers, (self.seen,)) for part in layer)
        return self.clone() if any(part.is_inference() for part in parts) else self

    def select(self, rows: Sequence[int] | Sequence[bool] | Tensor) -> State:
        """The state of some rows.

        rows: their numbers (from the end where negative) in the order wanted, each as often as
        wanted; or a mask, [B] bools, of the rows to keep. Raises ValueError for anything else."""
        index, held = torch.as_tensor(rows), len(self.seen)
        if index.dim() != 1 or (
            index.numel() and (index.is_floating_point() or index.is_complex())
        ):
            raise ValueError(
                f"rows are [N] integers, or a mask of {held} bools; got {list(index.shape)} "
                f"{index.dtype}"
            )
        if index.dtype == torch.bool:
            if len(index) != held:
                raise ValueError(
                    f"a mask of the state's {held} rows has as many bools; got {len(index)}"
                )
            index = index.nonzero().flatten()
        if (
            index.is_cpu
            and index.numel()
            and not -held <= int(index.min()) <= int(index.max()) < held
        ):
            raise ValueError(f"the state holds {held} rows; got {index.tolist()}")
        index = index.to(self.seen.device, torch.int64)
        return State(
            [tuple(part[index] for part in layer) for layer in self.layers], self.seen[index]
        )

    def save(
        self,
        path: str | Path,
        beside: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write to one safetensors file, whole or not at all. beside, metadata: what else the file
        is to hold, which `load` knows nothing of."""
        tensors = {
            f"{n}.{m}": part for n, layer in enumerate(self.layers) for m, part in enumerate(layer)
        }
        write_tensors(
            path,
            {"seen": self.seen, **tensors, **(beside or {})},
            {"state": _shape(self), **(metadata or {})},
        )

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> State:
        """Read a state saved from a model of this shape. Raises ValueError where it does not fit
        the model."""
        return cls.of_tensors(*read_tensors(path), model, path)

    @classmethod
    def of_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        model: LanguageModel,
        path: str | Path,
    ) -> State:
        """A state of what a file held; `path` is named in errors. Raises as `load`."""
        fresh = cls.new(model)
        names = {f"{n}.{m}" for n, layer in enumerate(fresh.layers) for m in range(len(layer))}
        if metadata.get("state") != _shape(fresh) or tensors.keys() != {"seen", *names}:
            raise ValueError(f"{path}: not a state of this model ({len(fresh.layers)} layers)")
        seen = tensors["seen"]
        if seen.dtype != torch.int64 or seen.dim() != 1 or (seen < 0).any():
            raise ValueError(f"{path}: damaged: `seen` must be [B] counts of tokens")
        layers, most = [], int(seen.max()) if seen.numel() else 0
        for n, layer in enumerate(fresh.layers):
            parts = tuple(tensors[f"{n}.{m}"] for m in range(len(layer)))
            for part, wanted in zip(parts, layer, strict=True):
                fits = part.dim() == wanted.dim() and part.shape[0] == len(seen)
                fits &= part.is_floating_point() and part.itemsize > 1
                fits &= all(
                    size == need
                    for size, need in zip(part.shape[1:], wanted.shape[1:], strict=False)
                    if need
                )
                if not fits:
                    raise ValueError(
                        f"{path}: layer {n} holds {list(part.shape)}, the model needs "
                        f"{list(wanted.shape)}"
                    )
            own = model.config.layers[n]
            places = parts[0].shape[1]
            if not own.linear and not own.kept(most) <= places == own.kept(places):
                raise ValueError(
                    f"{path}: layer {n} holds keys of {places} tokens after {most} were read, the "
                    f"model keeps {own.kept(most)}: its windows are others"
                )
            layers.append(
                tuple(part.to(wanted.device) for part, wanted in zip(parts, layer, strict=True))
            )
        return cls(layers, seen.to(model.device))


def _padded_left(part: Tensor, most: int) -> Tensor:
    """[B, P, ...] -> [B, most, ...], zeros first."""
    return F.pad(part, (0, 0) * (part.dim() - 2) + (most - part.shape[1], 0))


def _shape(state: State) -> str:
    """What a file's metadata say of a state: how many tensors each layer has."""
    return json.dumps([len(layer) for layer in state.layers])
