"""The passes of a micro-batch as one CUDA graph: the host hands the GPU one thing to do instead of thousands.

A GPU is through a small model, or its part of one, sooner than the host queues it; and where processes wait for each
other in every block, all wait for the slowest host. What a graph does it does at the same addresses every time: so it
keeps the memory of both passes while it lives, and micro-batches must be of one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ..model.layers import local

WARM = 2  # passes before: they compile, tune, connect processes


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To record on, the same for all: cuBLAS keeps memory for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Graph:
    """`compute(*inputs)`, recorded once, then replayed. All ranks of a mesh call it alike.

    compute: leaves gradients in the model's parameters and returns its loss, a scalar; reads nothing on the host.
    inputs: tensors on the GPU.
    adds: gradients add up until they are set to None; otherwise each call's replace the last one's, which saves a pass
    over them.
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
        """The loss, in memory that the next call writes to again. ValueError for inputs of other shapes than recorded."""
        if self._graph is None:
            self.record(*inputs)
        assert self._graph is not None
        for place, x in zip(self._inputs, inputs, strict=True):
            if x.shape != place.shape:
                raise ValueError(f"an input of shape {tuple(x.shape)}, where {tuple(place.shape)} was recorded")
            place.copy_(x, non_blocking=True)
        if self._adds and self._gradients[0][0].grad is None:
            torch._foreach_zero_([local(gradient) for _, gradient in self._gradients])
        self._graph.replay()
        for p, gradient in self._gradients:
            p.grad = gradient
        return self._loss

    def record(self, *inputs: Tensor) -> None:
        """Compute a few times, then once more to record it. Leaves no gradients.

        Raises ValueError with the reason where `compute` cannot be recorded; the process should then end.
        """
        self._inputs = [x.clone() for x in inputs]
        device, parameters = inputs[0].device, [p for p in self._model.parameters() if p.requires_grad]
        drawn = torch.cuda.get_rng_state(device)
        aside = _stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._compute(*self._inputs)
                if not self._adds:
                    _forget(parameters)
        torch.cuda.current_stream(device).wait_stream(aside)
        torch.cuda.set_rng_state(drawn, device)
        graph = torch.cuda.CUDAGraph()
        try:  # other threads may read ahead meanwhile, into memory of their own
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self._loss = self._compute(*self._inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the recording's end fails too, and says nothing of why
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise ValueError(str(cause).splitlines()[0]) from cause
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        _forget(parameters)
        self._graph = graph

    def close(self) -> None:
        """Let go of the memory. The process group that was recorded must still be there."""
        self._inputs, self._gradients = [], []
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
            del self._loss


def _forget(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
