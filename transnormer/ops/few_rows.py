"""Products of few rows with a weight, and what stands around them, as decoding wants them.

    z = x                                    or x / sqrt(mean(x^2) + eps) * gain * gate, or x * gate
    y = z W^T                                or (z W^T) * (z V^T), or swish(z W^T) * (z V^T)
    result = y                               or residual + y

Shapes: x, gate [..., K], gain [K], W, V [N, K], residual and result [..., N]. A product of R rows
takes 2 R N K operations and reads N K numbers of W. Up to about 16 rows its time is that of reading
W. Therefore one kernel does all of a line, and what is small beside W costs no launch of its
own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import check_devices, choose, triton_refusal
from .norm import simple_rms_norm
from .register import direct

# cuBLAS has the better product of more rows: then every program reads more of x than of W
MOST_ROWS = 16


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float | None = None,
    gain: Tensor | None = None,
    gate: Tensor | None = None,
    second: Tensor | None = None,
    swish: bool = False,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A product with a weight [N, K], what comes before it and what comes after it: [..., N].

    x: [..., K]. All tensors have one floating dtype; the kernel rounds once, at the end.
    eps: of a root-mean-square norm before the product; None: no norm. gain: [K], of that norm.
    gate: [..., K], or [..., H, V] with H V = K, any strides: multiplies what the weight multiplies.
    second: [N, K], whose product multiplies the first one. swish: of the first one, before that.
    residual: [..., N], which is added.
    backend: "auto", "triton" (one kernel; at most MOST_ROWS rows, no gradient, no compiler or mode
        that watches) or "torch". Raises ValueError where shapes or devices do not fit, RuntimeError
        where the named backend cannot run the call."""
    others = {"gain": gain, "gate": gate, "second": second, "residual": residual}
    check_devices("few_rows_linear", x=x, weight=weight, **others)
    _check(x, weight, eps, gain, gate, second, swish, residual)
    triton = refusal(x, weight, *others.values(), named=backend == "triton")
    if choose("few_rows_linear", backend, {"triton": triton, "torch": None}) == "triton":
        from . import few_rows_triton

        return few_rows_triton.linear(x, weight, eps, gain, gate, second, swish, residual)
    if eps is not None and gain is None:
        x = simple_rms_norm(x, eps, gate=gate, backend="torch")
    elif eps is not None:
        x = F.rms_norm(x, x.shape[-1:], gain, eps)
    if gate is not None and (eps is None or gain is not None):
        x = x * gate.reshape(x.shape)
    y = F.linear(x, weight)
    if second is not None:
        y = (F.silu(y) if swish else y) * F.linear(x, second)
    return y if residual is None else residual + y


def refusal(x: Tensor, weight: Tensor, *others: Tensor | None, named: bool) -> str | None:
    """Why the Triton kernel cannot run this call, or None."""
    tensors = [other for other in (x, weight, *others) if other is not None]
    if not direct(*tensors):
        return "somebody watches (torch.compile, a mode, a transform), or a tensor of another class"
    rows = x.numel() // max(1, x.shape[-1])
    if not 1 <= rows <= MOST_ROWS:
        return f"{rows} rows are not from 1 to {MOST_ROWS}"
    if any(other.dtype != x.dtype for other in tensors):
        return f"tensors of several dtypes ({x.dtype} and {weight.dtype}, for example)"
    if any(other.stride(-1) != 1 for other in tensors):
        return "a tensor whose columns are not adjacent"
    if torch.is_grad_enabled() and any(other.requires_grad for other in tensors):
        return "a gradient is wanted"
    return triton_refusal(x, weight, *others, named=named)


def _check(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    gain: Tensor | None,
    gate: Tensor | None,
    second: Tensor | None,
    swish: bool,
    residual: Tensor | None,
) -> None:
    """Raises ValueError where the arguments of `few_rows_linear` do not fit each other."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K]; got {list(x.shape)} and {list(weight.shape)}"
        )
    if gain is not None and (eps is None or gain.shape != x.shape[-1:]):
        raise ValueError(f"a gain is the norm's, [K]; got {list(gain.shape)} and eps = {eps}")
    if gate is not None and (
        gate.numel() != x.numel() or x.shape[:-1] != gate.shape[: x.dim() - 1]
    ):
        raise ValueError(
            f"a gate is [..., K] or [..., H, V] like x; got {list(x.shape)} and {list(gate.shape)}"
        )
    if second is not None and second.shape != weight.shape:
        raise ValueError(
            f"the second weight is like the first, {list(weight.shape)}; got {list(second.shape)}"
        )
    if swish and second is None:
        raise ValueError("swish is of the first of two products; there is no second weight")
    if residual is not None and residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise ValueError(
            f"a residual is [..., N] like the result; got {list(residual.shape)} for N = "
            f"{weight.shape[0]}"
        )
