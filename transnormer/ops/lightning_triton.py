"""Lightning Attention on the GPU: the launches of its kernels, and the ops that torch sees."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_triton import can_begin_early, launch
from .lightning_kernels_triton import backward_kernel, forward_kernel
from .lightning_segments_triton import segments_kernel
from .lightning_step_triton import step_kernel
from .lightning_tiles_triton import Tiles, choices, device_limits, over, segmentation, tile_width
from .register import define, define_backward, differentiable, direct

# Launches.

_Key = tuple[Any, ...]
_fitting: dict[_Key, Tiles] = {}  # of a call's key: the configuration that runs it


class _Call:
    """What the launches of one call share. tiles, segments: to run with; chosen where None."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        cu_seqlens: Tensor | None,
        tiles: Tiles | None,
        segments: int | None,
        more: Sequence[Tensor | None],
    ) -> None:
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
        self.processors, self.shared, self.describes = device_limits(self.index)
        # all that the arguments of a launch depend on but addresses, and of these what Triton wants
        # to know
        tensors = (q, k, v, self.log_decay, self.cu_seqlens, *more)
        self.key: _Key = (
            q.shape,
            self.V,
            self.N,
            self.index,
            tiles,
            segments,
            *(
                (x.dtype, x.stride(), x.data_ptr() % 16 == 0) if x is not None else None
                for x in tensors
            ),
        )

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
        self,
        kernel: Any,
        programs: int,
        tiles: Tiles,
        stages: int,
        arguments: Sequence[Any],
        early: bool = False,
    ) -> None:
        launch(
            kernel,
            self.q,
            (tiles, *self.key),
            programs,
            arguments,
            warps=tiles.warps,
            stages=stages,
            early=early,
        )

    def cut(self, parts: int, sums: int) -> tuple[int, int]:
        """(tokens a segment, segments), with so many programs a row, head and segment."""
        rows = self.B * self.H
        wanted = self.segments or segmentation(
            rows * parts, rows * sums, over(self.T, 64), self.processors
        )
        segment = max(64, over(over(self.T, wanted), 64) * 64)
        if self.tiles and self.tiles.chunk > 64:
            segment = over(segment, self.tiles.chunk) * self.tiles.chunk
        return segment, max(1, over(self.T, segment))

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
        width, block = (
            min(tiles.slice, tile_width(self.V, self.dtype)),
            tile_width(self.K, self.dtype),
        )
        local = self.empty_state(self.B, cut[1])
        d_local = self.empty_state(self.B, cut[1]) if backward else local
        described = self.describe(tiles, k, v, q, d_output)
        programs = self.B * (1 + backward) * self.H * (cut[1] - 1) * over(self.V, width)
        k_, q_ = (_as(x, tiles.chunk, block, described) for x in (k, q))
        v_, d_output_ = (_as(x, tiles.chunk, width, described) for x in (v, d_output))
        tensors = (k_, v_, local, q_, d_output_, d_local, *self.bounds())
        strides = (k.stride(), v.stride(), q.stride(), d_output.stride())
        sizes = (self.T, self.H, self.N, *cut)
        widths = (self.K, self.V, block, width, tiles.chunk)
        flags = (described, self.cu_seqlens is not None, backward)
        arguments = (*tensors, *strides, *sizes, *widths, *flags)
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


def _strides(state: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if state is None else state.stride()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, last state)."""
    call = _Call(q, k, v, log_decay, cu_seqlens, tiles, segments, (state,))
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = call.empty_state(call.N)
    if last.numel() == 0:
        return output, last

    def launch(tiles: Tiles) -> None:
        slices = over(call.V, tiles.slice)
        cut = call.cut(slices, slices)
        local = call.sum_segments(tiles, cut, k, v, k, v, False)[0] if cut[1] > 1 else last
        described = call.describe(tiles, q, k, v)
        block = tile_width(call.K, call.dtype)
        q_, k_ = (_as(x, tiles.chunk, block, described) for x in (q, k))
        v_ = _as(v, tiles.chunk, tiles.slice, described)
        first = last if state is None else state
        tensors = (q_, k_, v_, output, first, last, local, *call.bounds())
        strides = (q.stride(), k.stride(), v.stride(), _strides(state))
        sizes = (call.T, call.H, call.N, *cut)
        widths = (call.K, call.V, block, tiles.slice, tiles.chunk)
        flags = (described, cu_seqlens is not None, state is not None, cut[1] > 1)
        arguments = (*tensors, *strides, *sizes, *widths, *flags)
        call.launch(
            forward_kernel, call.B * call.H * cut[1] * slices, tiles, tiles.stages, arguments
        )

    call.run("forward", lambda: choices(call.K, call.V, call.dtype, call.shared), launch)
    return output, last


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    d_output: Tensor,
    d_last: Tensor | None,
    *,
    into: Sequence[Tensor] = (),
    raw: Sequence[Tensor] = (),
    tiles: Tiles | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    k_block, v_block = tile_width(call.K, call.dtype), tile_width(call.V, call.dtype)
    rows = call.B * call.H

    def parts(width: int) -> int:
        return 2 * over(call.K, width) + over(call.V, width)

    def launch(tiles: Tiles) -> None:
        k_slice, v_slice = min(tiles.slice, k_block), min(tiles.slice, v_block)
        programs = 2 * over(call.K, k_slice) + over(call.V, v_slice)
        cut = call.cut(programs, 2 * over(call.V, v_slice))
        sums = (
            call.sum_segments(tiles, cut, k, v, q, d_output, True)
            if cut[1] > 1
            else (d_state, d_state)
        )
        described = call.describe(tiles, q, k, v, d_output)
        blocks = (
            (q, k_block),
            (k, k_block),
            (v, v_block),
            (d_output, v_block),
            (q, k_slice),
            (k, k_slice),
            (d_output, v_slice),
        )
        inputs = (_as(x, tiles.chunk, width, described) for x, width in blocks)
        first = d_state if state is None else state
        after = d_state if d_last is None else d_last
        tensors = (*inputs, dq, dk, dv, q_raw, k_raw, first, after, d_state, *sums, *call.bounds())
        strides = (
            *(x.stride() for x in (q, k, v, d_output)),
            *(x.stride()[:3] for x in (dk, dv, q_raw)),
            *(_strides(x) for x in (state, d_last)),
        )
        sizes = (call.T, call.H, call.N, *cut)
        widths = (call.K, call.V, k_block, v_block, k_slice, v_slice, tiles.chunk)
        flags = (
            described,
            bool(raw),
            cu_seqlens is not None,
            state is not None,
            d_last is not None,
            cut[1] > 1,
        )
        depth = tiles.stages if raw else None
        arguments = (*tensors, *strides, *sizes, *widths, *flags, depth)
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
    swish: bool = False,
) -> None:
    """One token, [B, 1, H, K]: fills `output` and `new_state`, which may be `state`.

    slots: [B], where each row's state is among [N, H, K, V], or -1; by default where the row is.
    swish: of q and k."""
    slots = None if slots is None else slots.contiguous()
    call = _Call(q, k, v, log_decay, None, None, None, (state, new_state, slots))
    if call.B * call.H == 0:
        return
    wide = 32 if call.V > 16 else 16
    tensors = (
        *(q, k, v, output),
        *(new_state if state is None else state, new_state),
        *(call.log_decay, call.log_decay if slots is None else slots),
    )
    strides = (
        *((x.stride(0), x.stride(2), x.stride(3)) for x in (q, k, v)),
        *(_strides(state), new_state.stride()),
    )
    widths = (call.K, call.V, triton.next_power_of_2(call.K), wide)
    early = can_begin_early(q)
    flags = (state is not None, slots is not None, swish, early)
    arguments = (*tensors, *strides, call.H, *widths, *flags)
    programs = call.B * call.H * over(call.V, wide)
    call.key = (*call.key, swish, early)
    call.run(
        "step",
        lambda: [Tiles(1, wide, 4, 1)],
        lambda tiles: call.launch(step_kernel, programs, tiles, 1, arguments, early),
    )


# What autograd and torch.compile see.


def attend_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    swish: bool,
) -> Tensor:
    """One token; `state` moves on."""
    inputs = q, k, v, log_decay, state, slots, swish
    return (_step_in_place if direct(*inputs) else step_in_place_op)(*inputs)  # type: ignore[no-any-return]


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    output, new_state = _fake_step(q, k, v, log_decay, state)
    step(q, k, v, log_decay, state, new_state, output)
    return output, new_state


def _step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    swish: bool,
) -> Tensor:
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    step(q, k, v, log_decay, state, state, output, slots, swish)
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
    backward,
    _fake_backward,
    "lightning_attention",
    "those of backend='reference'",
)
step_in_place_op = define(
    "lightning_triton_step_",
    f"({_TENSORS}, Tensor(a!) state, Tensor? slots, bool swish) -> Tensor",
    _step_in_place,
    lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
)


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
