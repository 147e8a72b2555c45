"""The batches that this rank reads: those of the next step, which a thread prepares ahead, and its
part of validation."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..data.loader import Batch, Loader
from ..data.shards import TokenData
from .mesh import Mesh


class StepBatches(NamedTuple):
    """The microbatches of one step on this rank.

    learned: the number of target tokens in them that count toward the loss. samples: the step's
    first sample in the order of the data, and the one after its last, over all ranks."""

    microbatches: list[Batch]
    learned: int
    samples: tuple[int, int]


class Feed:
    """Gives the `StepBatches` of one step after another, from where `seek` says. A thread reads
    ahead, so `next` does not wait for the disk."""

    def __init__(self, loader: Loader, accumulate: int, mesh: Mesh):
        self._loader, self._accumulate, self._mesh = loader, accumulate, mesh
        self._reader = ThreadPoolExecutor(1, "feed")
        self._coming: Future[StepBatches] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def seek(self, position: int) -> None:
        """Continue with the sample at this position."""
        if self._coming is not None:
            self._coming.result()
        self._loader.seek(position)
        self._coming = self._reader.submit(self._read)

    def __next__(self) -> StepBatches:
        """Raises whatever reading the data raised."""
        assert self._coming is not None, "seek comes first"
        batches = self._coming.result()
        self._coming = self._reader.submit(self._read)
        return batches

    def _read(self) -> StepBatches:
        first = self._loader.position
        batches = [self._mesh.split(next(self._loader)) for _ in range(self._accumulate)]
        learned = sum(batch.learned for batch in batches)
        if self._mesh.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return StepBatches(batches, learned, (first, self._loader.position))


def validation(
    data: TokenData, mesh: Mesh, *, seq_len: int, rows: int, tokens: int, reset_state: bool
) -> list[Batch]:
    """This rank's batches of the first `tokens` tokens of a split, which are the same in every
    evaluation.

    Every rank gets equally many batches of one shape. Rows that fill up the last batch have no
    target that counts.
    rows: the rows of a microbatch over all data ranks together.
    """
    length = (
        min(seq_len, data.tokens - 1) // (mesh.context * mesh.tensor) * (mesh.context * mesh.tensor)
    )
    if length < 1:
        return []
    loader = Loader(data, seq_len=length, batch_size=1, seed=0, reset_state=reset_state)
    count = min(loader.count, tokens // length)
    ranks = mesh.data_ranks
    rows = max(1, min(rows // ranks, -(-count // ranks)))
    batches = []
    for first in range(mesh.data_rank * rows, mesh.data_rank * rows + count, ranks * rows):
        there = range(first, min(first + rows, count))
        batch = loader.batch([*there, *[0] * (rows - len(there))])
        batch.targets.view(rows, length)[len(there) :] = -100
        batches.append(mesh.split(batch))
    return batches
