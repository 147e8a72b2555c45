"""Drawing tokens on the GPU, in Triton: a program a row, and no sorting.

In the order of the probabilities, the tokens that count are the first of all, and the one that is
drawn is where the sum of those before it passes a target. Neither needs the order itself. Logits
are compared as integers that have their order (keys), and the key at a border is found by search:
each pass over the row sums what lies above three keys, and so leaves a quarter of them. bfloat16
has 2^16 keys, so that 8 passes find a border, and float32 has 2^32. A sort of 256 rows of 64,000
takes longer than a 385M model does for their logits."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_triton import launch
from .register import define, direct

BLOCK = 4_096  # logits that a program takes at a time
WARPS = 16  # a row has one program, so that its passes should have as many loads as there can be
# bits of a float32 that tell numbers of a dtype apart
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 19}


@triton.jit
def _keys(logits, start, V: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Logits of one block, and integers of BITS bits that have their order; outside of the row
    -inf, and a key that no number has."""
    at = start + tl.arange(0, BLOCK)
    x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 the 0.0 that it is equal to
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> (32 - BITS)
    return x, tl.where(at < V, key, -0x80000000)


@triton.jit
def _weights(x, largest, temperature):
    """exp((x - largest) / temperature): the largest has 1."""
    return tl.exp(((x - largest) / temperature).to(tl.float32))


@triton.jit
def _above(
    logits, largest, temperature, key, V: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr
):
    """Four numbers: the sum of the weights of all tokens with a larger key, how many these are, how
    many tokens have this key, and the weight of one of them."""
    mass = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    one = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x, keys = _keys(logits, start, V, BLOCK, BITS)
        w = _weights(x, largest, temperature)
        mass += tl.where(keys > key, w, 0.0)
        count += (keys > key).to(tl.int32)
        equal += (keys == key).to(tl.int32)
        one = tl.maximum(one, tl.where(keys == key, w, 0.0))
    return (
        tl.sum(mass.to(tl.float64)),
        tl.sum(count).to(tl.int64),
        tl.sum(equal).to(tl.int64),
        tl.max(one).to(tl.float64),
    )


@triton.jit
def _border(
    logits,
    largest,
    temperature,
    target,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    COUNTS: tl.constexpr,  # numbers of tokens, else weights
    STRICT: tl.constexpr,
):
    """The smallest key above which the tokens sum to at most `target`; STRICT: to less."""
    PASSES: tl.constexpr = (BITS + 1) // 2
    base = tl.full([], -(1 << (BITS - 1)), tl.int32)
    quarter = tl.full([], 1 << (2 * PASSES - 2), tl.int32)  # of the keys that are left
    for _ in range(PASSES):
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        third = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            x, keys = _keys(logits, start, V, BLOCK, BITS)
            w = tl.full([BLOCK], 1.0, tl.float32) if COUNTS else _weights(x, largest, temperature)
            first += tl.where(keys > base + (quarter - 1), w, 0.0)
            second += tl.where(keys > base + (2 * quarter - 1), w, 0.0)
            third += tl.where(keys > base + (3 * quarter - 1), w, 0.0)
        a, b, c = (
            tl.sum(first.to(tl.float64)),
            tl.sum(second.to(tl.float64)),
            tl.sum(third.to(tl.float64)),
        )
        if STRICT:
            larger = (a >= target).to(tl.int32) + (b >= target).to(tl.int32)
            larger += (c >= target).to(tl.int32)
        else:
            larger = (a > target).to(tl.int32) + (b > target).to(tl.int32)
            larger += (c > target).to(tl.int32)
        base += quarter * larger
        quarter = quarter >> 2
    return base


@triton.jit
def draw_kernel(
    logits,  # [S, V], columns contiguous
    temperature,  # [S] float64, and so are top_p, min_p and uniform
    top_k,  # [S] int64
    top_p,
    min_p,
    uniform,
    tokens,  # [S] int64
    row_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    t = tl.load(temperature + row)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x, keys = _keys(logits, start, V, BLOCK, BITS)
        highest = tl.maximum(highest, x)
    largest = tl.max(highest)

    # The tokens that count: those above the key `border`, and `kept` of those with this key.
    lowest = tl.full([], -(1 << (BITS - 1)), tl.int32)
    border = lowest
    k = tl.load(top_k + row)
    if k < V:
        border = _border(
            logits, largest, t, k.to(tl.float64), V, BLOCK, BITS, COUNTS=True, STRICT=True
        )
    mass, count, equal, one = _above(logits, largest, t, border, V, BLOCK, BITS)
    kept = tl.minimum(equal, k - count)
    total = mass + kept * one
    p = tl.load(top_p + row)
    if p < 1.0:
        by_p = _border(logits, largest, t, p * total, V, BLOCK, BITS, COUNTS=False, STRICT=True)
        if by_p >= border:
            mass, _, equal, one = _above(logits, largest, t, by_p, V, BLOCK, BITS)
            # as many as it takes for the sum to reach p
            needed = tl.ceil((p * total - mass) / tl.maximum(one, 1e-300)).to(tl.int64)
            needed = tl.minimum(equal, tl.maximum(needed, 1))
            kept = tl.where(by_p == border, tl.minimum(kept, needed), needed)
            border = by_p
            total = mass + kept * one
    least = tl.load(min_p + row)
    if least > 0.0:
        # weights fall with the keys, so that those of at least min_p end at a key too
        smallest = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, V, BLOCK):
            x, keys = _keys(logits, start, V, BLOCK, BITS)
            enough = (_weights(x, largest, t) >= least) & (keys > -0x80000000)
            smallest = tl.minimum(smallest, tl.where(enough, keys, 0x7FFFFFFF))
        by_least = tl.min(smallest)
        if by_least > border:
            mass, _, equal, one = _above(logits, largest, t, by_least, V, BLOCK, BITS)
            border, kept = by_least, equal
            total = mass + kept * one

    target = tl.load(uniform + row) * total
    drawn = _border(logits, largest, t, target, V, BLOCK, BITS, COUNTS=False, STRICT=False)
    drawn = tl.maximum(drawn, border)  # rounding
    mass, _, equal, one = _above(logits, largest, t, drawn, V, BLOCK, BITS)
    number = tl.floor((target - mass) / tl.maximum(one, 1e-300)).to(tl.int64)
    last = tl.where(drawn == border, kept, equal) - 1
    number = tl.maximum(0, tl.minimum(number, last))
    before = tl.zeros([], tl.int64)
    token = tl.zeros([], tl.int64)
    for start in range(0, V, BLOCK):
        x, keys = _keys(logits, start, V, BLOCK, BITS)
        at = start + tl.arange(0, BLOCK)
        same = (keys == drawn).to(tl.int64)
        place = before + tl.cumsum(same, 0) - 1
        token += tl.sum(tl.where((same > 0) & (place == number), at.to(tl.int64), 0))
        before += tl.sum(same)
    tl.store(tokens + row, token)


def _draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    from .draw import COLDEST

    if logits.stride(1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    # a weight of exp(-inf) is 0, and that of the largest 1, at any temperature above 0
    cold = temperature.clamp(min=COLDEST)
    settings = [x.reshape(rows).contiguous() for x in (cold, top_k, top_p, min_p, uniform)]
    block = min(BLOCK, triton.next_power_of_2(vocab))
    constants = (vocab, block, BITS[logits.dtype])
    key = (logits.dtype, logits.stride(0), logits.data_ptr() % 16 == 0, constants)
    arguments = (logits, *settings, tokens, logits.stride(0), *constants)
    if rows:
        launch(draw_kernel, logits, key, rows, arguments, warps=WARPS)
    return tokens


_op = define(
    "draw",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform)"
    " -> Tensor",
    _draw,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
)


def draw(logits: Tensor, *settings: Tensor) -> Tensor:
    """`transnormer.ops.draw.draw`, which a compiler sees too."""
    return (_draw if direct(logits, *settings) else _op)(logits, *settings)  # type: ignore[no-any-return]
