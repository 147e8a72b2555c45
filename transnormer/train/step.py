"""What happens in one step on all processes: gradients, and what is agreed before any of it reaches the weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.loader import Batch
from ..model.language_model import LanguageModel
from . import segments
from .checkpoint import WINDOW
from .feed import Share
from .graph import Graph
from .parallel import Mesh, reshard
from .recipe import Train
from .stopping import STOPS


class Told(NamedTuple):
    """What all processes know of a step. loss: nats a token; stop: the signal that asked to stop; saving: of `Checkpoints.flags`."""

    loss: float
    norm: float
    stop: int | None
    saving: tuple[int, int]


class Passes:
    """Forward and backward of a micro-batch, plain or recorded. Called with it and with the scalar that its loss is
    divided by, it leaves the gradients in the model, added to what earlier micro-batches of the step left there."""

    def __init__(self, model: LanguageModel, mesh: Mesh, settings: Train):
        self.model, self._mesh, self._settings = model, mesh, settings
        self._graph = Graph(model, self._both, adds=settings.accumulate > 1) if settings.graph else None

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *error: object) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None  # which holds on to this, and so to the model

    def __call__(self, batch: Batch, learned: Tensor) -> Tensor:
        """The loss. ValueError, on one process and Elsewhere on the others, where the passes cannot be recorded."""
        ids, targets, cu_seqlens = batch
        if self._graph is None:
            return self._both(ids, targets, learned, cu_seqlens)
        assert cu_seqlens is None, "a recorded step has whole rows"
        if not self._graph.recorded:
            self._mesh.together(partial(self._record, ids, targets, learned))
        return self._graph(ids, targets, learned)

    def _record(self, *inputs: Tensor) -> None:
        assert self._graph is not None
        try:
            self._graph.record(*inputs)
        except ValueError as error:
            raise ValueError(f"train.graph = true, but this step cannot be recorded ({error}); write false") from error

    def _both(self, ids: Tensor, targets: Tensor, learned: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        with autocast(self._mesh, self._settings.dtype):
            if self._settings.segment:
                return segments.backward(self.model, ids, targets, self._settings.segment, 1 / learned)
            loss = summed_loss(self.model, Batch(ids, targets, cu_seqlens)) / learned
        loss.backward()
        return loss.detach()


def gradients(passes: Passes, share: Share, mesh: Mesh) -> Tensor:
    """Leave the step's gradients in the model; returns this process' share of the loss, a sum over the processes.

    The loss is a mean over what is learned in the whole step, by all processes and micro-batches.
    """
    learned = mesh.total(torch.full((), share.learned, dtype=torch.float64, device=mesh.device)).clamp(min=1).float()
    loss = torch.zeros((), device=mesh.device)
    for batch in share.batches:
        loss += passes(batch.to(mesh.device), learned)
    return loss


def agree(
    mesh: Mesh, loss: Tensor, norm: Tensor, stop: Sequence[int], saving: tuple[int, int]
) -> tuple[Tensor, Callable[[], Told]]:
    """One sum over all processes: (1 where loss or norm is not finite anywhere, else 0; a function that reads the rest).

    stop: signals that this process got. The first is a scalar on the device; the function waits for the device, the
    only time in a step, and not for what was queued after this call.
    """
    cuda = mesh.device.type == "cuda"
    marks = torch.tensor([*(float(number in stop) for number in STOPS), *saving], dtype=torch.float32)
    if cuda:
        marks = marks.pin_memory().to(mesh.device, non_blocking=True)
    unsound = ~(loss.isfinite() & norm.isfinite())
    counted = loss if mesh.tensor_rank == 0 else torch.zeros_like(loss)  # tensor ranks have the same one
    numbers = torch.cat([torch.stack([counted, unsound.float()]), marks])
    if mesh.ranks is not None:
        dist.all_reduce(numbers)
    bad = ((numbers[1] > 0) | ~numbers[0].isfinite()).float()
    numbers = torch.cat([numbers[:1], bad.view(1), numbers[2:], norm.view(1)])
    read, there = numbers, None
    if cuda:
        read, there = torch.empty(numbers.shape, pin_memory=True), torch.cuda.Event()
        read.copy_(numbers, non_blocking=True)
        there.record(torch.cuda.current_stream(mesh.device))

    def told() -> Told:
        if there is not None:
            there.synchronize()
        total, wrong, *asked, unfinished, failed, length = read.tolist()
        signals = [int(number) for number, count in zip(STOPS, asked, strict=True) if count]
        if wrong and math.isfinite(total) and math.isfinite(length):
            length = math.nan
        return Told(total, length, signals[0] if signals else None, (int(unfinished), int(failed)))

    return bad, told


def refusal(told: Told, losses: Sequence[float], spike: float) -> str | None:
    """Why a step must not be applied; None where it may. losses: of the last steps that were; spike: as in the recipe."""
    if not math.isfinite(told.loss) or not math.isfinite(told.norm):
        return f"loss {told.loss:.6g}, gradient norm {told.norm:.6g}"
    if spike and len(losses) >= WINDOW:
        mean, spread = statistics.fmean(losses[-WINDOW:]), statistics.pstdev(losses[-WINDOW:])
        if told.loss > mean + spike * spread:
            return f"loss {told.loss:.6g} is a spike, after {mean:.6g} ± {spread:.2g}"
    return None


def evaluation(model: LanguageModel, batches: list[Batch], mesh: Mesh, dtype: str) -> Callable[[], float] | None:
    """A function that returns the loss, in nats per learned token, of all processes' batches; None where there is none."""
    learned = sum(batch.learned for batch in batches)
    if not any(mesh.gather(learned)):
        return None

    @torch.no_grad()
    def mean_loss() -> float:
        model.eval()
        nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for batch in batches:
            with autocast(mesh, dtype):
                nats += summed_loss(model, batch.to(mesh.device))
        model.train()
        reshard(model, mesh)  # a recorded step gathers for itself, and would leave the next evaluation these weights
        total, count = mesh.total(torch.stack([nats, torch.full_like(nats, learned)])).tolist()
        return float(total / count)

    return mean_loss


def summed_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats of all targets that count."""
    return model.loss(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum")


def autocast(mesh: Mesh, dtype: str) -> torch.autocast:
    return torch.autocast(mesh.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
