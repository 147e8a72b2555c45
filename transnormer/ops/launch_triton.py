"""What the Triton ops share: cheap launches, their registration with torch, and when it may be passed by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)  # triton reads it where a kernel is defined, so once is right
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    x: Tensor,
    key: tuple[Any, ...],
    programs: int,
    arguments: Sequence[Any],
    *,
    warps: int,
    stages: int = 3,
) -> None:
    """Launch a kernel on the device of x, with all of its parameters in order.

    key: all that the code compiled for these arguments depends on. Triton would find the same by looking at every
    argument: tens of microseconds a call.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return launch(kernel, x, key, programs, arguments, warps=warps, stages=stages)
    key = (kernel.__name__, x.device.index, warps, stages, *key)
    if found := _compiled.get(key):
        found[(programs, 1, 1)](*arguments)
        return None
    compiled = kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages)
    if not INTERPRETED:
        if len(_compiled) >= 16_384:  # of as many strides and alignments
            _compiled.clear()
        _compiled[key] = compiled
    return None


def direct(*inputs: Any) -> bool:
    """Whether nobody watches what is done to these: no compiler, no mode, no transform. Then no op need be registered.

    Tensors of other classes watch too. One that comes from another process and is not waited for yet has no address.
    """
    if torch.compiler.is_compiling():
        return False
    if any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in inputs):
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and not torch._C._are_functorch_transforms_active()


def define(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register transnormer::name, to be seen by torch.compile and modes; returns the op.

    torch.library.custom_op would do it in one line and add milliseconds to a call.
    """
    torch.library.define(f"transnormer::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"transnormer::{name}", "default", function)
    torch.library.register_fake(f"transnormer::{name}", fake)
    return getattr(torch.ops.transnormer, name)


def differentiable(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    save_for_backward: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """Register transnormer::name with its gradient; returns it as a function of the same arguments, the first a tensor.

    In eager mode that goes straight to `function`; the dispatcher would take longer than small kernels run.
    save_for_backward(ctx, inputs, output) and differentiate(ctx, *gradients): as torch.library.register_autograd has it.
    """
    op = define(name, schema, function, fake)
    torch.library.register_autograd(f"transnormer::{name}", differentiate, setup_context=save_for_backward)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # type: ignore[override]
            output = function(*inputs)
            save_for_backward(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    def call(*inputs: Any) -> Any:
        if not direct(*inputs):
            return op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Eager.apply(*inputs)  # type: ignore[no-untyped-call]
        return function(*inputs)

    return call
