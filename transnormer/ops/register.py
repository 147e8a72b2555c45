"""The one way an op is registered with torch: its shapes, its gradient, and which derivatives it
refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import autocast_is_on


def direct(*inputs: Any) -> bool:
    """Whether nobody watches what is done to these: no compiler, no mode, no transform. Then no op
    need be registered.

    Tensors of other classes watch too. One that comes from another process and is not waited for
    yet has no address."""
    if torch.compiler.is_compiling():
        return False
    if any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in inputs):
        return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, the body of an op, with autocast off: it computes in the dtypes that it says.

    Autocast would else round what the body's own matrix products read, sums in float32 too. The
    first argument is a tensor."""

    @functools.wraps(function)
    def body(x: Tensor, *rest: Any, **named: Any) -> Any:
        if not autocast_is_on(x.device.type):
            return function(x, *rest, **named)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest, **named)

    return body


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save_for_backward: Callable[..., None] | None = None,
    differentiate: Callable[..., Any] | None = None,
) -> Any:
    """Register transnormer::name, to be seen by torch.compile and modes; returns the op. Its body
    runs without autocast.

    save_for_backward(ctx, inputs, output) and differentiate(ctx, *gradients) are its gradient, as
    torch.library.register_autograd has it. torch.library.custom_op would do all this in one line
    and add milliseconds to a call."""
    torch.library.define(f"transnormer::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"transnormer::{name}", "default", without_autocast(function))
    torch.library.register_fake(f"transnormer::{name}", fake)
    if differentiate is not None:
        torch.library.register_autograd(
            f"transnormer::{name}", differentiate, setup_context=save_for_backward
        )
    return getattr(torch.ops.transnormer, name)


def define_backward(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    op: str,
    instead: str,
) -> Callable[..., Any]:
    """Register transnormer::name, which computes the gradients of `op`; returns it as a function of
    the same arguments.

    Where somebody differentiates these gradients again (`create_graph=True`), RuntimeError names
    `op`, and `instead`, what can be used in its place. Without that they would silently count as
    constants."""

    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        refuse_second_derivative(op, instead)

    body = without_autocast(function)
    registered = define(name, schema, function, fake, differentiate=refuse)

    def call(*inputs: Any) -> Any:
        if direct(*inputs) and not (torch.is_grad_enabled() and _any_requires_grad(inputs)):
            return body(*inputs)
        return registered(*inputs)

    return call


def refuse_second_derivative(op: str, instead: str) -> NoReturn:
    """Raises RuntimeError where somebody differentiates the gradients of `op`."""
    raise RuntimeError(
        f"{op} has no second derivative: its gradients cannot be differentiated again "
        f"(create_graph=True); {instead} can"
    )


def differentiable(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    save_for_backward: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """Register transnormer::name with its gradient; returns it as a function of the same arguments,
    the first a tensor. Arguments as in `define`.

    In eager mode that goes straight to `function`, which launches kernels only; the dispatcher
    would take longer than small kernels run."""
    op = define(
        name,
        schema,
        function,
        fake,
        save_for_backward=save_for_backward,
        differentiate=differentiate,
    )

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
        if torch.is_grad_enabled() and _any_requires_grad(inputs):
            return Eager.apply(*inputs)  # type: ignore[no-untyped-call]
        return function(*inputs)

    return call


def _any_requires_grad(inputs: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
