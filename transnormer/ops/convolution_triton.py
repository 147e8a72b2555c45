"""The short convolution on the GPU, in Triton: one kernel a direction, and one for a decoding step.

With the J taps w of each channel, and x_s for s before a sequence's first token taken from `past`:

    y_t = sum over j of w_j x_(t - j)
    dx_s = sum over j of w_j dy_(s + j)        dw_j = sum over s of x_s dy_(s + j)

where only pairs of one sequence count, and the J - 1 tokens at its end also have the gradient of
`last`. Both sums of the backward pass pair a token x_s with the same J later ones of dy, so x is
read once. A program reads dy J times, each time one token further on, and the forward kernel reads
x so; but the first time alone comes from the device's memory, the others from the caches. Counted
in units of one [B, T, C] tensor of that memory, forward moves 2 and backward 3. The gradient of
`past` is that of J - 1 tokens before the first, so the same kernel computes it in a second launch.
Each program sums dw over its own tokens in float32, and torch sums the programs in one order:
repeats are bit-equal."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .register import define, define_backward, differentiable, direct

# (tokens, channels, warps) of a program. 64 channels of two bytes are one line of 128 bytes, which
# eight threads read 16 bytes each. A thread has 16 numbers. Compiled for Hopper that takes about 60
# and 80 registers, so that eight and three programs share a multiprocessor, and each runs while the
# others wait for memory; 32 numbers would take more than 150 in the backward pass. Blocks of fewer
# tokens would read more of them twice and, in the backward pass, write more sums for the taps.
FORWARD = (32, 64, 4)
BACKWARD = (64, 64, 8)
STEP = 256  # channels of a program; few, because a step has few rows


@triton.jit
def _sequence(cu_seqlens, t, sequences, halvings):
    """The sequence that each token t is in, the last that begins at or before it, by bisection."""
    n = t * 0
    step = 1 << halvings
    for _ in range(halvings):
        step = step // 2
        later = n + step
        within = later < sequences
        begins = tl.load(cu_seqlens + later, mask=within, other=0).to(tl.int64)
        n = tl.where(within & (begins <= t), later, n)
    return n


@triton.jit
def _program(T, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's row, tokens [BLOCK_T, 1] and channels [1, BLOCK_C], and its number among those
    of the same channels. Neighbouring programs have neighbouring channels."""
    columns: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % columns * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    number = tl.program_id(0) // columns
    blocks = tl.cdiv(T, BLOCK_T)
    t = number % blocks * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    return (number // blocks).to(tl.int64), t, c, number.to(tl.int64)


@triton.jit(do_not_specialize=["T", "sequences", "halvings"])
def convolution_kernel(
    # tensors, all but `positions` contiguous
    x,  # [B, T, C]
    taps,  # [TAPS, C]
    past,  # [B or sequences, TAPS - 1, C], read if HAS_PAST
    cu_seqlens,  # [sequences + 1], read if PACKED
    positions,  # [B, T], read if PLACED
    y,  # [B, T, C]
    # strides of positions
    p_row,
    p_token,
    # sizes
    T,
    sequences,
    halvings,  # of the sequences, until one is left
    # compile-time constants
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PLACED: tl.constexpr,
):
    row, t, c, _ = _program(T, C, BLOCK_T, BLOCK_C)
    live = t < T
    n, first = row, t * 0
    if PACKED:
        n = _sequence(cu_seqlens, t, sequences, halvings)
        first = tl.load(cu_seqlens + n).to(tl.int64)
    if PLACED:
        place = tl.load(positions + row * p_row + t * p_token, mask=live, other=0)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for j in tl.static_range(TAPS):
        reads = live & (c < C)
        if PLACED:
            reads = reads & (place >= j)
        s = t - j
        value = tl.load(x + (row * T + s) * C + c, mask=reads & (s >= first), other=0.0)
        value = value.to(tl.float32)
        if HAS_PAST and j > 0:
            at = n * (TAPS - 1) + (s - first + TAPS - 1)
            earlier = tl.load(past + at * C + c, mask=reads & (s < first), other=0.0)
            value += earlier.to(tl.float32)
        total += value * tl.load(taps + j * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + (row * T + t) * C + c, total.to(y.dtype.element_ty), mask=live & (c < C))


@triton.jit(do_not_specialize=["T", "sequences", "halvings"])
def convolution_backward_kernel(
    # tensors, all but `positions` contiguous
    source,  # [B, T, C]; of PAST [B or sequences, TAPS - 1, C]
    taps,  # [TAPS, C]
    dy,  # [B, T, C]
    d_last,  # [B or sequences, TAPS - 1, C], read if HAS_LAST
    cu_seqlens,  # [sequences + 1], read if PACKED
    positions,  # [B, T], read if PLACED
    d_source,  # like source
    d_weight,  # [programs / blocks of channels, C, TAPS] in float32
    # strides of positions
    p_row,
    p_token,
    # sizes
    T,
    sequences,
    halvings,  # of the sequences, until one is left
    # compile-time constants
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LAST: tl.constexpr,
    PLACED: tl.constexpr,
    PAST: tl.constexpr,
):
    """The gradient of the tokens in `source`, and what each program's tokens add to the taps'.

    PAST: source is what lies before each sequence, and a program has that of one of them."""
    row, s, c, number = _program(TAPS - 1 if PAST else T, C, BLOCK_T, BLOCK_C)
    n, first, stop = row, s * 0, s * 0 + T
    live = s < T
    at = row * T + s
    if PAST:
        live = s < TAPS - 1
        at = row * (TAPS - 1) + s
        if PACKED:
            first += tl.load(cu_seqlens + n).to(tl.int64)
            stop = s * 0 + tl.load(cu_seqlens + n + 1).to(tl.int64)
            row = row * 0
        s += first - (TAPS - 1)
    elif PACKED:
        n = _sequence(cu_seqlens, s, sequences, halvings)
        stop = tl.load(cu_seqlens + n + 1).to(tl.int64)
    value = tl.load(source + at * C + c, mask=live & (c < C), other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for j in tl.static_range(TAPS):
        t = s + j  # the token that reads s by this tap
        read = live & (t < stop)
        if PAST:
            read = read & (t >= first)
        if PLACED:
            place = tl.load(positions + row * p_row + t * p_token, mask=read, other=-1)
            read = read & (place >= j)
        g = tl.load(dy + (row * T + t) * C + c, mask=read & (c < C), other=0.0).to(tl.float32)
        total += g * tl.load(taps + j * C + c, mask=c < C, other=0.0).to(tl.float32)
        summed = tl.sum(g * value, axis=0)[None, :]
        tl.store(d_weight + (number * C + c) * TAPS + j, summed, mask=c < C)
    if HAS_LAST:
        k = s - stop + (TAPS - 1)  # the place of s in `last`
        kept = d_last + (n * (TAPS - 1) + k) * C + c
        total += tl.load(kept, mask=live & (k >= 0) & (k < TAPS - 1) & (c < C), other=0.0).to(
            tl.float32
        )
    tl.store(d_source + at * C + c, total.to(d_source.dtype.element_ty), mask=live & (c < C))


@triton.jit(do_not_specialize=["T"])
def convolution_last_kernel(
    x,  # [B, T, C]
    past,  # [B or N, TAPS - 1, C], read if HAS_PAST
    cu_seqlens,  # [N + 1], read if PACKED
    last,  # [B or N, TAPS - 1, C]
    T,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PAST: tl.constexpr,
):
    """The last TAPS - 1 tokens of each sequence, after those that lie before it."""
    n, _, c, _ = _program(1, C, 1, BLOCK_C)
    first, stop = n * T, n * T + T
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        stop = tl.load(cu_seqlens + n + 1).to(tl.int64)
    for k in tl.static_range(TAPS - 1):
        s = stop - (TAPS - 1) + k
        value = tl.load(x + s * C + c, mask=(c < C) & (s >= first), other=0.0)
        if HAS_PAST:
            at = n * (TAPS - 1) + (s - first + TAPS - 1)
            value += tl.load(past + at * C + c, mask=(c < C) & (s < first), other=0.0)
        tl.store(last + (n * (TAPS - 1) + k) * C + c, value, mask=c < C)


@triton.jit
def convolution_step_kernel(
    x,  # [S, C]
    weight,  # [C, TAPS] contiguous
    memory,  # [slots, TAPS - 1, C] contiguous
    slots,  # [S], read if HAS_SLOTS
    y,  # [S, C] contiguous
    x_row,  # the stride of x's rows
    C: tl.constexpr,
    TAPS: tl.constexpr,
    PLACES: tl.constexpr,  # TAPS, padded
    BLOCK_C: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """One token of each row, after the tokens in the memory of its slot, from which the earliest
    then drops out. No memory is read or written for a row whose slot is -1."""
    row, _, c, _ = _program(1, C, 1, BLOCK_C)
    i = tl.arange(0, PLACES)[:, None]
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    at = memory + slot * ((TAPS - 1) * C) + i * C + c
    remembered = (c < C) & (slot >= 0)
    earlier = tl.load(at, mask=remembered & (i < TAPS - 1), other=0.0).to(x.dtype.element_ty)
    newest = tl.load(x + row * x_row + c + i * 0, mask=(c < C) & (i == TAPS - 1), other=0.0)
    row_of_tokens = tl.where(i < TAPS - 1, earlier, newest)  # [PLACES, BLOCK_C]
    w = tl.load(weight + c * TAPS + (TAPS - 1 - i), mask=(c < C) & (i < TAPS), other=0.0)
    total = tl.sum(row_of_tokens.to(tl.float32) * w.to(tl.float32), axis=0)[None, :]
    tl.store(y + row * C + c, total.to(y.dtype.element_ty), mask=c < C)
    tl.debug_barrier()  # the memory is written only after all threads have read it
    kept = row_of_tokens.to(memory.dtype.element_ty)
    tl.store(at - C, kept, mask=remembered & (i > 0) & (i < TAPS))


# Launches.


def _kinds(*tensors: Tensor | None) -> tuple[tuple[torch.dtype, bool] | None, ...]:
    return tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)


def _tile(options: tuple[int, int, int], tokens: int, channels: int) -> tuple[int, int, int]:
    """The tile, no larger than the next powers of two of the tokens and channels there are."""
    most = (triton.next_power_of_2(max(1, number)) for number in (tokens, channels))
    return *map(min, options, most), options[2]


class _Call:
    """What the kernels of one call share. x: [B, T, C], weight: [C, J]."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        past: Tensor | None,
        cu_seqlens: Tensor | None,
        positions: Tensor | None,
    ):
        self.x, self.taps = x.contiguous(), weight.t().contiguous()
        self.past = None if past is None else past.contiguous()
        self.bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.positions = positions
        self.B, self.T, self.C = x.shape
        self.J = weight.shape[1]
        self.sequences = _sequences(x, cu_seqlens)
        self.strides = (0, 0)
        if positions is not None:
            apart = positions.dim() == 2 and positions.shape[0] > 1
            self.strides = (positions.stride(0) if apart else 0, positions.stride(-1))
        halvings = (self.sequences - 1).bit_length() if self.sequences else 0
        self.sizes = (self.T, self.sequences, halvings)

    def launch(
        self,
        kernel: Any,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        blocks: int,
        tile: tuple[int, int, int],
        constants: tuple[int | bool, ...],
    ) -> None:
        """tensors: those that are None the kernel does not read. blocks: the programs of each block
        of channels. constants: the kernel's last parameters, from C on."""
        programs = blocks * triton.cdiv(self.C, tile[1])
        if programs:
            given = tuple(self.x if x is None else x for x in tensors)
            key = (_kinds(*tensors), self.strides, constants)
            launch(kernel, self.x, key, programs, (*given, *numbers, *constants), warps=tile[2])


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def forward(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, the last tokens of each sequence). past has the dtype of x."""
    y, last = _fake(x, weight, past, cu_seqlens, positions)
    call = _Call(x, weight, past, cu_seqlens, positions)
    tile = _tile(FORWARD, call.T, call.C)
    flags = (cu_seqlens is not None, past is not None)
    call.launch(
        convolution_kernel,
        (call.x, call.taps, call.past, call.bounds, positions, y),
        (*call.strides, *call.sizes),
        call.B * triton.cdiv(call.T, tile[0]),
        tile,
        (call.C, call.J, *tile[:2], *flags, positions is not None),
    )
    tile = _tile((1, STEP, 4), 1, call.C)
    call.launch(
        convolution_last_kernel,
        (call.x, call.past, call.bounds, last),
        (call.T,),
        call.sequences,
        tile,
        (call.C, call.J, tile[1], *flags),
    )
    return y, last


def backward(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    positions: Tensor | None,
    dy: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and past; the last is empty without a past."""
    call = _Call(x, weight, past, cu_seqlens, positions)
    dx, _, d_past = _fake_backward(x, weight, past, cu_seqlens, positions, dy, d_last)
    tile = _tile(BACKWARD, call.T, call.C)
    blocks = call.B * triton.cdiv(call.T, tile[0])
    pasts = 0 if past is None or call.J == 1 else call.sequences
    sums = torch.empty(blocks + pasts, *weight.shape, dtype=torch.float32, device=x.device)
    dy = dy.contiguous()
    d_last = None if d_last is None else d_last.contiguous()
    flags = (cu_seqlens is not None, d_last is not None, positions is not None)

    def run(source, d_source, sums, blocks, tile, of_past):  # type: ignore[no-untyped-def]
        call.launch(
            convolution_backward_kernel,
            (source, call.taps, dy, d_last, call.bounds, positions, d_source, sums),
            (*call.strides, *call.sizes),
            blocks,
            tile,
            (call.C, call.J, *tile[:2], *flags, of_past),
        )

    run(call.x, dx, sums, blocks, tile, False)
    if pasts:
        tile = (triton.next_power_of_2(call.J - 1), *tile[1:])
        run(call.past, d_past, sums[blocks:], pasts, tile, True)
    return dx, sums.sum(0).to(weight.dtype), d_past


def step_(x: Tensor, weight: Tensor, memory: Tensor, slots: Tensor | None) -> Tensor:
    """y [S, 1, C] of one token x [S, 1, C] of each row; memory [slots, J - 1, C] moves on."""
    rows, _, C = x.shape
    taps = weight.shape[1]
    y = x.new_empty(rows, 1, C)
    flat = x[:, 0] if x.stride(2) == 1 else x[:, 0].contiguous()
    weight, block = weight.contiguous(), _tile((1, STEP, 4), 1, C)[1]
    owners = memory if slots is None else slots.contiguous()
    constants = (C, taps, triton.next_power_of_2(taps), block, slots is not None)
    if programs := rows * triton.cdiv(C, block):
        tensors = (flat, weight, memory, owners, y)
        key = (_kinds(*tensors), flat.stride(0), constants)
        arguments = (*tensors, flat.stride(0), *constants)
        launch(convolution_step_kernel, x, key, programs, arguments, warps=4)
    if not memory.is_inference():
        torch.autograd.graph.increment_version(memory)
    return y


# What autograd and torch.compile see.


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, d_last):  # type: ignore[no-untyped-def]
    x, weight, past, cu_seqlens, positions = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    dx, d_weight, d_past = _backward(x, weight, past, cu_seqlens, positions, dy, d_last)
    return dx, d_weight, None if past is None else d_past, None, None


def _fake(x, weight, past, cu_seqlens, positions):  # type: ignore[no-untyped-def]
    last = x.new_empty(_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), last


def _fake_backward(x, weight, past, cu_seqlens, positions, dy, d_last):  # type: ignore[no-untyped-def]
    d_past = x.new_empty(0 if past is None else past.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_past


_INPUTS = "Tensor x, Tensor weight, Tensor? past, Tensor? cu_seqlens, Tensor? positions"
_backward = define_backward(
    "short_convolution_backward",
    f"({_INPUTS}, Tensor dy, Tensor? d_last) -> (Tensor, Tensor, Tensor)",
    backward,
    _fake_backward,
    "short_convolution",
    "those of backend='torch'",
)
convolve = differentiable(
    "short_convolution",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    forward,
    _fake,
    _save_for_backward,
    _differentiate,
)
_step_op = define(
    "short_convolution_step_",
    "(Tensor x, Tensor weight, Tensor(a!) memory, Tensor? slots) -> Tensor",
    step_,
    lambda x, *_: x.new_empty(x.shape),
)


def step_in_place(x: Tensor, weight: Tensor, memory: Tensor, slots: Tensor | None) -> Tensor:
    """`step_`, which a compiler sees too."""
    inputs = x, weight, memory, slots
    return (step_ if direct(*inputs) else _step_op)(*inputs)  # type: ignore[no-any-return]
