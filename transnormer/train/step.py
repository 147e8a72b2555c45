"""What happens in one step on all processes: gradients, and what is agreed before any of it reaches
the weights."""

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
from ..model.cuda_graph import Graph
from ..model.language_model import LanguageModel
from . import segments
from .checkpoints import WINDOW
from .feed import StepBatches
from .mesh import Mesh
from .parallelize import reshard
from .recipe import Train
from .stopping import STOPS


class StepResult(NamedTuple):
    """What every rank knows about a step.

    loss: the mean over the tokens learned in this step, in nats. gradient_norm: before clipping.
    stop: the signal that asked the run to stop. saving: the sums of `Checkpoints.flags`. refusal:
    why the step was not applied to the weights, None where it was."""

    loss: float
    gradient_norm: float
    stop: int | None
    saving: tuple[int, int]
    refusal: str | None = None

    @property
    def applied(self) -> bool:
        """Whether the step reached the weights."""
        return self.refusal is None


class MicrobatchRunner:
    """Runs the forward and backward pass of a microbatch, eagerly or by replaying a recorded CUDA
    graph.

    It is called with the microbatch and the number that its summed loss is divided by, and adds the
    gradients to those that earlier microbatches of the step left in the model."""

    def __init__(self, model: LanguageModel, mesh: Mesh, settings: Train):
        self.model, self._mesh, self._settings = model, mesh, settings
        self._graph = (
            Graph(model, self._both, adds=settings.accumulate > 1) if settings.graph else None
        )

    def __enter__(self) -> MicrobatchRunner:
        return self

    def __exit__(self, *error: object) -> None:
        if self._graph is not None:
            self._graph.close()
            self._graph = None  # which holds on to this, and so to the model

    def __call__(self, batch: Batch, learned: Tensor) -> Tensor:
        """Returns the loss. Where the passes cannot be recorded, one rank raises ValueError, the
        others FailedOnOtherRank."""
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
            raise ValueError(
                f"train.graph = true, but this step cannot be recorded ({error}); write false"
            ) from error

    def _both(
        self, ids: Tensor, targets: Tensor, learned: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        with autocast(self._mesh, self._settings.dtype):
            if self._settings.segment:
                return segments.backward(
                    self.model, ids, targets, self._settings.segment, 1 / learned
                )
            loss = summed_loss(self.model, Batch(ids, targets, cu_seqlens)) / learned
        loss.backward()
        return loss.detach()


def gradients(runner: MicrobatchRunner, batches: StepBatches, mesh: Mesh) -> Tensor:
    """Leave the step's gradients in the model. Returns this rank's part of the loss; the parts of
    all ranks add up to it.

    The loss is the mean over all tokens that the step learns from, on every rank and in every
    microbatch."""
    learned = (
        mesh.total(torch.full((), batches.learned, dtype=torch.float64, device=mesh.device))
        .clamp(min=1)
        .float()
    )
    loss = torch.zeros((), device=mesh.device)
    for batch in batches.microbatches:
        loss += runner(batch.to(mesh.device), learned)
    return loss


def agree(
    mesh: Mesh, loss: Tensor, gradient_norm: Tensor, stop: Sequence[int], saving: tuple[int, int]
) -> tuple[Tensor, Callable[[], StepResult]]:
    """Let all ranks agree on the step, by one sum over all of them.

    stop: the signals that this rank received. saving: this rank's `Checkpoints.flags`. Returns (a
    scalar on the device, 1 where loss or norm is not finite on any rank and 0 otherwise; a function
    that reads the result). The function is the only place in a step where the host waits for the
    device. It does not wait for work that was queued after this call."""
    cuda = mesh.device.type == "cuda"
    flags = torch.tensor(
        [*(float(number in stop) for number in STOPS), *saving], dtype=torch.float32
    )
    if cuda:
        flags = flags.pin_memory().to(mesh.device, non_blocking=True)
    not_finite_here = ~(loss.isfinite() & gradient_norm.isfinite())
    # tensor ranks have the same one
    counted = loss if mesh.tensor_rank == 0 else torch.zeros_like(loss)
    sums = torch.cat([torch.stack([counted, not_finite_here.float()]), flags])
    if mesh.ranks is not None:
        dist.all_reduce(sums)
    not_finite = ((sums[1] > 0) | ~sums[0].isfinite()).float()
    sums = torch.cat([sums[:1], not_finite.view(1), sums[2:], gradient_norm.view(1)])
    on_host, copied = sums, None
    if cuda:
        on_host, copied = torch.empty(sums.shape, pin_memory=True), torch.cuda.Event()
        on_host.copy_(sums, non_blocking=True)
        copied.record(torch.cuda.current_stream(mesh.device))

    def read_result() -> StepResult:
        if copied is not None:
            copied.synchronize()
        total, failed, *stop_counts, writing, write_failed, norm = on_host.tolist()
        signals = [int(number) for number, count in zip(STOPS, stop_counts, strict=True) if count]
        if failed and math.isfinite(total) and math.isfinite(norm):
            norm = math.nan  # what was not finite was on another rank
        return StepResult(
            total, norm, signals[0] if signals else None, (int(writing), int(write_failed))
        )

    return not_finite, read_result


def refusal(result: StepResult, losses: Sequence[float], spike: float) -> str | None:
    """Why a step must not be applied, or None where it may be.

    losses: those of the last steps that were applied. spike: `train.spike` of the recipe.
    """
    if not math.isfinite(result.loss) or not math.isfinite(result.gradient_norm):
        return f"loss {result.loss:.6g}, gradient norm {result.gradient_norm:.6g}"
    if spike and len(losses) >= WINDOW:
        mean, spread = statistics.fmean(losses[-WINDOW:]), statistics.pstdev(losses[-WINDOW:])
        if result.loss > mean + spike * spread:
            return f"loss {result.loss:.6g} is a spike, after {mean:.6g} ± {spread:.2g}"
    return None


def evaluation(
    model: LanguageModel, batches: list[Batch], mesh: Mesh, dtype: str
) -> Callable[[], float] | None:
    """A function that returns the loss, in nats per learned token, of all processes' batches; None
    where there is none."""
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
        # a recorded step gathers for itself, and would leave the next evaluation these weights
        reshard(model, mesh)
        total, count = mesh.total(torch.stack([nats, torch.full_like(nats, learned)])).tolist()
        return float(total / count)

    return mean_loss


def summed_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats of all targets that count."""
    return model.loss(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum")


def autocast(mesh: Mesh, dtype: str) -> torch.autocast:
    return torch.autocast(mesh.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
