"""A decoding step of a block in five kernels, where rows are few: each product with its norm and
gate before it, and with its residual after it.

    qkvu = norm(x) W_qkvu                       mixed = attention's step (`Mixer.mix_`)
    x += (norm(mixed) * gate) W_out
    h = (norm(x) W_gate) * (norm(x) W_up)       x += h W_down

Decoding one text reads all weights for one token. There are so few rows that a kernel of a product
is over in microseconds, and all others beside it would cost as much time as the products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dispatch import choose, product_dtype, triton_refusal
from ..ops.few_rows import few_rows_linear
from ..ops.few_rows import refusal as few_rows_refusal
from .layers import Linear, SimpleGLU, SimpleRMSNorm, SwiGLU, TokenPositions
from .mixer import LayerState

if TYPE_CHECKING:
    from .language_model import Block


# Whether a step takes this way on a GPU where nobody names one. Off until it has been measured.
BY_DEFAULT = False


def refusal(block: Block, x: Tensor, *, named: bool) -> str | None:
    """Why the block cannot read x [S, T, D] in this way, or None."""
    if not (named or BY_DEFAULT):
        return "it has not been measured on a GPU yet"
    if why := triton_refusal(x, named=named):  # first, because it costs least
        return why
    mixer, glu = block.mixer, block.glu
    if type(glu) not in (SimpleGLU, SwiGLU):
        return f"the GLU is {type(glu).__name__}"
    assert isinstance(glu, SimpleGLU)
    for linear in (mixer.qkvu_proj, mixer.out_proj, glu.gate_proj, glu.up_proj, glu.down_proj):
        if type(linear) is not Linear or type(linear.weight) is not nn.Parameter:
            return f"a linear map is {type(linear).__name__} of a {type(linear.weight).__name__}"
        if linear.bias is not None:
            return "linear maps have biases"
        if linear._forward_hooks or linear._forward_pre_hooks:
            return "a linear map has hooks"
    if mixer.reads_input:
        return "more than one product reads what the mixer is given"
    norms = (block.mixer_norm, block.glu_norm, mixer.norm)
    weights = (mixer.qkvu_proj.weight, glu.gate_proj.weight, glu.up_proj.weight)
    if why := _refusal(x, mixer.out_proj.weight, *norms, named=named):
        return why
    gains = (norm.weight for norm in norms if isinstance(norm, nn.RMSNorm))
    return few_rows_refusal(x, glu.down_proj.weight, *weights, *gains, named=named)


def step_(block: Block, x: Tensor, memory: LayerState, tokens: TokenPositions) -> Tensor:
    """As `Block.step_`, which has asked `refusal`."""
    mixer, glu = block.mixer, block.glu
    assert isinstance(glu, SimpleGLU)
    qkvu = _linear(x, mixer.qkvu_proj.weight, block.mixer_norm)
    if mixer.convolution is not None:
        qkvu = mixer.convolution.step_(qkvu, memory[-1], tokens)
    mixed, gate = mixer.mix_(x, mixer.by_head(qkvu), memory, tokens)
    if mixer.head_norm is not None:  # it has more than one factor a row
        mixed, gate = mixer.gated_heads(mixed, gate), None
    else:
        mixed = mixed.flatten(-2)
    x = _linear(mixed, mixer.out_proj.weight, mixer.norm, gate=gate, residual=x)
    pair = {"second": glu.up_proj.weight, "swish": type(glu) is SwiGLU}
    h = _linear(x, glu.gate_proj.weight, block.glu_norm, **pair)
    return _linear(h, glu.down_proj.weight, None, residual=x)


def logits(x: Tensor, norm: nn.Module, weight: Tensor, backend: str) -> Tensor:
    """norm(x) weight^T: [S, T, vocab] of x [S, T, D] and the head's weight [vocab, D]. backend: as
    in `LanguageModel.step_`."""
    named = backend == "fused"
    refused = _refusal(x, weight, norm, named=named) if named or BY_DEFAULT else "as the blocks"
    if choose("the head of a decoding step", backend, {"fused": refused, "parts": None}) == "fused":
        return _linear(x, weight, norm)
    return F.linear(norm(x), weight)


def _refusal(x: Tensor, weight: Tensor, *norms: nn.Module | None, named: bool) -> str | None:
    """Why a product with the weight cannot have one of these norms in its kernel, or None."""
    if product_dtype(x) != x.dtype:
        return "autocast is on"
    for norm in norms:
        if norm is not None and type(norm) not in (SimpleRMSNorm, nn.RMSNorm):
            return f"the norm is {type(norm).__name__}"
    return few_rows_refusal(x, weight, named=named)


def _linear(x: Tensor, weight: Tensor, norm: nn.Module | None, **around: Any) -> Tensor:
    assert norm is None or isinstance(norm, (SimpleRMSNorm, nn.RMSNorm))
    eps = None if norm is None else norm.eps
    gain = norm.weight if isinstance(norm, nn.RMSNorm) else None
    return few_rows_linear(x, weight, eps=eps, gain=gain, backend="triton", **around)
