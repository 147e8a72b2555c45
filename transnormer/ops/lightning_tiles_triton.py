"""Which configuration a call of Lightning Attention's kernels runs with, and into how many segments
it cuts time."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Tiles:
    """chunk: tokens a chunk; slice: columns of the state a program owns; stages: depth of the load
    pipeline."""

    chunk: int
    slice: int
    warps: int
    stages: int
    described: bool = False  # loads by tensor descriptor, where strides and alignment allow

    def shared_bytes(self, block: int, itemsize: int) -> int:
        """Rough shared memory of a walk over states of `block` rows."""
        loads = self.chunk * (2 * block + self.slice)
        return itemsize * (
            self.stages * loads + block * self.slice + self.chunk * (self.chunk + self.slice)
        )


# Best first; the first that fits the GPU's shared memory and registers runs. Three stages hide the
# loads of a program alone on its multiprocessor. Paired are the backward's programs where they
# outnumber the multiprocessors; a third stage gains nothing there.
_SMALL = (Tiles(64, 64, 4, 1, True), Tiles(32, 64, 4, 1))
_DEEP = (Tiles(64, 64, 4, 3, True), *_SMALL)
_PAIRED = (Tiles(64, 64, 4, 2, True), *_SMALL)
_FULL = (Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))  # for float32
_LEAST = Tiles(16, 64, 4, 1)  # where a program has 64 KiB, and the states 256 rows


@functools.cache
def device_limits(index: int | None) -> tuple[int, int, bool]:
    """A GPU's multiprocessors, shared memory of a program and whether it has tensor descriptors;
    None: the interpreter's."""
    if index is None:
        return 4, 232_448, True
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    described = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return properties["multiprocessor_count"], properties["max_shared_mem"], described


def over(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes microseconds."""
    return -(-a // b)


@functools.cache
def tile_width(width: int, dtype: torch.dtype) -> int:
    """Padded width of a tile. Narrow half-precision tiles are miscompiled for Hopper by Triton
    3.6."""
    return max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(width))


def choices(
    K: int, V: int, dtype: torch.dtype, shared: int, *, paired: bool = False
) -> list[Tiles]:
    """The configurations that may run a walk over states [K, V], best first."""
    known = _FULL if dtype == torch.float32 else _PAIRED if paired else _DEEP
    block = tile_width(K, dtype)
    fits = [tiles for tiles in known if tiles.shared_bytes(block, dtype.itemsize) <= shared]
    # With 256 rows and float16's scaling, four warps spill half their registers and Triton 3.6
    # spoils some kernels for Hopper (K = 199 and 200, V = 72, states in float16 too). In bfloat16
    # four are right, and faster.
    many = block > 128 and dtype == torch.float16
    return [
        dataclasses.replace(
            x, slice=min(x.slice, tile_width(V, dtype)), warps=8 if many else x.warps
        )
        for x in fits
        or [min((*known, _LEAST), key=lambda tiles: tiles.shared_bytes(block, dtype.itemsize))]
    ]


@functools.lru_cache(1024)
def segmentation(programs: int, sums: int, chunks: int, processors: int) -> int:
    """Into how many segments to cut time. programs, sums: programs a segment of the walk and of the
    summing.

    The numbers are microseconds on an H100, with chunks of 64 tokens and slices of 128 x 64: a
    walk's chunk takes 1.5 with a multiprocessor to itself and 3.1 else; adding an earlier segment's
    state 1; a chunk of the sums 1 for each filling of the GPU, and at least 1 (2 without the half
    that strong decay skips); the extra launch 6."""
    resident = 2 * processors

    def cost(n: int) -> float:
        each = over(chunks, n)
        full, rest = divmod(programs * n, resident)
        walk = each * (
            3.1 * full + (0 if rest == 0 else 1.5 if programs * n <= processors else 3.1)
        )
        if n == 1:
            return walk
        return (
            walk
            + over(programs * n, resident) * (n - 1)
            + each * max(1.0, sums * (n - 1) / resident)
            + 6
        )

    return min(range(1, max(1, min(16, chunks // 4)) + 1), key=cost)
