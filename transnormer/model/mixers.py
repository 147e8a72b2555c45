"""Token mixers: Gated Linear Attention and the softmax baseline. (x, state, tokens) -> (x, state);
a table at the foot."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.context import Context
from ..ops.dispatch import check_devices
from ..ops.gla import gated_linear_attention
from ..ops.lightning import lightning_attention, lightning_step_
from ..ops.register import without_autocast
from .layers import (
    ACTIVATIONS,
    LRPE,
    NORMS,
    POSITIONS,
    Linear,
    SimpleRMSNorm,
    TokenPositions,
    gated,
)

LayerState = tuple[Tensor, ...]

MIN_QUERY_BLOCK = 512  # attention with a window takes max(window, this) queries at a time


class Mixer(nn.Module, ABC):
    """What both mixers share: projections, activation, position, decay, gate. B rows, T tokens, H
    heads, G heads of keys and values, which differ from H in softmax attention alone."""

    # How tensor parallelism cuts each part, all by heads (train/sharding.py has the words).
    SHARDS: ClassVar[dict[str, str]] = {
        "qkvu_proj": "columns",
        "gate_proj.0": "whole",
        "gate_proj.1": "columns",
        "out_proj": "rows",
        "position": "heads",
        "norm": "norm",
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
        # Rows are grouped by head of keys and values: its queries, key, value (and gates). So a
        # slice for one tensor rank holds whole groups.
        self.parts = own.parts
        fused = self.key_value_heads * self.parts * self.head_dim
        self.qkvu_proj = Linear(d, fused, bias=config.bias)
        self.gate_proj = None
        if rank is not None:
            self.gate_proj = nn.Sequential(
                Linear(d, rank, bias=config.bias), Linear(rank, inner, bias=config.bias)
            )
        self.out_proj = Linear(inner, d, bias=config.bias)
        self.activation = ACTIVATIONS[own.activation]
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
        self.log_decay = torch.tensor(
            self._decays, dtype=torch.float32, device=device or self.log_decay.device
        )

    def keep_heads(self, part: int, parts: int) -> None:
        """Hold the heads of this part alone, for inputs and weights that do."""
        self.heads //= parts
        self.key_value_heads //= parts
        self._decays = self._decays[part * self.heads :][: self.heads]
        self.reset_decay()

    @abstractmethod
    def new_state(self, rows: int) -> LayerState:
        """What the layer remembers before the first token of `rows` texts."""

    @abstractmethod
    def new_slots(self, slots: int, capacity: int) -> LayerState:
        """What the layer keeps of so many texts at a time, in memory that is written in place.
        capacity: the tokens of a text that can be held where the state grows."""

    @abstractmethod
    def read_slots(self, memory: LayerState, slots: Tensor, seen: Tensor) -> LayerState:
        """A copy of the states in slots [S], which have read seen [S] tokens."""

    @abstractmethod
    def write_slots_(
        self, memory: LayerState, slots: Tensor, state: LayerState, seen: Tensor
    ) -> None:
        """Put a state of S rows, which have read seen [S] tokens, into slots [S]."""

    @abstractmethod
    def step_(
        self,
        x: Tensor,
        memory: LayerState,
        tokens: TokenPositions,
        slots: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        """Decoding: x [S, T, D] -> [S, T, D], and the states move on in place.

        memory: as `new_slots` makes it. slots: [S] integers, where each row's state is; -1 for a
        row without one, whose output means nothing; None where row i is slot i.
        lengths: [S], how many of a row's T tokens are read; the outputs of the others mean nothing.
        None: all. There is no gradient."""

    @abstractmethod
    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        """Forward operations of a token beside the projections, on average over rows of seq_len
        tokens."""

    def _project(
        self, x: Tensor, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, T, D] -> q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], gate [B, T, H, V] or
        [B, T, H * V] or None."""
        heads = (self.key_value_heads, self.parts, self.head_dim)
        vectors = self.qkvu_proj(x).unflatten(-1, heads).unbind(-2)
        q, u = _heads(vectors[: self.group]), vectors[self.group + 2 :]
        k, v = vectors[self.group : self.group + 2]
        if isinstance(self.position, LRPE) and self.activation is F.silu:
            q, k = self.position(q, k, tokens, swish=True)
        else:
            # autocast widens some activations
            q, k = self.activation(q).to(v.dtype), self.activation(k).to(v.dtype)
            if self.position is not None:
                q, k = self.position(q, k, tokens)
        return q, k, v, self.gate_proj(x) if self.gate_proj is not None else _heads(u)


def _heads(vectors: Sequence[Tensor]) -> Any:
    """The heads of all groups, [B, T, G, V] for each head of a group -> [B, T, H, V]; None of an
    empty list."""
    if len(vectors) < 2:
        return vectors[0] if vectors else None
    return torch.stack(list(vectors), dim=-2).flatten(2, 3)


def _give_decay(mixer: nn.Module, _: object) -> None:
    """After a state_dict was loaded: where assign=True replaced weights on meta, the decays come to
    the weights."""
    assert isinstance(mixer, Mixer)
    if mixer.log_decay.is_meta and not mixer.out_proj.weight.is_meta:
        mixer.reset_decay(mixer.out_proj.weight.device)


class GatedLinearAttention(Mixer):
    """O = Norm(Q (K^T V) with decay) * U, then a projection (paper equation 11). State: ([B, H, K,
    V] float32,)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        # over all heads together
        self.norm = NORMS[config.norm](config.inner_size, config.norm_eps)
        self.eps = config.norm_eps

    def new_state(self, rows: int) -> LayerState:
        return (self.log_decay.new_zeros(rows, self.heads, self.key_dim, self.head_dim),)

    def new_slots(self, slots: int, capacity: int) -> LayerState:
        (state,) = self.new_state(slots)
        return (state.to(torch.promote_types(state.dtype, self.out_proj.weight.dtype)),)

    def read_slots(self, memory: LayerState, slots: Tensor, seen: Tensor) -> LayerState:
        return (memory[0][slots],)

    def write_slots_(
        self, memory: LayerState, slots: Tensor, state: LayerState, seen: Tensor
    ) -> None:
        memory[0][slots] = self._past(state).to(memory[0].dtype)

    def step_(
        self,
        x: Tensor,
        memory: LayerState,
        tokens: TokenPositions,
        slots: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        q, k, v, gate = self._project(x, tokens)
        outputs = []
        for t in range(x.shape[1]):
            one = slice(t, t + 1)
            owned = slots
            if lengths is not None:
                every = torch.arange(len(x), device=x.device) if slots is None else slots
                owned = every.where(t < lengths, -1)
            outputs.append(
                lightning_step_(
                    q[:, one], k[:, one], v[:, one], self.log_decay, memory[0], slots=owned
                )
            )
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.out_proj(gated(self.norm, mixed.flatten(-2), gate))  # type: ignore[no-any-return]

    def _past(self, state: LayerState) -> Tensor:
        """The state itself. Raises ValueError where it is another mixer's."""
        if len(state) != 1:
            raise ValueError(
                f"the state of a layer is [B, H, K, V] alone; got {len(state)} tensors of another "
                "mixer"
            )
        return state[0]

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        k, v = self.key_dim, self.head_dim
        return self.heads * (2 * min(seq_len, chunk) * (k + v) + 4 * k * v)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        before = None if state is None else self._past(state)
        if self._is_one_op():
            qkvu = self.qkvu_proj(x).unflatten(-1, (self.heads, self.parts, self.head_dim))
            y, after = gated_linear_attention(
                qkvu, self.log_decay, self.eps, state=before, cu_seqlens=tokens.cu_seqlens
            )
            return self.out_proj(y), (after,)
        q, k, v, gate = self._project(x, tokens)
        mixed, after = lightning_attention(
            q,
            k,
            v,
            self.log_decay,
            state=before,
            cu_seqlens=tokens.cu_seqlens,
            return_state=True,
            context=self.context,
        )
        return self.out_proj(gated(self.norm, mixed.flatten(-2), gate)), (after,)

    def _is_one_op(self) -> bool:
        """Whether all between the projections is as published, without positions."""
        plain = self.position is None and self.activation is F.silu and self.parts == 4
        return plain and isinstance(self.norm, SimpleRMSNorm) and self.context is None


class SoftmaxAttention(Mixer):
    """Causal softmax attention, the baseline. A decay weighs the keys before the softmax, which is
    ALiBi. With a window each query sees the last `window` keys, its own included.

    State: (keys [B, P, G, K], values [B, P, G, V]); the last `seen` of the P places of each row are
    filled. P is the number of tokens read by the row that has read most, but at most window - 1."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.decays = any(self._decays)
        self.window = config.layers[layer].window

    def new_state(self, rows: int) -> LayerState:
        weight, heads = self.out_proj.weight, self.key_value_heads
        return (
            weight.new_zeros(rows, 0, heads, self.key_dim),
            weight.new_zeros(rows, 0, heads, self.head_dim),
        )

    # In slots, keys and values are [N, C + 1, G, K] and [N, C + 1, G, V]. The token at position p
    # of a text stands in place p mod C: C is the window, so that a token takes the place of the one
    # that its own window no longer shows, or without a window the capacity. The last place takes
    # what is not to be kept, because a kernel cannot leave a row out.

    def new_slots(self, slots: int, capacity: int) -> LayerState:
        places, weight = self.window or capacity, self.out_proj.weight
        return (
            weight.new_zeros(slots, places + 1, self.key_value_heads, self.key_dim),
            weight.new_zeros(slots, places + 1, self.key_value_heads, self.head_dim),
        )

    def read_slots(self, memory: LayerState, slots: Tensor, seen: Tensor) -> LayerState:
        most, places = int(seen.max()) if len(seen) else 0, memory[0].shape[1] - 1
        kept = most if self.window is None else min(most, self.window - 1)
        if kept > places:
            raise ValueError(f"a slot has read {most:,} tokens, but holds {places:,}")
        positions = seen[:, None] - kept + torch.arange(kept, device=seen.device)  # [S, P]
        filled = (positions >= 0)[..., None, None]
        place = positions % max(1, places)
        return tuple(part[slots[:, None], place].masked_fill(~filled, 0) for part in memory)

    def write_slots_(
        self, memory: LayerState, slots: Tensor, state: LayerState, seen: Tensor
    ) -> None:
        state, places = self._past(state), memory[0].shape[1] - 1
        most = int(seen.max()) if len(seen) else 0
        if self.window is None and most > places:
            raise ValueError(f"a state of {most:,} tokens does not fit a slot of {places:,}")
        kept = state[0].shape[1]
        positions = seen[:, None] - kept + torch.arange(kept, device=seen.device)  # [S, P]
        place = (positions % max(1, places)).where(positions >= 0, places)
        for part, values in zip(memory, state, strict=True):
            part[slots[:, None], place] = values.to(part.dtype)

    def step_(
        self,
        x: Tensor,
        memory: LayerState,
        tokens: TokenPositions,
        slots: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:
        q, k, v, gate = self._project(x, tokens)
        places = memory[0].shape[1] - 1
        every = torch.arange(len(x), device=x.device) if slots is None else slots
        rows = every.clamp(min=0)
        outputs = []
        for t in range(x.shape[1]):
            position = tokens.positions[:, t]  # [S]
            kept = every >= 0
            if lengths is not None:
                kept &= t < lengths
            if self.window is None:
                kept &= position < places
            place = (position % max(1, places)).where(kept, places)
            for part, new in zip(memory, (k, v), strict=True):
                part[rows, place] = new[:, t].to(part.dtype)
            keys, values = (part if slots is None else part[rows] for part in memory)
            # [S, C]: how many tokens before this one the token in each place stands
            age = (position[:, None] - torch.arange(places, device=x.device)) % max(1, places)
            bias = torch.zeros_like(age, dtype=torch.float32)[:, None]
            if self.decays:
                bias = self.log_decay[:, None] * age[:, None]
            mask = bias.masked_fill((age > position[:, None])[:, None], -torch.inf)
            one = q[:, t : t + 1]
            mixed = self._weighed(
                one, keys[:, :places].to(one), values[:, :places].to(one), mask[:, :, None]
            )
            if self.window is None:
                mixed = mixed.masked_fill((position >= places)[:, None, None, None], torch.nan)
            outputs.append(mixed)
        mixed = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).flatten(-2)
        return self.out_proj(mixed if gate is None else mixed * gate.reshape(mixed.shape))  # type: ignore[no-any-return]

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        window = seq_len if self.window is None else min(self.window, seq_len)
        # keys that a query sees, times two: the first queries of a row see fewer than a window
        visible = 2 * window - window**2 / seq_len
        return self.heads * visible * (self.key_dim + self.head_dim)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        q, k, v, gate = self._project(x, tokens)
        keys, values = (None, None) if state is None else self._past(state)
        check_devices("softmax attention", x=x, log_decay=self.log_decay, keys=keys, values=values)
        attend = self._attend if tokens.cu_seqlens is None else self._attend_packed
        mixed, after = attend(q, k, v, state, tokens)
        mixed = mixed.flatten(-2)
        return self.out_proj(mixed if gate is None else mixed * gate.reshape(mixed.shape)), after

    def _past(self, state: LayerState) -> LayerState:
        """The keys and values of a state. Raises ValueError where they are another mixer's, or of
        other widths."""
        heads = self.key_value_heads
        wanted = [[heads, self.key_dim], [heads, self.head_dim]]
        if [list(part.shape[2:]) for part in state] != wanted:
            raise ValueError(
                f"the state of a layer is keys [B, P, {heads}, {self.key_dim}] and values "
                f"[B, P, {heads}, {self.head_dim}]; got {[list(part.shape) for part in state]}"
            )
        return state

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        if state is not None:
            k, v = (
                torch.cat([state[0].to(k.dtype), k], dim=1),
                torch.cat([state[1].to(v.dtype), v], dim=1),
            )
        queries, keys = q.shape[1], k.shape[1]
        block = queries if self.window is None else max(self.window, MIN_QUERY_BLOCK)
        if queries <= block:
            slides = self.window is not None and keys > self.window
            mask = None
            if state is not None or self.decays or slides:
                mask = self._mask(queries, keys, tokens.seen)
            mixed = self._weighed(q, k, v, mask)
        else:
            # In blocks of queries, each with the keys that its windows reach, because a mask and
            # products of all queries with all keys would grow with the square of the length.
            assert self.window is not None
            parts = []
            for start in range(0, queries, block):
                part, begin = q[:, start : start + block], keys - queries + start
                reached = slice(max(0, begin + 1 - self.window), begin + part.shape[1])
                near = k[:, reached]
                seen = None if tokens.seen is None else tokens.seen + start
                mask = self._mask(part.shape[1], near.shape[1], seen)
                parts.append(self._weighed(part, near, v[:, reached], mask))
            mixed = torch.cat(parts, dim=1)
        return mixed, (self._kept(k), self._kept(v))

    def _weighed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The values' means, [B, queries, H, V], weighed by the softmax; mask: as `_mask` gives it,
        None where only later keys are masked."""
        # with decays in float32, because half precision cannot tell far distances apart
        wide = (
            q.dtype
            if mask is None or not self.decays
            else torch.promote_types(q.dtype, torch.float32)
        )
        mask = None if mask is None else mask.to(wide)
        attention = _exact_attention if self.decays else F.scaled_dot_product_attention
        mixed: Tensor = attention(
            q.transpose(1, 2).to(wide),
            k.transpose(1, 2).to(wide),
            v.transpose(1, 2).to(wide),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.head_dim**-0.5,
            enable_gqa=self.group > 1,
        )
        return mixed.transpose(1, 2).to(v.dtype)

    def _kept(self, x: Tensor) -> Tensor:
        """What the next token can still see of keys or values, [B, P, G, K]."""
        if self.window is None or x.shape[1] < self.window:
            return x
        # a copy, because a view would keep all of x in memory
        return x[:, 1 - self.window :].clone()

    def _mask(self, queries: int, keys: int, seen: Tensor | None) -> Tensor:
        """[B or 1, H or 1, queries, keys], added to the scores: -inf where a key is later, or out
        of the window, or a place is not filled."""
        key = torch.arange(keys, device=self.log_decay.device)
        distance = key[keys - queries :, None] - key  # [queries, keys]
        bias = torch.zeros_like(distance, dtype=torch.float32)[None, None]
        if self.decays:
            bias = self.log_decay[:, None, None] * distance
        allowed = (distance >= 0)[None, None]
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        if seen is not None:
            allowed = allowed & (key >= (keys - queries - seen)[:, None, None, None])
        return bias.masked_fill(~allowed, -torch.inf)

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        """Sequence by sequence; their keys and values come back right-aligned over the longest."""
        assert tokens.cu_seqlens is not None
        bounds = tokens.cu_seqlens.tolist()
        seen = [0] * (len(bounds) - 1) if tokens.seen is None else tokens.seen.tolist()
        outputs, kept = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            past = None
            if state is not None and seen[n]:
                past = tuple(part[n : n + 1, max(0, part.shape[1] - seen[n]) :] for part in state)
            # an empty sequence has an empty output
            mixed, after = q[:, start:stop, :, : self.head_dim], past
            if stop > start or past is None:
                alone = TokenPositions(tokens.positions[:, start:stop], None)
                mixed, after = self._attend(
                    q[:, start:stop], k[:, start:stop], v[:, start:stop], past, alone
                )
            outputs.append(mixed)
            kept.append(after)
        longest = max(after[0].shape[1] for after in kept if after)
        state = tuple(
            torch.cat(
                [
                    F.pad(after[part], (0, 0, 0, 0, longest - after[part].shape[1], 0))
                    for after in kept
                    if after
                ]
            )
            for part in (0, 1)
        )
        return torch.cat(outputs, dim=1), state


# Autocast would round the decays' mask, and with it far distances.
_exact_attention = without_autocast(F.scaled_dot_product_attention)

MIXERS: dict[str, Callable[[ModelConfig, int], Mixer]] = {
    "gla": GatedLinearAttention,
    "softmax": SoftmaxAttention,
}
