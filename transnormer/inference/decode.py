"""The decoding step of an engine, and its recordings as CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.cuda_graph import WARM, capture, recording_stream
from ..model.language_model import LanguageModel
from ..model.slots import Slots
from .sampling import SlotSampling, StepKind, sample


@torch.inference_mode()
def decode_(
    model: LanguageModel, slots: Slots, sampling: SlotSampling, rows: Tensor, kind: StepKind
) -> Tensor:
    """One decoding step: each of these slots reads its last token and draws the next, in place.

    rows: [S] int64, slots that are all different; -1 for rows that only fill up the step, for which
    nothing is written. Returns [2, S] float64: the tokens drawn (NOT_FINITE for a row whose logits
    are not finite), and their log-probabilities in nats, zeros where `kind` does not ask for them.

    All tensors stay where they are and have the sizes that S gives them, and nothing is waited for
    on a GPU, so that a CUDA graph can hold the call. Layers with keys and values, and decays that
    tokens set, allocate memory while they step."""
    logits = model.step_(sampling.last[rows][:, None], slots, rows)[:, 0]  # [S, vocab]
    tokens = sample(logits, sampling.batch(rows, kind), sampling.number[rows])
    logprobs = torch.zeros_like(tokens, dtype=torch.float64)
    if kind.scores:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = wide.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
        logprobs = (picked - wide.logsumexp(-1)).double()
    sampling.drew_(rows, tokens, kind)
    return torch.stack([tokens.double(), logprobs])


class DecodingSteps:
    """`decode_` on the slots of one engine.

    Where it records, the first step of each number of rows and kind is recorded as a CUDA graph,
    which later ones replay: a step of a small model has many short kernels, and a GPU finishes each
    before the host has queued the next. Graphs read and write the memory of the weights, slots and
    sampling that there are, which must stay where they are, and share the memory of what lies
    between."""

    def __init__(
        self, model: LanguageModel, slots: Slots, sampling: SlotSampling, *, record: bool
    ) -> None:
        self._model, self._slots, self._sampling, self._records = model, slots, sampling, record
        self._recorded: dict[tuple[int, StepKind], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, rows: Tensor, kind: StepKind) -> Tensor:
        """What `decode_` returns, in memory that the next step may overwrite.

        Raises ValueError where the step cannot be recorded, OutOfMemoryError where the memory does
        not suffice for it."""
        if not self._records:
            return decode_(self._model, self._slots, self._sampling, rows, kind)
        key = len(rows), kind
        if key not in self._recorded:
            self._recorded[key] = self._record(torch.full_like(rows, -1), kind)
        graph, given, drawn = self._recorded[key]
        given.copy_(rows)
        graph.replay()
        return drawn

    def _record(self, rows: Tensor, kind: StepKind) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """A graph, the rows that it reads, all -1 so that recording it writes no slot, and where it
        leaves what was drawn."""
        arguments = self._model, self._slots, self._sampling, rows, kind
        stream = recording_stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                decode_(*arguments)
        torch.cuda.current_stream(rows.device).wait_stream(stream)
        pool = next((graph.pool() for graph, _, _ in self._recorded.values()), None)
        try:
            graph, drawn = capture(lambda: decode_(*arguments), rows.device, pool)
        except ValueError as error:
            raise ValueError(
                f"the decoding step cannot be recorded, try Engine(record=False): {error}"
            ) from error
        return graph, rows, drawn
