"""The base class of token mixers: (x, state, tokens) -> (x, state), and decoding in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.context import Context
from ..ops.norm import simple_rms_norm
from .layers import ACTIVATIONS, LRPE, POSITIONS, Linear, ShortConvolution, TokenPositions, gated

LayerState = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """What both mixers share: projections, activation, position, decay, gate. B rows, T tokens, H
    heads, G heads of keys and values, which differ from H in softmax attention alone."""

    # What tensor parallelism does with each part; train/sharding.py gives the names their meaning.
    SHARDS: ClassVar[dict[str, str]] = {
        "qkvu_proj": "columns",
        "gate_proj.0": "whole",
        "gate_proj.1": "columns",
        "out_proj": "rows",
        "position": "heads",
        "convolution": "heads",
        "decay_proj": "columns",
        "norm": "norm",
        "head_norm": "whole",  # where it has weights, tensor ranks are refused (mesh_sizes.py)
    }
    context: Context | None = None  # the processes that share a row's tokens

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        own = config.layers[layer]
        d, inner, rank = config.hidden_size, own.inner_size, own.gate_rank
        self.heads, self.head_dim, self.key_dim = (
            own.num_attention_heads,
            own.head_dim,
            own.key_dim,
        )
        self.key_value_heads, self.group = own.num_key_value_heads, own.group
        # The rows of qkvu_proj's weight are grouped by head of keys and values: its queries, key,
        # value and gates. So a slice for one tensor rank holds whole groups.
        self.parts = own.parts
        fused = self.key_value_heads * self.parts * self.head_dim
        self.qkvu_proj = Linear(d, fused, bias=config.bias)
        self.gate_proj = None
        if rank is not None:
            self.gate_proj = nn.Sequential(
                Linear(d, rank, bias=config.bias), Linear(rank, inner, bias=config.bias)
            )
        self.out_proj = Linear(inner, d, bias=config.bias)
        # of what is mixed, where a mixer has one: over all heads together, or over each by itself
        self.norm: nn.Module | None = None
        self.head_norm: nn.Module | None = None
        self.activation = ACTIVATIONS[own.activation]
        self.qk_eps = config.norm_eps if config.qk_norm else None
        self.convolution, self.convolves_input = None, config.convolution == "input"
        if own.convolved:
            groups = 1 if self.convolves_input else self.key_value_heads
            self.convolution = ShortConvolution(groups, own.convolved // groups)
        self.position = None if own.position == "none" else POSITIONS[own.position](own)
        self._decays = config.log_decay(layer)
        self.register_buffer(
            "log_decay", torch.tensor(self._decays, dtype=torch.float32), persistent=False
        )
        self.log_decay: Tensor
        self.register_load_state_dict_post_hook(_give_decay)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Mixer:
        # Decays are constants in float32 whatever the weights are cast to: exp(-1e-5) is 1 in
        # bfloat16.
        super()._apply(fn, recurse)
        self.reset_decay()
        return self

    def reset_decay(self, device: torch.device | None = None) -> None:
        """Give log_decay its values, which no file stores; on another device, where one is
        named."""
        decays = torch.tensor(
            self._decays, dtype=torch.float32, device=device or self.log_decay.device
        )
        old = self.log_decay
        if (old.dtype, old.device, old.shape) == (decays.dtype, decays.device, decays.shape):
            decays = old.copy_(decays)  # a recorded graph may read it where it is
        self.log_decay = decays

    def keep_heads(self, rank: int, ranks: int) -> None:
        """Keep only the heads of tensor rank `rank` of `ranks`, as its weights and inputs do."""
        self.heads //= ranks
        self.key_value_heads //= ranks
        self._decays = self._decays[rank * self.heads :][: self.heads]
        self.reset_decay()

    @abstractmethod
    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        """x [B, T, D] -> [B, T, D], and the state after the last token.

        state: what the rows, or the packed sequences, have read before; None: nothing. Raises
        ValueError for another mixer's state."""

    @abstractmethod
    def new_state(self, rows: int) -> LayerState:
        """What the layer remembers before the first token of `rows` texts; last what its
        convolution does (`_new_past`)."""

    def _new_past(self, rows: int) -> LayerState:
        """What the convolution remembers before the first token: zeros, or nothing without one."""
        if self.convolution is None:
            return ()
        return (self.convolution.new_past(rows).to(self.out_proj.weight.dtype),)

    # In slots a state of one size has a row for each of them. A mixer whose state grows answers
    # these three otherwise.

    def new_slots(self, slots: int, capacity: int) -> LayerState:
        """Memory for the states of `slots` texts, which is written in place. capacity: the tokens
        of a text that a slot can hold, where the state grows."""
        dtype = self.out_proj.weight.dtype
        state = self.new_state(slots)[: -1 if self.convolution is not None else None]
        state = tuple(part.to(torch.promote_types(part.dtype, dtype)) for part in state)
        # One slot more takes what is not to be kept, because a kernel cannot leave a row out.
        return *state, *self._new_past(slots + 1)

    def read_slots(self, memory: LayerState, slots: Tensor, seen: Tensor) -> LayerState:
        """A copy of the states in slots [S], which have read seen [S] tokens."""
        return tuple(part[slots] for part in memory)

    def write_slots_(
        self, memory: LayerState, slots: Tensor, state: LayerState, seen: Tensor
    ) -> None:
        """Put a state of S rows, which have read seen [S] tokens, into slots [S]."""
        for part, values in zip(memory, self._past(state), strict=True):
            part[slots] = values.to(part.dtype)

    def _past(self, state: LayerState) -> LayerState:
        """The state as it is. Raises ValueError where it is another mixer's."""
        return state

    def step_(self, x: Tensor, memory: LayerState, tokens: TokenPositions) -> Tensor:
        """Decoding: x [S, T, D] -> [S, T, D], and the states move on in place.

        memory: as `new_slots` makes it. tokens: `tokens.owners` says which slot each row's state is
        in, and which tokens are read; the outputs of all others mean nothing. There is no gradient.
        """
        x, qkvu, _ = self._qkvu(x, memory[-1:], tokens, step=True)
        return self._project_out(*self.mix_(x, qkvu, memory, tokens))

    @abstractmethod
    def mix_(
        self, x: Tensor, qkvu: Tensor, memory: LayerState, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor | None]:
        """What lies between the projections of a decoding step: mixed [S, T, H, V] and the gate,
        [S, T, H, V] or [S, T, H V] or None; the states move on in place.

        x: [S, T, D], which only a mixer that `reads_input` looks at. qkvu: [S, T, G, parts, V], its
        projection, which the convolution has read where there is one. Other arguments as in
        `step_`."""

    @property
    def reads_input(self) -> bool:
        """Whether anything but `qkvu_proj` reads what the mixer is given."""
        return self.gate_proj is not None or self.convolves_input

    @abstractmethod
    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        """Forward operations of a token beside the projections, on average over rows of seq_len
        tokens."""

    def _qkvu(
        self, x: Tensor, past: LayerState, tokens: TokenPositions, *, step: bool = False
    ) -> tuple[Tensor, Tensor, LayerState]:
        """x [B, T, D] and its projection [B, T, G, parts, V], one of which the convolution has read
        where there is one; and what it remembers.

        past: what the convolution remembers, if anything; of a decoding step its memory, which
        moves on in place."""
        last: LayerState = ()
        if self.convolves_input:
            x, last = self._convolved(x, past, tokens, step)
        qkvu = self.qkvu_proj(x)
        if not self.convolves_input:
            qkvu, last = self._convolved(qkvu, past, tokens, step)
        return x, self.by_head(qkvu), last

    def by_head(self, qkvu: Tensor) -> Tensor:
        """What `qkvu_proj` gives as [B, T, G, parts, V]."""
        return qkvu.unflatten(-1, (self.key_value_heads, self.parts, self.head_dim))

    def _convolved(
        self, x: Tensor, past: LayerState, tokens: TokenPositions, step: bool
    ) -> tuple[Tensor, LayerState]:
        if self.convolution is None:
            return x, ()
        if step:
            return self.convolution.step_(x, past[0], tokens), ()
        y, last = self.convolution(x, past[0] if past else None, tokens, self.context)
        return y, (last,)

    def _project(
        self, x: Tensor, qkvu: Tensor, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What `_qkvu` gives -> q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], gate [B, T, H, V]
        or [B, T, H * V] or None."""
        vectors = qkvu.unbind(-2)
        q, u = _heads(vectors[: self.group]), vectors[self.group + 2 :]
        k, v = vectors[self.group : self.group + 2]
        if isinstance(self.position, LRPE) and self.activation is F.silu:
            q, k = self.position(q, k, tokens, swish=True)
        else:
            # autocast widens some activations
            q, k = self.activation(q).to(v.dtype), self.activation(k).to(v.dtype)
            if self.position is not None:
                q, k = self.position(q, k, tokens)
        if self.qk_eps is not None:
            q, k = (simple_rms_norm(x, self.qk_eps).to(v.dtype) for x in (q, k))
        return q, k, v, self.gate_proj(x) if self.gate_proj is not None else _heads(u)

    def _project_out(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """mixed: [B, T, H, V]."""
        return self.out_proj(self.gated_heads(mixed, gate))  # type: ignore[no-any-return]

    def gated_heads(self, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """What `out_proj` reads, [B, T, H V]: mixed [B, T, H, V], normed where there is a norm,
        times the gate."""
        if self.norm is not None:
            return gated(self.norm, mixed.flatten(-2), gate)
        gate = None if gate is None else gate.reshape(mixed.shape)
        if self.head_norm is not None:
            return gated(self.head_norm, mixed, gate).flatten(-2)
        return (mixed if gate is None else mixed * gate).flatten(-2)


def _heads(vectors: Sequence[Tensor]) -> Any:
    """The heads of all groups, [B, T, G, V] for each head of a group -> [B, T, H, V]; None of an
    empty list."""
    if len(vectors) < 2:
        return vectors[0] if vectors else None
    return torch.stack(list(vectors), dim=-2).flatten(2, 3)


def _give_decay(mixer: nn.Module, _: object) -> None:
    """Hook after loading: if assign=True gave a model on meta real weights, put the decays on their
    device."""
    assert isinstance(mixer, Mixer)
    if mixer.log_decay.is_meta and not mixer.out_proj.weight.is_meta:
        mixer.reset_decay(mixer.out_proj.weight.device)
