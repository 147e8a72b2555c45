"""Lightning Attention on the GPU: which configuration a call runs with, its launches, and the ops
that torch sees."""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_triton import launch
from .lightning_kernels_triton import backward_kernel, forward_kernel, segments_kernel, step_kernel
from .register import define, define_backward, differentiable, direct

# What to launch, and how.


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


# Best first; the first that fits the GPU's shared memory and registers runs. Three stages hide what
# a program alone on its multiprocessor waits for; the backward's, which reads more through the
# cache, gain nothing from them when paired.
_SMALL = (Tiles(64, 64, 4, 1, True), Tiles(32, 64, 4, 1))
_DEEP = (Tiles(64, 64, 4, 3, True), *_SMALL)
_PAIRED = (Tiles(64, 64, 4, 2, True), *_SMALL)
_FULL = (Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))  # for float32
_LEAST = Tiles(16, 64, 4, 1)  # where a program has 64 KiB, and the states 256 rows
_Key = tuple[Any, ...]
_fitting: dict[_Key, Tiles] = {}  # of a call's key: the configuration that runs it


@functools.cache
def _device(index: int | None) -> tuple[int, int, bool]:
    """A GPU's multiprocessors, shared memory of a program and whether it has tensor descriptors;
    None: the interpreter's."""
    if index is None:
        return 4, 232_448, True
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    described = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return properties["multiprocessor_count"], properties["max_shared_mem"], described


def _over(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes microseconds."""
    return -(-a // b)


@functools.cache
def _block(width: int, dtype: torch.dtype) -> int:
    """Padded width of a tile. Narrow half-precision tiles are miscompiled for Hopper by Triton
    3.6."""
    return max(16 if dtype == torch.float32 else 64, triton.next_power_of_2(width))


def choices(
    K: int, V: int, dtype: torch.dtype, shared: int, *, paired: bool = False
) -> list[Tiles]:
    """The configurations that may run a walk over states [K, V], best first."""
    known = _FULL if dtype == torch.float32 else _PAIRED if paired else _DEEP
    block = _block(K, dtype)
    fits = [tiles for tiles in known if tiles.shared_bytes(block, dtype.itemsize) <= shared]
    # With 256 rows and float16's scaling, four warps spill half their registers and Triton 3.6
    # spoils some kernels for Hopper (K = 199 and 200, V = 72, states in float16 too). In bfloat16
    # four are right, and faster.
    many = block > 128 and dtype == torch.float16
    return [
        dataclasses.replace(x, slice=min(x.slice, _block(V, dtype)), warps=8 if many else x.warps)
        for x in fits
        or [min((*known, _LEAST), key=lambda tiles: tiles.shared_bytes(block, dtype.itemsize))]
    ]


@functools.lru_cache(1024)
def _segmentation(programs: int, sums: int, chunks: int, processors: int) -> int:
    """Into how many segments to cut time. programs, sums: programs a segment of the walk and of the
    summing.

    The numbers are microseconds on an H100, with chunks of 64 tokens and slices of 128 x 64: a
    walk's chunk takes 1.5 where every program has a multiprocessor to itself and 3.1 else, the
    state of an earlier segment 1, a chunk of the sum 1 or, where sums fill the GPU, 1 for all that
    run at once (2, but strong decay spares half); a launch, 6."""
    slots = 2 * processors

    def cost(n: int) -> float:
        each = _over(chunks, n)
        full, rest = divmod(programs * n, slots)
        walk = each * (
            3.1 * full + (0 if rest == 0 else 1.5 if programs * n <= processors else 3.1)
        )
        if n == 1:
            return walk
        return (
            walk
            + _over(programs * n, slots) * (n - 1)
            + each * max(1.0, sums * (n - 1) / slots)
            + 6
        )

    return min(range(1, max(1, min(16, chunks // 4)) + 1), key=cost)


class _Call:
    """What the launches of one call share. tiles, segments: to run with; chosen where None."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None,
        tiles: Tiles | None,
        segments: int | None, more: Sequence[Tensor | None],
    ) -> None:  # fmt: skip
        self.q = q
        self.B, self.T, self.H, self.K = q.shape
        self.V, self.dtype, self.device = v.shape[3], q.dtype, q.device
        self.N = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.log_decay, self.cu_seqlens = (
            log_decay.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
        )
        self.tiles, self.segments = tiles, segments
        self.index = q.device.index if q.is_cuda else None
        self.processors, self.shared, self.describes = _device(self.index)
        # all that the arguments of a launch depend on but addresses, and of these what Triton wants
        # to know
        tensors = (q, k, v, self.log_decay, self.cu_seqlens, *more)
        self.key: _Key = (
            q.shape, self.V, self.N, self.index, tiles, segments,
            *((x.dtype, x.stride(),
               x.data_ptr() % 16 == 0) if x is not None else None for x in tensors),
        )  # fmt: skip

    def run(
        self, name: str, candidates: Callable[[], list[Tiles]], launch: Callable[[Tiles], None]
    ) -> None:
        """Launch with the first configuration that the GPU has the resources for."""
        key = (name, *self.key)
        if tiles := _fitting.get(key):
            return launch(tiles)
        for tiles in (tries := [self.tiles] if self.tiles else candidates()):
            try:
                launch(tiles)
            except OutOfResources:
                if tiles is tries[-1]:
                    raise
            else:
                if len(_fitting) >= 4096:  # of as many lengths
                    _fitting.clear()
                _fitting[key] = tiles
                return None
        return None

    def launch(
        self, kernel: Any, programs: int, tiles: Tiles, stages: int, arguments: Sequence[Any]
    ) -> None:
        launch(
            kernel,
            self.q,
            (tiles, *self.key),
            programs,
            arguments,
            warps=tiles.warps,
            stages=stages,
        )

    def cut(self, parts: int, sums: int) -> tuple[int, int]:
        """(tokens a segment, segments), with so many programs a row, head and segment."""
        rows = self.B * self.H
        wanted = self.segments or _segmentation(
            rows * parts, rows * sums, _over(self.T, 64), self.processors
        )
        segment = max(64, _over(_over(self.T, wanted), 64) * 64)
        if self.tiles and self.tiles.chunk > 64:
            segment = _over(segment, self.tiles.chunk) * self.tiles.chunk
        return segment, max(1, _over(self.T, segment))

    def describe(self, tiles: Tiles, *tensors: Tensor) -> bool:
        """Whether to load all of these by descriptor. Making them takes longer than small calls
        gain by it."""
        if not (tiles.described and self.describes and self.cu_seqlens is None):
            return False
        return (self.tiles is not None or tensors[0].numel() >= 2**26) and all(
            _describable(x) for x in tensors
        )

    def empty_state(self, *leading: int) -> Tensor:
        """[*leading, H, K, V] in float32, or nothing."""
        shape = (*leading, self.H, self.K, self.V) if leading else (0,)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def bounds(self) -> tuple[Tensor, Tensor]:
        return self.log_decay if self.cu_seqlens is None else self.cu_seqlens, self.log_decay

    def sum_segments(
        self,
        tiles: Tiles,
        cut: tuple[int, int],
        k: Tensor,
        v: Tensor,
        q: Tensor,
        d_output: Tensor,
        backward: bool,
    ) -> tuple[Tensor, Tensor]:
        """The local states of the forward walk and, in backward, of the other one."""
        width, block = min(tiles.slice, _block(self.V, self.dtype)), _block(self.K, self.dtype)
        local = self.empty_state(self.B, cut[1])
        d_local = self.empty_state(self.B, cut[1]) if backward else local
        described = self.describe(tiles, k, v, q, d_output)
        C = tiles.chunk
        programs = self.B * (1 + backward) * self.H * (cut[1] - 1) * _over(self.V, width)
        arguments = (
            _as(k, C, block, described), _as(v, C, width, described), local,
            _as(q, C, block, described), _as(d_output, C, width, described), d_local,
            *self.bounds(),
            *k.stride(), *v.stride(), *q.stride(), *d_output.stride(), self.T, self.H, self.N, *cut,
            self.K, self.V, block, width, C, described, self.cu_seqlens is not None, backward,
        )  # fmt: skip
        self.launch(segments_kernel, programs, tiles, min(2, tiles.stages), arguments)
        return local, d_local


def _describable(x: Tensor) -> bool:
    """Whether the hardware's tensor descriptors can name x."""
    aligned = all(
        s > 0 and s * x.element_size() % 16 == 0
        for s, n in zip(x.stride(), x.shape[:3], strict=False)
        if n > 1
    )
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned and x.numel() > 0


def _as(x: Tensor, chunk: int, width: int, described: bool) -> Any:
    """x, or a descriptor of its tiles [1, chunk, 1, width]."""
    if not described:
        return x
    strides = [s if n > 1 else 128 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, chunk, 1, width])


_NO_STRIDES = (0, 0, 0, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *, tiles: Tiles | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, last state)."""
    call = _Call(q, k, v, log_decay, cu_seqlens, tiles, segments, (state,))
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = call.empty_state(call.N)
    if last.numel() == 0:
        return output, last

    def launch(tiles: Tiles) -> None:
        slices = _over(call.V, tiles.slice)
        cut = call.cut(slices, slices)
        local = call.sum_segments(tiles, cut, k, v, k, v, False)[0] if cut[1] > 1 else last
        described = call.describe(tiles, q, k, v)
        C, block = tiles.chunk, _block(call.K, call.dtype)
        arguments = (
            _as(q, C, block, described), _as(k, C, block, described),
            _as(v, C, tiles.slice, described), output,
            last if state is None else state, last, local, *call.bounds(), *q.stride(), *k.stride(),
            *v.stride(),
            *(_NO_STRIDES if state is None else state.stride()), call.T, call.H, call.N, *cut,
            call.K, call.V, block, tiles.slice, C, described, cu_seqlens is not None,
            state is not None, cut[1] > 1,
        )  # fmt: skip
        call.launch(
            forward_kernel, call.B * call.H * cut[1] * slices, tiles, tiles.stages, arguments
        )

    call.run("forward", lambda: choices(call.K, call.V, call.dtype, call.shared), launch)
    return output, last


def backward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_output: Tensor, d_last: Tensor | None, *, into: Sequence[Tensor] = (),
    raw: Sequence[Tensor] = (),
    tiles: Tiles | None = None, segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and of the incoming state (empty where there was none).

    into: where to write the first three, columns adjacent, strides of dq and dk alike. raw: two
    such tensors of which q and k are the swish; then dq and dk are the gradients of these."""
    call = _Call(
        q, k, v, log_decay, cu_seqlens, tiles, segments, (state, d_output, d_last, *into, *raw)
    )
    dq, dk, dv = into or (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    q_raw, k_raw = raw or (q, k)
    d_state = call.empty_state(*(() if state is None else (call.N,)))
    if call.N * call.H == 0:
        return dq, dk, dv, d_state
    BK, BV = _block(call.K, call.dtype), _block(call.V, call.dtype)
    rows = call.B * call.H

    def parts(width: int) -> int:
        return 2 * _over(call.K, width) + _over(call.V, width)

    def launch(tiles: Tiles) -> None:
        SK, SV = min(tiles.slice, BK), min(tiles.slice, BV)
        programs = 2 * _over(call.K, SK) + _over(call.V, SV)
        cut = call.cut(programs, 2 * _over(call.V, SV))
        sums = (
            call.sum_segments(tiles, cut, k, v, q, d_output, True)
            if cut[1] > 1
            else (d_state, d_state)
        )
        described = call.describe(tiles, q, k, v, d_output)
        blocks = ((q, BK), (k, BK), (v, BV), (d_output, BV), (q, SK), (k, SK), (d_output, SV))
        arguments = (
            *(_as(x, tiles.chunk, width, described) for x, width in blocks), dq, dk, dv, q_raw,
            k_raw,
            d_state if state is None else state, d_state if d_last is None else d_last, d_state,
            *sums, *call.bounds(),
            *q.stride(), *k.stride(), *v.stride(), *d_output.stride(),
            *dk.stride()[:3], *dv.stride()[:3], *q_raw.stride()[:3],
            *(_NO_STRIDES if state is None else state.stride()),
            *(_NO_STRIDES if d_last is None else d_last.stride()),
            call.T, call.H, call.N, *cut, call.K, call.V, BK, BV, SK, SV, tiles.chunk, described,
            bool(raw),
            cu_seqlens is not None, state is not None, d_last is not None, cut[1] > 1,
            tiles.stages if raw else None,
        )  # fmt: skip
        call.launch(backward_kernel, rows * cut[1] * programs, tiles, tiles.stages, arguments)

    def candidates() -> list[Tiles]:
        widest = max(call.K, call.V)
        return choices(
            widest, widest, call.dtype, call.shared, paired=rows * parts(64) > call.processors
        )

    call.run("backward", candidates, launch)
    return dq, dk, dv, d_state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    new_state: Tensor,
    output: Tensor,
    slots: Tensor | None = None,
) -> None:
    """One token, [B, 1, H, K]: fills `output` and `new_state`, which may be `state`.

    slots: [B], where each row's state is among [N, H, K, V], or -1; by default where the row is."""
    slots = None if slots is None else slots.contiguous()
    call = _Call(q, k, v, log_decay, None, None, None, (state, new_state, slots))
    if call.B * call.H == 0:
        return
    wide = 32 if call.V > 16 else 16
    arguments = (
        q, k, v, output, new_state if state is None else state, new_state, call.log_decay,
        call.log_decay if slots is None else slots,
        q.stride(0), q.stride(2), q.stride(3), k.stride(0), k.stride(2), k.stride(3),
        v.stride(0), v.stride(2), v.stride(3), *(_NO_STRIDES if state is None else state.stride()),
        *new_state.stride(), call.H, call.K, call.V, triton.next_power_of_2(call.K), wide,
        state is not None, slots is not None,
    )  # fmt: skip
    programs = call.B * call.H * _over(call.V, wide)
    call.run(
        "step",
        lambda: [Tiles(1, wide, 4, 1)],
        lambda tiles: call.launch(step_kernel, programs, tiles, 1, arguments),
    )


# What autograd and torch.compile see.


def attend_in_place(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None
) -> Tensor:
    """One token; `state` moves on."""
    inputs = q, k, v, log_decay, state, slots
    return (_step_in_place if direct(*inputs) else step_in_place_op)(*inputs)  # type: ignore[no-any-return]


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    output, new_state = _fake_step(q, k, v, log_decay, state)
    step(q, k, v, log_decay, state, new_state, output)
    return output, new_state


def _step_in_place(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None
) -> Tensor:
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    step(q, k, v, log_decay, state, state, output, slots)
    if not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return output


def _fake_forward(q, k, v, log_decay, state, cu_seqlens):  # type: ignore[no-untyped-def]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), last


def _fake_backward(q, k, v, log_decay, state, cu_seqlens, d_output, d_last):  # type: ignore[no-untyped-def]
    d_state = q.new_empty((0,) if state is None else state.shape, dtype=torch.float32)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), d_state


def _fake_step(q, k, v, log_decay, state):  # type: ignore[no-untyped-def]
    new_state = q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    return torch.empty_like(v, memory_format=torch.contiguous_format), new_state


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay"
_SEQUENCES = "Tensor? state, Tensor? cu_seqlens"
_backward = define_backward(
    "lightning_triton_backward",
    f"({_TENSORS}, {_SEQUENCES}, Tensor d_output, Tensor? d_last)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward, _fake_backward, "lightning_attention", "those of backend='reference'",
)  # fmt: skip
step_in_place_op = define(
    "lightning_triton_step_", f"({_TENSORS}, Tensor(a!) state, Tensor? slots) -> Tensor",
    _step_in_place,
    lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
)  # fmt: skip


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, *rest = inputs  # a step has no cu_seqlens
    ctx.save_for_backward(q, k, v, log_decay, state, rest[0] if rest else None)
    ctx.inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_last):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    dq, dk, dv, d_state = _backward(q, k, v, log_decay, state, cu_seqlens, d_output, d_last)
    gradients = (dq, dk, dv, None, None if state is None else d_state.to(state.dtype), None)
    return gradients[: ctx.inputs]


_RESULTS = "(Tensor, Tensor)"
_attend = differentiable(
    "lightning_triton",
    f"({_TENSORS}, {_SEQUENCES}) -> {_RESULTS}",
    forward,
    _fake_forward,
    _save_for_backward,
    _differentiate,
)
_attend_one = differentiable(
    "lightning_triton_step",
    f"({_TENSORS}, Tensor? state) -> {_RESULTS}",
    _step,
    _fake_step,
    _save_for_backward,
    _differentiate,
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`forward` or, for one token, the step, differentiable."""
    if q.shape[1] == 1 and cu_seqlens is None:
        return _attend_one(q, k, v, log_decay, state)  # type: ignore[no-any-return]
    return _attend(q, k, v, log_decay, state, cu_seqlens)  # type: ignore[no-any-return]
