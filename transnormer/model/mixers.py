"""Token mixers: Gated Linear Attention and the softmax baseline. (x, state, tokens) -> (x, state);
a table at the foot."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import POSITIONS as POSITION_FACTS
from ..config import ModelConfig
from ..ops.context import Context
from ..ops.dispatch import check_devices
from ..ops.gla import gated_linear_attention
from ..ops.lightning import lightning_attention
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


class Mixer(nn.Module, ABC):
    """What both mixers share: projections, activation, position, decay, gate. B rows, T tokens, H
    heads."""

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
        d, inner, rank = config.hidden_size, config.inner_size, config.gate_rank
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        # Rows head by head, each head's q, k, v (and u) together: slices of it hold whole heads.
        self.parts = 4 if config.gate and rank is None else 3
        self.qkvu_proj = Linear(d, self.parts * inner, bias=config.bias)
        self.gate_proj = None
        if rank is not None:
            self.gate_proj = nn.Sequential(
                Linear(d, rank, bias=config.bias), Linear(rank, inner, bias=config.bias)
            )
        self.out_proj = Linear(inner, d, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.position = POSITIONS[config.position](config) if config.has_position(layer) else None
        facts = POSITION_FACTS[config.position] if config.has_position(layer) else None
        self.key_dim = self.head_dim * (facts.width if facts else 1)
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
        self._decays = self._decays[part * self.heads :][: self.heads]
        self.reset_decay()

    @abstractmethod
    def new_state(self, rows: int) -> LayerState:
        """What the layer remembers before the first token of `rows` texts."""

    @abstractmethod
    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        """Forward operations of a token beside the projections, on average over rows of seq_len
        tokens."""

    def _project(
        self, x: Tensor, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x [B, T, D] -> q, k [B, T, H, K], v [B, T, H, V], gate [B, T, H, V] or [B, T, H * V] or
        None."""
        q, k, v, *u = (
            self.qkvu_proj(x).unflatten(-1, (self.heads, self.parts, self.head_dim)).unbind(-2)
        )
        if isinstance(self.position, LRPE) and self.activation is F.silu:
            q, k = self.position(q, k, tokens, swish=True)
        else:
            # autocast widens some activations
            q, k = self.activation(q).to(v.dtype), self.activation(k).to(v.dtype)
            if self.position is not None:
                q, k = self.position(q, k, tokens)
        return q, k, v, self.gate_proj(x) if self.gate_proj is not None else u[0] if u else None


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

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        k, v = self.key_dim, self.head_dim
        return self.heads * (2 * min(seq_len, chunk) * (k + v) + 4 * k * v)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        if state is not None and len(state) != 1:
            raise ValueError(
                f"the state of a layer is [B, H, K, V] alone; got {len(state)} tensors of another "
                "mixer"
            )
        before = None if state is None else state[0]
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
    ALiBi.

    State: (keys [B, P, H, K], values [B, P, H, V]); the last `seen` of the P places of each row are
    filled."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.decays = any(self._decays)

    def new_state(self, rows: int) -> LayerState:
        weight = self.out_proj.weight
        return (
            weight.new_zeros(rows, 0, self.heads, self.key_dim),
            weight.new_zeros(rows, 0, self.heads, self.head_dim),
        )

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        return self.heads * seq_len * (self.key_dim + self.head_dim)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        q, k, v, gate = self._project(x, tokens)
        keys, values = self._past(state)
        check_devices("softmax attention", x=x, log_decay=self.log_decay, keys=keys, values=values)
        attend = self._attend if tokens.cu_seqlens is None else self._attend_packed
        mixed, after = attend(q, k, v, state, tokens)
        mixed = mixed.flatten(-2)
        return self.out_proj(mixed if gate is None else mixed * gate.reshape(mixed.shape)), after

    def _past(self, state: LayerState | None) -> LayerState | tuple[None, None]:
        """The keys and values of a state. Raises ValueError where they are another mixer's, or of
        other widths."""
        if state is None:
            return None, None
        wanted = [[self.heads, self.key_dim], [self.heads, self.head_dim]]
        if [list(part.shape[2:]) for part in state] != wanted:
            raise ValueError(
                f"the state of a layer is keys [B, P, {self.heads}, {self.key_dim}] and values "
                f"[B, P, {self.heads}, "
                f"{self.head_dim}]; got {[list(part.shape) for part in state]}"
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
        mask = (
            self._mask(q.shape[1], k.shape[1], tokens.seen)
            if state is not None or self.decays
            else None
        )
        wide = (
            q.dtype
            if mask is None or not self.decays
            else torch.promote_types(q.dtype, torch.float32)
        )
        # half precision cannot tell far distances apart
        mask = None if mask is None else mask.to(wide)
        attention = _exact_attention if self.decays else F.scaled_dot_product_attention
        mixed = attention(
            q.transpose(1, 2).to(wide),
            k.transpose(1, 2).to(wide),
            v.transpose(1, 2).to(wide),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.head_dim**-0.5,
        )
        return mixed.transpose(1, 2).to(v.dtype), (k, v)

    def _mask(self, queries: int, keys: int, seen: Tensor | None) -> Tensor:
        """[B or 1, H or 1, queries, keys], added to the scores: -inf where a key is later or a
        place is not filled."""
        key = torch.arange(keys, device=self.log_decay.device)
        distance = key[keys - queries :, None] - key  # [queries, keys]
        bias = torch.zeros_like(distance, dtype=torch.float32)[None, None]
        if self.decays:
            bias = self.log_decay[:, None, None] * distance
        allowed = (distance >= 0)[None, None]
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
                past = tuple(part[n : n + 1, part.shape[1] - seen[n] :] for part in state)
            mixed, after = v[:, start:stop], past
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
