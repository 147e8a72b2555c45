"""The parts of a block besides the token mixer: norms, activations, positions, gated linear units; a table per kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops.norm import simple_rms_norm


class Linear(nn.Linear):
    """nn.Linear that leaves its weights to `init_weights`: initialising twice doubles the start of a large model."""

    def reset_parameters(self) -> None:
        pass


# Norms: (width, eps) -> module on [..., width].


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps): no parameters (paper equation 14)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, self.eps)


# Activations of q and k, on [B, T, H, K].


def _shifted_exp(x: Tensor) -> Tensor:
    """exp(x - max over the head), the maximum held constant as in the published code."""
    return (x - x.detach().amax(-1, keepdim=True)).exp()


# Positions inside the mixer: (config) -> module on q and k [B, T, H, K] and positions [T] or [B, T] (int64).


def _angles(positions: Tensor, theta: Tensor, like: Tensor) -> Tensor:
    """positions x theta modulo 2 pi, [*positions, *theta], in float32 (float64 where `like` is).

    The product is taken in float64: at position 1,000,000 a float32 product is off by 3e-2 radians.
    """
    places = positions.double().reshape(*positions.shape, *[1] * theta.dim())
    turns = torch.remainder(places * theta.double(), 2 * torch.pi)
    return turns if like.dtype == torch.float64 else turns.float()


class LRPE(nn.Module):
    """Linearized relative position encoding: x -> [x cos(theta t), x sin(theta t)], K -> 2 K (paper equation 9).

    Then q_t . k_s = sum_j q_j k_j cos(theta_j (t - s)). theta [H, K] is learned; it starts geometric over all heads.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))

    def reset_parameters(self) -> None:
        """theta_j = 10000^(-2j / (H K)), j over the whole width: the published initial values."""
        exponents = torch.arange(self.theta.numel(), dtype=torch.float64) * (-2 / self.theta.numel())
        with torch.no_grad():
            self.theta.copy_((10_000**exponents).view_as(self.theta))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = _angles(positions, self.theta, q)  # [T, H, K] or [B, T, H, K]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        return torch.cat([q * cos, q * sin], dim=-1), torch.cat([k * cos, k * sin], dim=-1)


class RoPE(nn.Module):
    """Rotary positions on halves of each head, as in LLaMA. No parameters, K stays."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = config.head_dim // 2
        self.theta = [config.rope_theta ** (-j / half) for j in range(half)]

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        theta = torch.tensor(self.theta, dtype=torch.float64, device=q.device)
        angles = _angles(positions, theta, q).unsqueeze(-2)  # [(B,) T, 1, K / 2]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        return turn(q), turn(k)


# Gated linear units: (config) -> module on [..., D].


class SimpleGLU(nn.Module):
    """O = ((X W_v) * (X W_u)) W_o, without activation (paper equation 12). D -> F -> D."""

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


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "srmsnorm": SimpleRMSNorm, "rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm,
}  # fmt: skip
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
POSITIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {"lrpe": LRPE, "rope": RoPE}
GLUS: dict[str, Callable[[ModelConfig], nn.Module]] = {"sglu": SimpleGLU, "swiglu": SwiGLU}
