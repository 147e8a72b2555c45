"""What this process reads: the batches of the next step, made ready by a thread meanwhile, and its share of validation."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from ..data.loader import Batch, Loader
from ..data.shards import TokenData
from .parallel import Mesh


class Share(NamedTuple):
    """Of one step, this process' micro-batches and how many of their targets count; the samples (from, to) of all."""

    batches: list[Batch]
    learned: int
    samples: tuple[int, int]


class Feed:
    """One `Share` a step, read ahead by a thread: what `next` returns has been waiting."""

    def __init__(self, loader: Loader, accumulate: int, mesh: Mesh):
        self._loader, self._accumulate, self._mesh = loader, accumulate, mesh
        self._reader = ThreadPoolExecutor(1, "feed")
        self._coming: Future[Share] | None = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def seek(self, position: int) -> None:
        """Go on from this sample."""
        if self._coming is not None:
            self._coming.result()
        self._loader.seek(position)
        self._coming = self._reader.submit(self._read)

    def __next__(self) -> Share:
        """Raises what reading raised."""
        if self._coming is None:
            self._coming = self._reader.submit(self._read)
        share = self._coming.result()
        self._coming = self._reader.submit(self._read)
        return share

    def _read(self) -> Share:
        first = self._loader.position
        batches = [self._mesh.split(next(self._loader)) for _ in range(self._accumulate)]
        learned = sum(batch.learned for batch in batches)
        if self._mesh.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return Share(batches, learned, (first, self._loader.position))


def validation(data: TokenData, mesh: Mesh, *, seq_len: int, rows: int, tokens: int, reset_state: bool) -> list[Batch]:
    """This process' share of the first `tokens` of a split, always the same ones.

    Every process gets as many batches, all of one shape; rows that are left over in the last learn nothing.
    rows: of a micro-batch over all data ranks.
    """
    length = min(seq_len, data.tokens - 1) // (mesh.context * mesh.tensor) * (mesh.context * mesh.tensor)
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
