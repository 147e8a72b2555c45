"""The states of many texts in memory that is allocated once and written in place, as decoding wants
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .state import State

if TYPE_CHECKING:
    from .language_model import LanguageModel
    from .mixer import LayerState


@dataclass(frozen=True)
class Slots:
    """N slots, each of which holds what one text has left in every layer.

    A slot begins empty. `LanguageModel.step_` moves slots on in place, without allocating memory
    for a state; a `State`, which is a value, is copied in and out.

    layers: per layer what its mixer keeps for all slots (the mixers' `new_slots` say what).
    seen: [N] int64, the tokens read by each slot.
    capacity: the tokens that a slot can hold in a layer whose memory grows with the text. Nothing
        is kept of later ones, and what such a layer gives after them is NaN.
    """

    layers: list[LayerState]
    seen: Tensor
    capacity: int

    @classmethod
    def new(cls, model: LanguageModel, slots: int, capacity: int = 0) -> Slots:
        """Empty slots, on the model's device. capacity: it may be 0 where no layer's state grows
        without end (`ModelConfig.bounded`)."""
        layers = [block.mixer.new_slots(slots, capacity) for block in model.blocks()]
        seen = torch.zeros(slots, dtype=torch.int64, device=model.device)
        return cls(layers, seen, capacity)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer) + self.seen.nbytes

    def read(self, model: LanguageModel, slots: Sequence[int]) -> State:
        """A copy of some slots' states, one row each.

        Raises ValueError where a slot has read more than it could hold."""
        index = self._index(slots)
        seen = self.seen[index]
        layers = [
            block.mixer.read_slots(layer, index, seen)
            for block, layer in zip(model.blocks(), self.layers, strict=True)
        ]
        return State(layers, seen)

    def write_(self, model: LanguageModel, slots: Sequence[int], state: State) -> None:
        """Put a state's rows into these slots, which forget what they held.

        Raises ValueError where a row has read more than a slot can hold, or the state does not fit
        the model."""
        index = self._index(slots)
        if len(state.seen) != len(index) or len(state.layers) != len(self.layers):
            raise ValueError(
                f"a state of {len(state.layers)} layers and {len(state.seen)} rows does not fit "
                f"{len(index)} slots of {len(self.layers)} layers"
            )
        self.zero_(slots)
        layers = zip(model.blocks(), self.layers, state.layers, strict=True)
        for block, memory, layer_state in layers:
            block.mixer.write_slots_(memory, index, layer_state, state.seen)
        self.seen[index] = state.seen

    def zero_(self, slots: Sequence[int]) -> None:
        """Empty these slots: each is as before the first token of a text."""
        self._fill(slots, 0)

    def poison_(self, slots: Sequence[int]) -> None:
        """Fill these slots with NaN: a step from one before it is written again gives NaN."""
        self._fill(slots, torch.nan)

    def _fill(self, slots: Sequence[int], value: float) -> None:
        index = self._index(slots)
        for layer in self.layers:
            for part in layer:
                part[index] = value
        self.seen[index] = 0

    def _index(self, slots: Sequence[int]) -> Tensor:
        wanted, held = [int(slot) for slot in slots], len(self.seen)
        if len({*wanted}) < len(wanted) or not all(0 <= slot < held for slot in wanted):
            raise ValueError(f"slots must be different numbers below {held}; got {wanted}")
        return torch.tensor(wanted, dtype=torch.int64, device=self.seen.device)
