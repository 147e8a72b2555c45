"""Gated Linear Attention, and the table of mixers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..ops.gla import gated_linear_attention
from ..ops.lightning import lightning_attention, lightning_step_
from .layers import NORMS, SimpleRMSNorm, TokenPositions, gated
from .mixer import LayerState, Mixer
from .softmax_attention import SoftmaxAttention


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

    def step_(self, x: Tensor, memory: LayerState, tokens: TokenPositions) -> Tensor:
        q, k, v, gate = self._project(x, tokens)
        outputs = []
        for t in range(x.shape[1]):
            qt, kt, vt = (part[:, t : t + 1] for part in (q, k, v))
            slots = tokens.owners(t)
            outputs.append(lightning_step_(qt, kt, vt, self.log_decay, memory[0], slots=slots))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.out_proj(gated(self.norm, mixed.flatten(-2), gate))  # type: ignore[no-any-return]

    def _past(self, state: LayerState) -> LayerState:
        if len(state) != 1:
            raise ValueError(
                f"the state of a layer is [B, H, K, V] alone; got {len(state)} tensors of another "
                "mixer"
            )
        return state

    def flops_per_token(self, seq_len: int, chunk: int) -> float:
        k, v = self.key_dim, self.head_dim
        return self.heads * (2 * min(seq_len, chunk) * (k + v) + 4 * k * v)

    def forward(
        self, x: Tensor, state: LayerState | None, tokens: TokenPositions
    ) -> tuple[Tensor, LayerState]:
        before = None if state is None else self._past(state)[0]
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
        """Whether `gated_linear_attention` computes all that lies between the projections."""
        plain = self.position is None and self.activation is F.silu and self.parts == 4
        return plain and isinstance(self.norm, SimpleRMSNorm) and self.context is None


MIXERS: dict[str, Callable[[ModelConfig, int], Mixer]] = {
    "gla": GatedLinearAttention,
    "softmax": SoftmaxAttention,
}
