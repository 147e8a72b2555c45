"""The parts of a block besides the token mixer: norms, activations, positions, gated linear units;
a table per kind.

A module with parameters of its own, beside those of linear maps, gives them their first values in
`reset_parameters`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..layer_config import TAPS, LayerConfig
from ..ops.context import Context
from ..ops.convolution import short_convolution, short_convolution_step_
from ..ops.gather import previous_end
from ..ops.lrpe import angles, lrpe, swish_lrpe
from ..ops.norm import add_rms_norm, simple_rms_norm


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of one call stand.

    positions: int64 [T], or [B, T] where rows differ: each token's place in its own sequence, from
        0.
    seen: int64 [B or N]: how many tokens of each row or packed sequence came before this call; None
        at the start.
    cu_seqlens: int64 [N + 1] where one row holds N packed sequences.
    rotation: for each width K of a head that some layer turns by RoPE, cosine and sine of the
        angles, [T, 1, K / 2] or [B, T, 1, K / 2]; layers of one width share them. None without
        RoPE.
    lower_right: where rows are split among the ranks of a context, the causal mask that is aligned
        at the last query and the last key, described without a number for each pair. Else None.
    slots: of a decoding step, int64 [S]: the slot of each row, -1 for a row without one; None where
        row i is slot i.
    lengths: of a decoding step, int64 [S]: how many of a row's tokens are read; None: all."""

    positions: Tensor
    seen: Tensor | None = None
    cu_seqlens: Tensor | None = None
    rotation: dict[int, tuple[Tensor, Tensor]] | None = None
    lower_right: Tensor | None = None
    slots: Tensor | None = None
    lengths: Tensor | None = None

    def owners(self, t: int) -> Tensor | None:
        """[S] int64: the slot of each row that reads its token t, -1 for the other rows. None where
        row i is slot i and all rows read."""
        if self.lengths is None:
            return self.slots
        every = self.slots
        if every is None:
            every = torch.arange(len(self.lengths), device=self.lengths.device)
        return every.where(t < self.lengths, -1)

    def to(self, device: torch.device) -> TokenPositions:
        names = ("positions", "seen", "cu_seqlens", "slots", "lengths")
        parts = {name: part for name in names if (part := getattr(self, name)) is not None}
        turns = self.rotation
        if turns is not None:
            turns = {k: (cos.to(device), sin.to(device)) for k, (cos, sin) in turns.items()}
        moved = {name: part.to(device) for name, part in parts.items()}
        return replace(self, **moved, rotation=turns)


class Linear(nn.Linear):
    """nn.Linear that leaves its weights to `init_weights`: initialising twice doubles the start of
    a large model."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding that is left alone on the meta device, where filling it would import
    torch's compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def local(x: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    if torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if isinstance(x, DTensor):
            return x.to_local()
    return x


@torch.no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Give a parameter these values, or of a DTensor each process its part of them."""
    if hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


# Norms: (width, eps) -> module on [..., width].


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps): no parameters (paper equation 14). With what stands around it,
    `gated` and `added`."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, self.eps)


def gated(norm: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
    """norm(x) * gate, in one kernel where there is one. x: [..., H V]; gate: [..., H, V] or like x,
    or None."""
    if isinstance(norm, SimpleRMSNorm):
        return simple_rms_norm(x, norm.eps, gate=gate)
    y: Tensor = norm(x)
    return y if gate is None else y * gate.reshape(x.shape)


def added(norm: nn.Module, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """(x + update, norm(x + update)), in one kernel where there is one."""
    if isinstance(norm, SimpleRMSNorm):
        return add_rms_norm(x, update, norm.eps)
    x = x + update
    return x, norm(x)


# Activations of q and k, on [B, T, H, K].


def _shifted_exp(x: Tensor) -> Tensor:
    """exp(x - max over the head), the maximum held constant as in the published code."""
    return (x - x.detach().amax(-1, keepdim=True)).exp()


# Positions inside the mixer: (config of the layer) -> module on q and k [B, T, H, K] and
# `TokenPositions`.


class LRPE(nn.Module):
    """Linearized relative position encoding: x -> [x cos(theta t), x sin(theta t)], K -> 2 K (paper
    equation 9).

    Then q_t . k_s = sum_j q_j k_j cos(theta_j (t - s)). theta [H, K] is learned; it starts
    geometric over all heads."""

    def __init__(self, config: LayerConfig | ModelConfig):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))

    def reset_parameters(self) -> None:
        """theta_j = 10000^(-2j / (H K)), j over the whole width: the published initial values."""
        exponents = torch.arange(self.theta.numel(), dtype=torch.float64, device="cpu") * (
            -2 / self.theta.numel()
        )
        fill(
            self.theta,
            (10_000**exponents).view(self.theta.shape).to(self.theta.device, self.theta.dtype),
        )

    def forward(
        self, q: Tensor, k: Tensor, tokens: TokenPositions, swish: bool = False
    ) -> tuple[Tensor, Tensor]:
        """swish: of swish(q) and swish(k), in one kernel where there is one."""
        theta = local(self.theta)
        if swish:
            return swish_lrpe(q, k, theta, tokens.positions)
        return lrpe(q, theta, tokens.positions), lrpe(k, theta, tokens.positions)


class RoPE(nn.Module):
    """Rotary positions on halves of each head, as in LLaMA. No parameters, K stays."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.width = config.head_dim

    def forward(self, q: Tensor, k: Tensor, tokens: TokenPositions) -> tuple[Tensor, Tensor]:
        if tokens.rotation is None:
            raise ValueError("RoPE needs token positions with their rotation")
        cos, sin = (part.to(q.dtype) for part in tokens.rotation[self.width])

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return turn(q), turn(k)


def rotation(
    widths: Collection[int], theta: float, positions: Tensor, dtype: torch.dtype
) -> dict[int, tuple[Tensor, Tensor]] | None:
    """What `TokenPositions.rotation` holds, in at least float32.

    widths: K of the heads that RoPE turns; None is returned where there are none. theta: the
    config's rope_theta.
    """

    def turned(width: int) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / -width
        turns = angles(positions, theta**exponents, dtype).unsqueeze(-2)
        return turns.cos(), turns.sin()

    return {width: turned(width) for width in widths} or None


class ShortConvolution(nn.Module):
    """Each channel of a token becomes a weighted sum of itself and its values at the TAPS - 1
    tokens before, with weights of the channel's own. It starts as the identity. [B, T, C]."""

    def __init__(self, groups: int, channels: int):
        """C = groups x channels; a tensor rank keeps whole groups."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, channels, TAPS))

    def reset_parameters(self) -> None:
        identity = torch.zeros(self.weight.shape, device=self.weight.device)
        identity[..., 0] = 1
        fill(self.weight, identity.to(self.weight.dtype))

    def forward(
        self, x: Tensor, past: Tensor | None, tokens: TokenPositions, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """(y, the last tokens of x, with which the next call begins). past: those of the call
        before. context: the processes that share the rows; packed sequences then leave nothing."""
        weight = local(self.weight).flatten(0, 1)
        if context is None:
            return short_convolution(x, weight, past, tokens.cu_seqlens)
        if past is not None:
            raise ValueError("rows that several processes share begin without a state")
        packed = tokens.cu_seqlens is not None
        before = previous_end(x, TAPS - 1, context)
        y, last = short_convolution(
            x, weight, before, positions=tokens.positions if packed else None
        )
        return y, last[:0] if packed else last

    def new_past(self, rows: int) -> Tensor:
        """[rows, TAPS - 1, C]: the tokens before the first of `rows` texts."""
        weight = local(self.weight).flatten(0, 1)
        return weight.new_zeros(rows, TAPS - 1, len(weight))

    def step_(self, x: Tensor, memory: Tensor, tokens: TokenPositions) -> Tensor:
        """As the mixer's `step_`; memory: [slots + 1, TAPS - 1, C], the last tokens of each
        slot, and a place for those of rows without one."""
        weight = local(self.weight).flatten(0, 1)
        outputs = [
            short_convolution_step_(x[:, t : t + 1], weight, memory, tokens.owners(t))
            for t in range(x.shape[1])
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


# Gated linear units: (config) -> module on [..., D].


class SimpleGLU(nn.Module):
    """O = ((X W_v) * (X W_u)) W_o, without activation (paper equation 12). D -> F -> D."""

    SHARDS: ClassVar[dict[str, str]] = {
        "gate_proj": "columns",
        "up_proj": "columns",
        "down_proj": "rows",
    }

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.bias
        self.gate_proj = Linear(d, f, bias=bias)
        self.up_proj = Linear(d, f, bias=bias)
        self.down_proj = Linear(f, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class SwiGLU(SimpleGLU):
    """The same with swish on one branch, as in LLaMA and the paper's ablation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """O = GELU(X W_u) W_o: no gate, as in a plain Transformer. D -> F -> D."""

    SHARDS: ClassVar[dict[str, str]] = {"up_proj": "columns", "down_proj": "rows"}

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "srmsnorm": SimpleRMSNorm,
    "rmsnorm": nn.RMSNorm,
    "layernorm": nn.LayerNorm,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "none": lambda x: x,
    "1+elu": lambda x: 1 + F.elu(x),
    "2+elu": lambda x: 2 + F.elu(x),
    "elu": F.elu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "sine": torch.sin,
    "exp": _shifted_exp,
}
POSITIONS: dict[str, Callable[[LayerConfig], nn.Module]] = {"lrpe": LRPE, "rope": RoPE}
GLUS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "sglu": SimpleGLU,
    "swiglu": SwiGLU,
    "mlp": MLP,
}
