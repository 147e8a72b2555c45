"""Softmax attention, for the baseline and for stacks: grouped queries, windows, ALiBi."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..ops.context import Context
from ..ops.dispatch import check_devices
from ..ops.gather import gather_past
from ..ops.register import without_autocast
from .layers import TokenPositions
from .mixer import LayerState, Mixer

MIN_QUERY_BLOCK = 512  # attention with a window takes max(window, this) queries at a time


class SoftmaxAttention(Mixer):
    """Causal softmax attention, the baseline. A decay adds log_decay x distance to the scores,
    which is ALiBi. With a window each query sees the last `window` keys, its own included.

    State: (keys [B, P, G, K], values [B, P, G, V]); of the P places of each row the last
    min(seen, P) are filled. P is the number of tokens read by the row that has read most, but at
    most window - 1. Last comes what the convolution remembers where there is one."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.decays = any(self._decays)
        self.window = config.layers[layer].window

    def new_state(self, rows: int) -> LayerState:
        weight, heads = self.out_proj.weight, self.key_value_heads
        return (
            weight.new_zeros(rows, 0, heads, self.key_dim),
            weight.new_zeros(rows, 0, heads, self.head_dim),
            *self._new_past(rows),
        )

    # In slots, keys are [N, places + 1, G, K] and values [N, places + 1, G, V]. Place p mod places
    # holds the token at position p of a text. There are as many places as the window has tokens, so
    # that a token overwrites the one that just left its window; without a window, as many as the
    # capacity. The one place more takes what is not to be kept, because a kernel cannot leave a row
    # out.

    def new_slots(self, slots: int, capacity: int) -> LayerState:
        places, weight = self.window or capacity, self.out_proj.weight
        return (
            weight.new_zeros(slots, places + 1, self.key_value_heads, self.key_dim),
            weight.new_zeros(slots, places + 1, self.key_value_heads, self.head_dim),
            *self._new_past(slots + 1),
        )

    def read_slots(self, memory: LayerState, slots: Tensor, seen: Tensor) -> LayerState:
        most, places = int(seen.max()) if len(seen) else 0, memory[0].shape[1] - 1
        kept = most if self.window is None else min(most, self.window - 1)
        if kept > places:
            raise ValueError(f"a slot has read {most:,} tokens, but holds {places:,}")
        positions = seen[:, None] - kept + torch.arange(kept, device=seen.device)  # [S, P]
        filled = (positions >= 0)[..., None, None]
        place = positions % max(1, places)
        own = [part[slots[:, None], place].masked_fill(~filled, 0) for part in memory[:2]]
        return *own, *(part[slots] for part in memory[2:])

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
        for part, values in zip(memory[:2], state[:2], strict=True):
            part[slots[:, None], place] = values.to(part.dtype)
        for part, values in zip(memory[2:], state[2:], strict=True):
            part[slots] = values.to(part.dtype)

    def mix_(
        self, x: Tensor, qkvu: Tensor, memory: LayerState, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, gate = self._project(x, qkvu, tokens)
        places = memory[0].shape[1] - 1
        slots = tokens.slots
        rows = torch.arange(len(x), device=x.device) if slots is None else slots.clamp(min=0)
        outputs = []
        for t in range(x.shape[1]):
            position = tokens.positions[:, t]  # [S]
            owned = tokens.owners(t)
            stored = position >= 0 if owned is None else owned >= 0
            if self.window is None:
                stored &= position < places
            place = (position % max(1, places)).where(stored, places)
            for part, new in zip(memory[:2], (k, v), strict=True):
                part[rows, place] = new[:, t].to(part.dtype)
            keys, values = (part if slots is None else part[rows] for part in memory[:2])
            # [S, places]: the distance back to the token in each place
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
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), gate

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        window = seq_len if self.window is None else min(self.window, seq_len)
        # keys that a query sees, times two: the first queries of a row see fewer than a window
        visible = 2 * window - window**2 / seq_len
        return self.heads * visible * (self.key_dim + self.head_dim)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        keys, values, *past = (None, None) if state is None else self._past(state)
        x, qkvu, last = self._qkvu(x, tuple(past), tokens)
        q, k, v, gate = self._project(x, qkvu, tokens)
        check_devices("softmax attention", x=x, log_decay=self.log_decay, keys=keys, values=values)
        if self.context is not None:
            mixed, after = self._attend_shared(q, k, v, state, tokens, self.context)
        else:
            attend = self._attend if tokens.cu_seqlens is None else self._attend_packed
            mixed, after = attend(q, k, v, state, tokens)
        return self._project_out(mixed, gate), (*after, *last)

    def _past(self, state: LayerState) -> LayerState:
        heads = self.key_value_heads
        wanted = [[heads, self.key_dim], [heads, self.head_dim]]
        fits = len(state) == (2 if self.convolution is None else 3)
        if not fits or [list(part.shape[2:]) for part in state[:2]] != wanted:
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
            mask: Tensor | None = None
            if tokens.lower_right is not None and not (self.decays or slides):
                mask = tokens.lower_right
            elif keys > queries or self.decays or slides:
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
        if type(mask) is Tensor:
            mask = mask.to(wide)
        attention = _exact_attention if self.decays else F.scaled_dot_product_attention
        grouped = self.group > 1
        if grouped and torch.compiler.is_compiling():
            # On a GPU the compiled backward of grouped heads in bfloat16 gives other gradients than
            # it should (torch 2.11; compare pytorch#159469), so keys and values are repeated.
            k, v = (x.repeat_interleave(self.group, dim=2) for x in (k, v))
            grouped = False
        mixed: Tensor = attention(
            q.transpose(1, 2).to(wide),
            k.transpose(1, 2).to(wide),
            v.transpose(1, 2).to(wide),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.head_dim**-0.5,
            enable_gqa=grouped,
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

    def _attend_shared(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        tokens: TokenPositions,
        context: Context,
    ) -> tuple[Tensor, LayerState]:
        """Of rows that the ranks of `context` share: this rank's queries on the keys and values of
        its own tokens and of those before them, which are gathered. The state is that after this
        rank's tokens, and empty of packed sequences."""
        if state is not None:
            raise ValueError("rows that several processes share begin without a state")
        length = q.shape[1]
        first, last = context.rank * length, (context.rank + 1) * length
        row = gather_past(torch.cat([k, v], dim=-1), context)
        k, v = row.split([self.key_dim, self.head_dim], dim=-1)
        if tokens.cu_seqlens is None:
            start = 0 if self.window is None else max(0, first + 1 - self.window)
            alone = TokenPositions(tokens.positions, lower_right=tokens.lower_right)
            return self._attend(q, k[:, start:], v[:, start:], None, alone)
        outputs = []
        for start, stop in itertools.pairwise(tokens.cu_seqlens.tolist()):
            mine = slice(max(start, first) - first, min(stop, last) - first)
            if mine.start < mine.stop:
                seen = slice(start, min(stop, last))
                alone = TokenPositions(tokens.positions[:, mine])
                outputs.append(self._attend(q[:, mine], k[:, seen], v[:, seen], None, alone)[0])
        return torch.cat(outputs, dim=1), (k[:, :0], v[:, :0])

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        """`_attend` for each packed sequence; the state's rows are right-aligned to the longest."""
        assert tokens.cu_seqlens is not None
        bounds = tokens.cu_seqlens.tolist()
        seen = [0] * (len(bounds) - 1) if tokens.seen is None else tokens.seen.tolist()
        outputs, kept = [], []
        for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
            past = None
            if state is not None and seen[n]:
                past = tuple(
                    part[n : n + 1, max(0, part.shape[1] - seen[n]) :] for part in state[:2]
                )
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
