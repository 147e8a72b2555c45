"""Gated Linear Attention, and the table of mixers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..ops.decay import STRONGEST
from ..ops.gated_decay import gated_decay_attention, gated_decay_step_
from ..ops.gla import gated_linear_attention
from ..ops.lightning import lightning_attention, lightning_step_
from .layers import NORMS, Linear, SimpleRMSNorm, TokenPositions
from .mixer import LayerState, Mixer
from .softmax_attention import SoftmaxAttention


class GatedLinearAttention(Mixer):
    """O = Norm(Q (K^T V) with decay) * U, then a projection (paper equation 11). State: ([B, H, K,
    V] float32,), and last what the convolution remembers where there is one."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        norm, own = NORMS[config.norm], config.head_norm
        self.norm = None if own else norm(config.inner_size, config.norm_eps)
        self.head_norm = norm(config.head_dim, config.norm_eps) if own else None
        self.eps = config.norm_eps

        # Its rows are grouped by head, so that a slice for one tensor rank holds whole heads.
        self.decay_proj, self.set_by_token = None, config.layers[layer].set_by_token
        if self.set_by_token:
            self.decay_proj = Linear(config.hidden_size, self.heads * self.set_by_token, bias=False)

    def _set_by(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each token sets, [B, T, H] each: its log_decay, -softplus(x W + b), where b is
        chosen so that a token with x W = 0 has the head's fixed log_decay; and for the delta rule
        the part that it replaces."""
        assert self.decay_proj is not None
        strength = -self.log_decay.clamp(min=STRONGEST)
        begin = strength + torch.log(-torch.expm1(-strength)).clamp(min=-46.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        own = self.decay_proj(x).to(wide).unflatten(-1, (self.heads, self.set_by_token))
        replaced = own[..., 1].sigmoid() if self.set_by_token > 1 else None
        return -F.softplus(own[..., 0] + begin), replaced

    def new_state(self, rows: int) -> LayerState:
        own = self.log_decay.new_zeros(rows, self.heads, self.key_dim, self.head_dim)
        return own, *self._new_past(rows)

    @property
    def reads_input(self) -> bool:
        return super().reads_input or self.decay_proj is not None

    def mix_(
        self, x: Tensor, qkvu: Tensor, memory: LayerState, tokens: TokenPositions
    ) -> tuple[Tensor, Tensor | None]:
        swish = self._is_plain()
        if swish:  # which the step takes along
            q, k, v, *gates = qkvu.unbind(-2)
            gate = gates[0] if gates else None
        else:
            q, k, v, gate = self._project(x, qkvu, tokens)
            q, k = self._to_length_1(q, k)
        outputs = []
        for t in range(x.shape[1]):
            qt, kt, vt = (part[:, t : t + 1] for part in (q, k, v))
            slots = tokens.owners(t)
            if self.decay_proj is not None:
                decay, replaced = self._set_by(x[:, t : t + 1])
                outputs.append(gated_decay_step_(qt, kt, vt, decay, memory[0], slots, replaced))
                continue
            outputs.append(
                lightning_step_(qt, kt, vt, self.log_decay, memory[0], slots=slots, swish=swish)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), gate

    def _to_length_1(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the delta rule takes them."""
        if self.set_by_token < 2:
            return q, k
        # 1e-6 keeps the gradient of a key of zeros finite
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k)]
        lengths = [(x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in wide]
        return (wide[0] / lengths[0]).to(q.dtype), (wide[1] / lengths[1]).to(k.dtype)

    def _past(self, state: LayerState) -> LayerState:
        if len(state) != (wanted := 1 if self.convolution is None else 2):
            rest = "alone" if wanted == 1 else "and the tokens that its convolution remembers"
            raise ValueError(
                f"the state of a layer is [B, H, K, V] {rest}; got {len(state)} tensors of another "
                "mixer"
            )
        return state

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        k, v = self.key_dim, self.head_dim
        plain = 2 * min(seq_len, chunk) * (k + v) + 4 * k * v
        if self.set_by_token < 2:
            return self.heads * plain
        # the products of keys, the system, what it makes of keys and values, what a key recalls
        c = min(seq_len, chunk)
        return self.heads * (plain + 2 * c * (k + c) + 2 * c * (k + v) + 2 * k * v)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        before, *past = (None,) if state is None else self._past(state)
        x, qkvu, last = self._qkvu(x, tuple(past), tokens)
        if self._is_one_op():
            y, after = gated_linear_attention(
                qkvu, self.log_decay, self.eps, state=before, cu_seqlens=tokens.cu_seqlens
            )
            return self.out_proj(y), (after, *last)
        q, k, v, gate = self._project(x, qkvu, tokens)
        if self.decay_proj is not None:
            if self.context is not None:
                raise ValueError(
                    "rows that several processes share need a decay that is the same for all tokens"
                )
            q, k = self._to_length_1(q, k)
            decay, replaced = self._set_by(x)
            mixed, after = gated_decay_attention(
                q, k, v, decay, before, tokens.cu_seqlens, replaced
            )
            return self._project_out(mixed, gate), (after, *last)
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
        return self._project_out(mixed, gate), (after, *last)

    def _is_one_op(self) -> bool:
        """Whether `gated_linear_attention` computes all that lies between the projections."""
        one = self._is_plain() and self.parts == 4 and self.context is None
        return one and isinstance(self.norm, SimpleRMSNorm)

    def _is_plain(self) -> bool:
        """Whether swish is all that happens to q and k before linear attention, with decays that
        are constants."""
        plain = self.position is None and self.activation is F.silu and self.qk_eps is None
        return plain and self.gate_proj is None and self.decay_proj is None


MIXERS: dict[str, Callable[[ModelConfig, int], Mixer]] = {
    "gla": GatedLinearAttention,
    "softmax": SoftmaxAttention,
}
