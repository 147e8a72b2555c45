"""Lightning Attention: linear attention with a fixed exponential decay per head.

For every row and head, with state S [K, V], q_t and k_t [K], v_t [V] and lambda = exp(log_decay) <=
1:

    S_t = lambda * S_{t-1} + k_t^T v_t        o_t = q_t S_t    (paper section 3.4, robust inference)

which is the same function as the quadratic form o_t = sum over s <= t of lambda^(t-s) (q_t . k_s)
v_s.

Shapes: q, k [B, T, H, K], v and output [B, T, H, V], log_decay [H], state [B, H, K, V]. K and V are
free. Cost a token and head, forward, with chunks of C tokens: about 2 C (K + V) + 4 K V FLOPs;
bytes: q, k, v and output once. No scale on q and no denominator. Only non-positive exponents are
ever exponentiated, so nothing overflows at any length."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lightning_torch
from .context import Context, attend_segment
from .decay import check_decay
from .dispatch import check_devices, choose, forward_mode, triton_refusal
from .register import without_autocast


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    context: Context | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal linear attention with decay, in O(T).

    q, k: [B, T, H, K]; v: [B, T, H, V], all of one floating dtype, any strides.
    log_decay: [H], natural logarithm of the decay per token, from -inf (a token sees itself alone)
        to 0, not learned (no gradient). Its values are checked on the CPU only, because a check on
        a GPU would wait for it.
    state: [B, H, K, V] to go on from, or None for zeros; its gradient flows.
    cu_seqlens: [N + 1] integers from 0 to T: row 0 (B = 1) holds N sequences one after another,
        each with its own state ([N, H, K, V]); empty sequences are allowed.
    return_state: also return the state after the last token, float32 (float64 for float64 inputs).
    context: the processes that share the row, each with T tokens of it, and cu_seqlens of the whole
        (`ops/context.py`). The state returned is that after the own segment, without gradient; none
        can be given.
    backend: "auto", "triton" (K and V from 16 to 256; a CUDA tensor, or any with Triton's
        interpreter on), "torch" (chunked) or "reference" (the loop over T).

    Left padding is k = 0 on the padded tokens. Returns the output [B, T, H, V] in v's dtype, or
    (output, state). Forward-mode and second derivatives: the reference has them, and "auto" takes
    it under torch.func.jvp; the gradients of the other backends raise RuntimeError where they are
    differentiated again. Raises ValueError where shapes, dtypes or devices do not fit or, on the
    CPU, a log_decay is no decay, RuntimeError where the named backend cannot run the call."""
    _check_devices(q, k, v, log_decay, state, cu_seqlens)
    check(q, k, v, log_decay, state, cu_seqlens, whole=context is None)
    if context is not None and state is not None:
        raise ValueError(
            "a state and a context exclude each other: segments hand their states on themselves"
        )
    unshared = None if context is None else "segments of a row run on triton or torch"
    refusals = {
        "triton": refusal(q, k, v, state, named=backend == "triton"),
        "torch": forward_mode(q, k, v, state),
        "reference": unshared,
    }
    chosen = choose("lightning_attention", backend, refusals)
    if context is not None:
        output, last = attend_segment(q, k, v, log_decay, cu_seqlens, context, chosen)
    elif chosen == "triton":
        from . import lightning_triton

        output, last = lightning_triton.attend(q, k, v, log_decay, state, cu_seqlens)
    elif chosen == "reference":
        output, last = lightning_reference(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens)
    elif q.shape[1] == 1 and cu_seqlens is None:
        output, last = lightning_torch.step(q, k, v, log_decay, state)
    else:
        output, last = lightning_chunked(q, k, v, log_decay, state=state, cu_seqlens=cu_seqlens)
    return (output, last) if return_state else output


def lightning_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    swish: bool = False,
    backend: str = "auto",
) -> Tensor:
    """One token of inference: the state moves on in place, the output [B, 1, H, V] is returned.

    q, k: [B, 1, H, K]; v: [B, 1, H, V]. state: [B, H, K, V], or with slots [N, H, K, V].
    slots: [B] integers, which of the N states is each row's; no two rows may share one. A row of
        slot -1 has none: nothing is written, and its output means nothing.
    swish: take swish(q) and swish(k) for q and k.
    One launch on a GPU, fit for CUDA graphs. There is no gradient: raises ValueError where one
    would be wanted, and as `lightning_attention` does. Slots on a GPU are not looked at."""
    check_devices("lightning_step_", q=q, k=k, v=v, log_decay=log_decay, state=state, slots=slots)
    check(q, k, v, log_decay, state if slots is None else None, None)
    if slots is not None:
        _check_slots(slots, q, v, state)
    if q.shape[1] != 1:
        raise ValueError(f"one token, T = 1, is a step; got {_shape(q)}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state)):
        raise ValueError(
            "lightning_step_ has no gradient: call it under torch.no_grad(), or lightning_attention"
        )
    refusals = {
        "triton": refusal(q, k, v, state, named=backend == "triton"),
        "torch": forward_mode(q, k, v, state),
    }
    if choose("lightning_step_", backend, refusals) == "triton":
        from . import lightning_triton

        return lightning_triton.attend_in_place(q, k, v, log_decay, state, slots, swish)
    if swish:
        q, k = F.silu(q), F.silu(k)
    if slots is None:
        output, new = lightning_torch.step(q, k, v, log_decay, state)
        state.copy_(new)
        return output
    output, new = lightning_torch.step(q, k, v, log_decay, state[slots])
    lightning_torch.put_(state, slots, new)
    return output


def lightning_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: the recurrence, one token after another, in `dtype` (default: at least
    float32).

    Shapes as in `lightning_attention`. Differentiable in everything, log_decay too, any number of
    times, forwards and backwards. Returns (output, state)."""
    _check_devices(q, k, v, log_decay, state, cu_seqlens)
    return _reference(q, k, v, log_decay, state, cu_seqlens, dtype)


@without_autocast
def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    work = dtype or lightning_torch.work_dtype(q)
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [
            _reference(
                q[:, start:stop],
                k[:, start:stop],
                v[:, start:stop],
                log_decay,
                None if state is None else state[n : n + 1],
                None,
                work,
            )
            for n, (start, stop) in enumerate(itertools.pairwise(bounds))
        ]
        return torch.cat([out for out, _ in parts], dim=1).to(v.dtype), torch.cat(
            [last for _, last in parts]
        )
    decay = log_decay.to(work).exp()[:, None, None]  # [H, 1, 1]
    s = lightning_torch.first_state(q, v, state, work)
    outputs = []
    for t in range(q.shape[1]):
        kt, vt, qt = (x[:, t].to(work) for x in (k, v, q))
        s = decay * s + kt.unsqueeze(-1) * vt.unsqueeze(-2)  # [B, H, K, V]
        outputs.append((qt.unsqueeze(-2) @ s).squeeze(-2))
    output = torch.stack(outputs, dim=1) if outputs else v.new_zeros(v.shape, dtype=work)
    return output.to(v.dtype if dtype is None else dtype), s


def lightning_quadratic(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Plain linear attention, O = ((Q K^T) * M) V with M of T x T: what Lightning Attention is
    measured against.

    Every tensor in the input dtype, O(T^2) time and memory. Shapes as in `lightning_attention`.
    """
    _check_devices(q, k, v, log_decay, None, None)
    mask = lightning_torch.decay_mask(log_decay, q.shape[1], q.dtype)  # [H, T, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, .]
    return ((q @ k.mT) * mask @ v).transpose(1, 2)


def lightning_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lightning Attention in plain torch: quadratic inside chunks, the state carried between them.

    chunk: tokens a chunk, 0 for the measured best. One chunk >= T is the paper's own algorithm
    (Lightning Attention 1); short chunks are its successor's, O(T) in time, with nothing of size T
    x T. Backward walks the chunks again and stores none of them. Shapes as in
    `lightning_attention`; returns (output, state)."""
    _check_devices(q, k, v, log_decay, state, cu_seqlens)
    return lightning_torch.chunked(
        q, k, v, log_decay, state, cu_seqlens, chunk or lightning_torch.CHUNK
    )  # type: ignore[no-any-return]


def refusal(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, *, named: bool) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    for letter, width in (("K", q.shape[3]), ("V", v.shape[3])):
        if not 16 <= width <= 256:
            return f"{letter} = {width} is not from 16 to 256"
    return triton_refusal(q, k, v, state, named=named)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    whole: bool = True,
) -> None:
    """Raises ValueError where the arguments of `lightning_attention`, on one device, do not fit
    each other.

    whole: cu_seqlens speaks of these tokens, not of a longer row that several processes share.
    """
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q and k must be [B, T, H, K] and v [B, T, H, V]; got {_shape(q)}, {_shape(k)} and "
            f"{_shape(v)}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ValueError(
            f"q, k and v must share a floating dtype; got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    rows, _, heads, width = q.shape
    check_decay(log_decay, heads)
    if cu_seqlens is not None and whole:
        _check_bounds(cu_seqlens, rows, q.shape[1])
        rows = len(cu_seqlens) - 1
    if state is not None and state.shape != (rows, heads, width, v.shape[3]):
        raise ValueError(f"state must be {[rows, heads, width, v.shape[3]]}; got {_shape(state)}")


def _check_devices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_devices(
        "lightning_attention",
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        state=state,
        cu_seqlens=cu_seqlens,
    )


def _check_slots(slots: Tensor, q: Tensor, v: Tensor, state: Tensor) -> None:
    rows, _, heads, width = q.shape
    if slots.shape != (rows,) or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots must be [{rows}] integers, one a row; got {_shape(slots)} {slots.dtype}"
        )
    if state.dim() != 4 or state.shape[1:] != (heads, width, v.shape[3]):
        raise ValueError(
            f"state must be [N, {heads}, {width}, {v.shape[3]}] where slots are given; got "
            f"{_shape(state)}"
        )
    if slots.is_cpu and not torch.compiler.is_compiling():
        taken = [slot for slot in slots.tolist() if slot != -1]
        if len({*taken}) < len(taken) or not all(0 <= slot < len(state) for slot in taken):
            raise ValueError(
                f"slots must be -1, or different numbers below N = {len(state)}; got "
                f"{slots.tolist()}"
            )


def _check_bounds(cu_seqlens: Tensor, rows: int, length: int) -> None:
    if (
        rows != 1
        or cu_seqlens.dim() != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.dtype.is_floating_point
    ):
        raise ValueError(
            f"cu_seqlens must be [N + 1] integers over one row (B = 1); got {_shape(cu_seqlens)}, "
            f"B = {rows}"
        )
    if cu_seqlens.is_cpu and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {length}; got {bounds}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
