"""Runs that go wrong: how that is known before it is saved, and how a run goes on from before it
went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..model.language_model import LanguageModel
from .checkpoints import Checkpoints, RunProgress
from .mesh import Mesh
from .metrics import say

RETURNS = 3  # to one checkpoint, then the run ends
ADVICE = "try run=NAME with a lower optim.lr or a longer warm-up"


class Recovery:
    """Knows when a run cannot go on from its weights, and goes back to its newest checkpoint. All
    ranks call it alike.

    patience: refused steps in a row that are too many. probe: measures the loss of the present
    weights, in nats per token, None where no token can be learned."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        patience: int,
        probe: Callable[[], float] | None,
    ):
        self._checkpoints, self._model, self._optimizer, self._mesh = (
            checkpoints,
            model,
            optimizer,
            mesh,
        )
        self._patience, self._probe = patience, probe
        self._returns: list[int] = []  # the steps that the run went back to

    def trouble(
        self,
        progress: RunProgress,
        refused: str | None,
        valid_loss: float | None,
        *,
        saves: bool,
        last: bool,
    ) -> str | None:
        """Why the run must not go on from these weights, or end with them; None where it may.

        refused: why the last step was. valid_loss: what these weights have, where that is known.
        saves: the weights are about to be saved. Without a valid_loss their loss is then measured
        with `probe`, because an update that ruins weights shows only in the losses of later steps.
        last: the run ends here.
        """
        if refused and last and progress.refused == progress.step:
            return f"all {progress.step} steps were refused (the last: {refused})"
        if refused and progress.refused >= self._patience:
            return f"{progress.refused} steps in a row were refused (the last: {refused})"
        name, loss = "validation loss", valid_loss
        if loss is None and saves and self._probe is not None:
            name, loss = "loss of the weights that were to be saved", self._probe()
        if loss is None or math.isfinite(loss := self._mesh.gather(loss)[0]):
            return None
        return f"the {name} is {loss}"

    def go_back(self, progress: RunProgress, why: str) -> RunProgress:
        """Load the newest checkpoint from before the refused steps, and skip all samples that were
        read since. Returns where the run goes on.

        Skipping only the samples of refused steps would change nothing, because they never reached
        the weights. Raises ValueError where there is no checkpoint, or going back to it did not
        help."""
        back = self._checkpoints.go_back(self._model, self._optimizer)
        why = f"step {progress.step}: {why}"
        if back is None:
            raise self._mesh.failure(
                f"{why}; the run diverged, and there is no checkpoint to go back to; {ADVICE}"
            )
        if self._returns[-RETURNS:] == [back.step] * RETURNS:
            raise self._mesh.failure(
                f"{why}; the run diverged, and went back to step {back.step} {RETURNS} times, "
                f"with other samples; {ADVICE}"
            )
        self._returns.append(back.step)
        say(
            f"{why}; going back to step {back.step}; samples {back.position:,} to "
            f"{progress.position:,} are passed over"
        )
        back.skipped.append([back.position, progress.position])
        back.position, back.refused_in_all = progress.position, progress.refused_in_all
        return back
