"""Shuffled batches of a prepared split, by a loader whose whole state is one number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .shards import TokenData


class Batch(NamedTuple):
    """What one step reads: ids and targets, int64 [B, T]; a target of -100 is not learned.

    With cu_seqlens, int64 [N + 1], ids and targets are [1, B * T] and hold N documents in a row.
    Document n stands from cu_seqlens[n] to cu_seqlens[n + 1], and begins from a fresh state.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None

    @property
    def learned(self) -> int:
        """The number of targets that count toward the loss."""
        return int((self.targets != -100).sum())

    def to(self, device: torch.device) -> Batch:
        """A copy on the device, which is still under way on return if it is from pinned memory."""
        parts = (None if part is None else part.to(device, non_blocking=True) for part in self)
        return Batch(*parts)  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        parts = (None if part is None else part.pin_memory() for part in self)
        return Batch(*parts)  # type: ignore[arg-type]


class Loader:
    """Endless shuffled batches of a split, as one rank of a run reads them.

    Windows of text start at multiples of seq_len. Neighbours share one token, which is the last
    target of one and the first input of the next. An incomplete window at the end is dropped.
    A window of conversations holds as many whole conversations as fit, and after them nothing that
    is learned. A conversation that is longer than a window is cut into windows as text is.

    reset_state: begin the state anew with every document, and predict nothing across the border
    between two documents (see `Batch`).

    Sample g of a run is window `window_index(seed, g // count, g % count, count)`. A step takes the
    next ranks * batch_size samples, and rank r the r-th batch_size of them. So a step sees the same
    samples however many ranks share its rows. `position` is all that has to be saved, and `seek`
    goes there.

    Raises ValueError where the split has no whole window or an argument does not fit.
    """

    def __init__(
        self,
        data: TokenData,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        reset_state: bool = False,
    ):
        for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("ranks", ranks)):
            if value < 1:
                raise ValueError(f"{name} must be positive; got {value}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be at least 0 and below ranks {ranks}; got {rank}")
        self._windows = _conversation_windows(data, seq_len) if data.flags else None  # [count, 2]
        # the number of windows, which is the number of samples in an epoch
        self.count = (data.tokens - 1) // seq_len if self._windows is None else len(self._windows)
        if self.count < 1:
            needed = f"one window of seq_len {seq_len} needs {seq_len + 1}"
            raise ValueError(f"{data.name} has {data.tokens} tokens, and {needed}")
        self.data, self._seq_len, self._batch_size, self._seed = data, seq_len, batch_size, seed
        self._rank, self._ranks, self._reset_state = rank, ranks, reset_state
        self._position = 0

    def cut_warning(self) -> str | None:
        """Says how many conversations are longer than a window and so are cut; None if none is."""
        if not self.data.flags:
            return None
        lengths = np.diff(self.data.document_ends(), prepend=0)  # [documents]
        longer = int((lengths > self._seq_len + 1).sum())
        if not longer:
            return None
        return (
            f"{longer:,} of {len(lengths):,} conversations do not fit into seq_len {self._seq_len} "
            "and are cut: what follows a cut is learned without what came before it; "
            f"seq_len {lengths.max() - 1} would cut none"
        )

    @property
    def position(self) -> int:
        """The number of samples handed out so far, over all ranks."""
        return self._position

    def seek(self, position: int) -> None:
        """Go on from a saved `position`, which may come from other numbers of ranks and rows."""
        if position < 0:
            raise ValueError(f"position must be 0 or more; got {position}")
        self._position = position

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._position + self._rank * self._batch_size
        samples = range(first, first + self._batch_size)
        self._position += self._ranks * self._batch_size
        return self.batch(self._window_of(sample) for sample in samples)

    def batch(self, windows: Iterable[int]) -> Batch:
        """The windows of these numbers as rows. Every number is below `count`."""
        rows = [self._row(number) for number in windows]
        columns = (np.stack(column) for column in zip(*rows, strict=True))
        ids, targets, begins = map(torch.from_numpy, columns)  # [B, T] each
        if not self._reset_state:
            return Batch(ids, targets)
        begins[:, 0] = True
        starts = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.cat([starts, torch.tensor([begins.numel()])])
        return Batch(ids.flatten()[None], targets.flatten()[None], cu_seqlens)

    def _window_of(self, sample: int) -> int:
        epoch, position = divmod(sample, self.count)
        return window_index(self._seed, epoch, position, self.count)

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A window as ids and targets, int64 [T], and where documents begin in it, bool [T]."""
        start = stop = number * self._seq_len
        length = self._seq_len + 1
        if self._windows is None and not self._reset_state:
            # Every token of text is learned and no border counts, so no marks are read.
            ids = self.data.window(start, length)
            return ids[:-1], ids[1:], np.zeros(self._seq_len, bool)
        if self._windows is not None:
            start, stop = self._windows[number].tolist()
        held = min(length, self.data.tokens - start)
        padding = (0, length - held)
        ids = np.pad(self.data.window(start, held), padding, constant_values=self.data.end_of_text)
        learned, begins = (np.pad(marks, padding) for marks in self.data.marks(start, held))
        if self._windows is not None:
            learned[stop - start :] = False  # these tokens belong to the next window
        if self._reset_state:
            learned &= ~begins
        return ids[:-1], np.where(learned[1:], ids[1:], -100), begins[:-1]


def _conversation_windows(data: TokenData, seq_len: int) -> np.ndarray:
    """The (start, stop) of windows of at most seq_len + 1 tokens, int64 [count, 2].

    Each holds as many whole conversations as fit, or a part of one that is longer than a window.
    """
    ends = data.document_ends()  # [documents]
    windows: list[tuple[int, int]] = []
    start = 0
    while start < data.tokens - 1:
        fitting = int(np.searchsorted(ends, start + seq_len + 1, side="right"))
        whole = int(ends[fitting - 1]) if fitting else 0
        if whole > start + 1:
            windows.append((start, whole))
            start = whole
        else:  # the next conversation is longer than a window
            windows.append((start, start + seq_len + 1))
            start += seq_len
    return np.array(windows, np.int64).reshape(-1, 2)


_MASK = 2**64 - 1


def window_index(seed: int, epoch: int, position: int, count: int) -> int:
    """Where a random permutation of range(count) sends `position`; each seed and epoch has its own.

    A Feistel network permutes the smallest range(2**bits) that holds range(count). A result of
    `count` or more is put in again until one is below it, which keeps this a permutation (cycle
    walking). It needs constant memory, and is the same on every machine and in every version.
    """
    if not 0 <= position < count:
        raise ValueError(f"position must be at least 0 and below count {count}; got {position}")
    bits = (count - 1).bit_length()
    low_bits = (bits + 1) // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    keys = _round_keys(seed, epoch)
    index = position
    while True:
        high, low = index >> low_bits, index & low_mask
        for n in range(0, len(keys), 2):
            low ^= _mix(high, keys[n]) & low_mask
            high ^= _mix(low, keys[n + 1]) & high_mask
        index = high << low_bits | low
        if index < count:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Eight keys of 64 bits."""
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8))


def _mix(value: int, key: int) -> int:
    """A hash of 64 bits, each of which depends on every bit of the value and of the key."""
    x = ((value ^ key) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 32) * 0xD6E8FEB86659FD93) & _MASK
    return x ^ x >> 32
