"""SimpleRMSNorm on the GPU, in Triton: a row is read once forward, it and its gradient once backward.

With r = 1 / sqrt(mean(x^2) + eps): y = r x and dx = r (g - r^2 mean(g x) x). r is computed again in backward, from an
x that has to be read anyway, so forward stores nothing but y.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # triton reads it where a kernel is defined


@triton.jit
def _forward_kernel(x, y, x_row, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y is contiguous [rows, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (c < D)
    wide = tl.load(x + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
    tl.store(y + row * D + c, (wide * r[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(x, g, dx, x_row, g_row, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dx is contiguous [rows, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (c < D)
    wide = tl.load(x + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(g + row * g_row + c, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)
    along = r * r * r * tl.sum(wide * gradient, axis=1) / D
    result = gradient * r[:, None] - wide * along[:, None]
    tl.store(dx + row * D + c, result.to(dx.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """x as [rows, D], columns adjacent; without a copy where strides allow."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _options(D: int, rows: int) -> tuple[int, dict[str, int]]:
    """(programs, how): rows of one program together are some 1,024 numbers or more, 8 to 32 a thread."""
    block = 1 << (D - 1).bit_length()
    together = max(1, 1024 // block)
    warps = min(16, max(4, block // 512))
    return -(-rows // together), {"D": D, "BLOCK": block, "ROWS": together, "num_warps": warps}


def forward(x: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        flat = _rows(x)
        programs, options = _options(flat.shape[1], flat.shape[0])
        _forward_kernel[(programs,)](flat, y, flat.stride(0), flat.shape[0], eps, **options)
    return y


def backward(x: Tensor, gradient: Tensor, eps: float) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        flat, g = _rows(x), _rows(gradient)
        programs, options = _options(flat.shape[1], flat.shape[0])
        _backward_kernel[(programs,)](flat, g, dx, flat.stride(0), g.stride(0), flat.shape[0], eps, **options)
    return dx


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        ctx.eps = eps
        return forward(x, eps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        (x,) = ctx.saved_tensors
        return backward(x, gradient, ctx.eps), None


def norm(x: Tensor, eps: float) -> Tensor:
    """Straight to the kernel in eager mode, as an op that torch.compile knows where it compiles."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return torch.ops.transnormer.simple_rms_norm(x, eps)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and x.requires_grad:
        return _Norm.apply(x, eps)  # type: ignore[no-any-return, no-untyped-call]
    return forward(x, eps)


for _name, _schema, _function in (
    ("simple_rms_norm", "(Tensor x, float eps) -> Tensor", forward),
    ("simple_rms_norm_backward", "(Tensor x, Tensor gradient, float eps) -> Tensor", backward),
):
    torch.library.define(f"transnormer::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"transnormer::{_name}", "default", _function)


@torch.library.register_fake("transnormer::simple_rms_norm")
def _(x, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("transnormer::simple_rms_norm_backward")
def _(x, gradient, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, gradient):  # type: ignore[no-untyped-def]
    (x,) = ctx.saved_tensors
    return torch.ops.transnormer.simple_rms_norm_backward(x, gradient, ctx.eps), None


torch.library.register_autograd("transnormer::simple_rms_norm", _differentiate, setup_context=_save_for_backward)
