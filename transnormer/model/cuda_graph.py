"""The forward and backward pass of a microbatch recorded as one CUDA graph, which the host replays
with a single call.

Small models are launch-bound: the GPU finishes a kernel before the host has queued the next one. On
a mesh whose ranks wait for each other in every block, all of them wait for the slowest host. A
graph reads and writes the same addresses in every replay. Therefore it keeps the memory of both
passes as long as it exists, and all microbatches must have one shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import local

# calls before the recording, in which kernels are compiled and tuned and processes connect
WARM = 2


@cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on. There is one a device, because cuBLAS keeps memory for every stream
    that it has seen."""
    return torch.cuda.Stream(device)


def capture(
    compute: Callable[[], Tensor], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record one call; returns the graph, and where it leaves what `compute` returns.

    pool: the memory of another graph, to be shared. Raises OutOfMemoryError where the memory does
    not suffice, and ValueError with the reason where `compute` cannot be recorded for another
    one."""
    graph = torch.cuda.CUDAGraph()
    options: dict[str, Any] = {"pool": pool, "stream": recording_stream(device)}
    try:  # other threads, such as the one that reads data ahead, may allocate memory meanwhile
        with torch.cuda.graph(graph, **options, capture_error_mode="thread_local"):
            found = compute()
    except RuntimeError as error:
        # ending the recording fails as well, with an error that gives no reason
        cause = error.__context__ or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise ValueError(str(cause).splitlines()[0]) from cause
    return graph, found


class Graph:
    """Records `compute(*inputs)` once and then replays it. All ranks of a mesh must call it equally
    often.

    compute: leaves gradients in the model's parameters and returns the loss, a scalar. It must not
        read a tensor's value on the host. inputs: tensors on the GPU.
    adds: whether gradients add up until they are set to None. Otherwise each call replaces the
        gradients of the call before it, which saves a pass over them.
    """

    def __init__(self, model: nn.Module, compute: Callable[..., Tensor], *, adds: bool):
        self._model, self._compute, self._adds = model, compute, adds
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the loss, in memory that the next call overwrites. Raises ValueError where an
        input's shape is new."""
        if self._graph is None:
            self.record(*inputs)
        assert self._graph is not None
        for recorded, x in zip(self._inputs, inputs, strict=True):
            if x.shape != recorded.shape:
                raise ValueError(
                    f"an input of shape {tuple(x.shape)}, where {tuple(recorded.shape)} was "
                    "recorded"
                )
            recorded.copy_(x, non_blocking=True)
        if self._adds and self._gradients[0][0].grad is None:
            torch._foreach_zero_([local(gradient) for _, gradient in self._gradients])
        self._graph.replay()
        for p, gradient in self._gradients:
            p.grad = gradient
        return self._loss

    def record(self, *inputs: Tensor) -> None:
        """Call `compute` a few times, then record one more call. No gradients are left afterwards.

        Raises OutOfMemoryError where the memory does not suffice, and ValueError with the reason
        where `compute` cannot be recorded for another one. The process should then end."""
        self._inputs = [x.clone() for x in inputs]
        device, parameters = (
            inputs[0].device,
            [p for p in self._model.parameters() if p.requires_grad],
        )
        drawn = torch.cuda.get_rng_state(device)
        aside = recording_stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._compute(*self._inputs)
                if not self._adds:
                    _forget(parameters)
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.set_rng_state(drawn, device)
        graph, self._loss = capture(lambda: self._compute(*self._inputs), device)
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        _forget(parameters)
        self._graph = graph

    def close(self) -> None:
        """Free the memory. A process group whose collectives were recorded must still exist."""
        self._inputs, self._gradients = [], []
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
            del self._loss


def _forget(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
