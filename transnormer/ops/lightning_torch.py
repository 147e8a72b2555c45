"""Lightning Attention in plain torch: quadratic inside chunks, the state carried between them, and
one token by itself. Each is an op of its own, so that torch.compile passes through it.

Shapes and dtypes are those of `lightning_attention` (lightning.py), which has checked them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .decay import finite
from .register import define, define_backward, without_autocast

CHUNK = 64  # tokens, the measured best


@without_autocast
def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    work = work_dtype(q)
    qt, kt, vt = (x.squeeze(1).to(work) for x in (q, k, v))
    s = kt.unsqueeze(-1) * vt.unsqueeze(-2)
    if state is not None:
        s = s + log_decay.to(work).exp()[:, None, None] * state.to(work)
    return (qt.unsqueeze(-2) @ s).transpose(1, 2).to(v.dtype), s


def work_dtype(x: Tensor) -> torch.dtype:
    """States and sums are float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def first_state(q: Tensor, v: Tensor, state: Tensor | None, work: torch.dtype) -> Tensor:
    """[B, H, K, V] in the work dtype: the given state, or zeros."""
    if state is not None:
        return state.to(work)
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=work)


def decay_mask(log_decay: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[H, T, T]: lambda^(i-j) where i >= j, else 0."""
    index = torch.arange(length, device=log_decay.device, dtype=torch.float64)
    distance = index[:, None] - index[None, :]
    return (finite(log_decay)[:, None, None] * distance.clamp(min=0)).exp().tril().to(dtype)


# The chunked form: two walks over the chunks.


class _Powers:
    """Powers of the decay for chunks of up to C tokens, heads last repeated for B rows: only
    exponents <= 0."""

    def __init__(self, log_decay: Tensor, rows: int, chunk: int, work: torch.dtype):
        exponents = torch.arange(chunk + 1, device=log_decay.device, dtype=torch.float64)
        # [H, C + 1]: lambda^0 .. lambda^C
        powers = (finite(log_decay)[:, None] * exponents).exp().to(work)
        self._rows = rows
        self._mask = decay_mask(log_decay, chunk, work)  # [H, C, C]: lambda^(i-j) where i >= j
        self._powers = powers.repeat(rows, 1).unsqueeze(-1)  # [B*H, C + 1, 1]

    def mask(self, scores: Tensor) -> Tensor:
        """scores [B*H, c, c] times the causal decay, in place."""
        c = scores.shape[-1]
        scores.view(self._rows, self._mask.shape[0], c, c).mul_(self._mask[:, :c, :c])
        return scores

    def since_start(self, c: int) -> Tensor:
        """[B*H, c, 1]: what is left of the incoming state when token i reads it, lambda^(i+1)."""
        return self._powers[:, 1 : c + 1]

    def until_end(self, c: int) -> Tensor:
        """[B*H, c, 1]: what is left of token j at the chunk's end, lambda^(c-1-j)."""
        return self._powers[:, :c].flip(1)

    def whole(self, c: int) -> Tensor:
        """[B*H, 1, 1]: what is left of the incoming state at the chunk's end, lambda^c."""
        return self._powers[:, c : c + 1]


def _chunks(length: int, cu_seqlens: Tensor | None, chunk: int) -> list[tuple[int, int, int]]:
    """(number of the sequence, first token, one past the last) of every chunk in order."""
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    return [
        (n, start, min(start + chunk, stop))
        for n, (first, stop) in enumerate(itertools.pairwise(bounds))
        for start in range(first, stop, chunk)
    ]


def _by_head(x: Tensor, work: torch.dtype) -> Tensor:
    """[B, T, H, K] -> contiguous [B*H, T, K]."""
    return x.transpose(1, 2).to(work).contiguous().flatten(0, 1)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """[B*H, T, K] -> contiguous [B, T, H, K] in the dtype of `like`."""
    return (
        x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).to(like.dtype).contiguous()
    )


def _states(
    q: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, work: torch.dtype
) -> list[Tensor]:
    """The incoming state of every sequence, each [B*H, K, V] (B = 1 where packed)."""
    if cu_seqlens is None:
        return [first_state(q, v, state, work).flatten(0, 1)]
    if state is not None:
        return list(state.to(work))
    return [
        q.new_zeros(q.shape[2], q.shape[3], v.shape[3], dtype=work)
        for _ in range(len(cu_seqlens) - 1)
    ]


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    work, rows = work_dtype(q), q.shape[0]
    chunks = _chunks(q.shape[1], cu_seqlens, chunk)
    power = _Powers(log_decay, rows, chunk, work)
    states = _states(q, v, state, cu_seqlens, work)
    q3, k3, v3 = (_by_head(x, work) for x in (q, k, v))
    output = torch.empty_like(v3)
    for n, start, stop in chunks:
        c = stop - start
        qc, kc, vc = (x[:, start:stop] for x in (q3, k3, v3))  # [B*H, c, .]
        inside = power.mask(qc @ kc.mT) @ vc
        output[:, start:stop] = torch.baddbmm(inside, qc * power.since_start(c), states[n])
        states[n] = torch.baddbmm(states[n] * power.whole(c), (kc * power.until_end(c)).mT, vc)
    last = (
        torch.stack(states)
        if cu_seqlens is not None
        else states[0].unflatten(0, (rows, q.shape[2]))
    )
    # an op may not return its own input, and FSDP warns of views
    return _by_token(output, v), last.clone()


def _fake_chunked(q, k, v, log_decay, state, cu_seqlens, chunk):  # type: ignore[no-untyped-def]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return torch.empty_like(v, memory_format=torch.contiguous_format), q.new_empty(
        shape, dtype=work_dtype(q)
    )


def _chunked_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    d_output: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the incoming state [B or N, H, K, V]; the states are walked anew,
    not stored."""
    work, rows = work_dtype(q), q.shape[0]
    chunks = _chunks(q.shape[1], cu_seqlens, chunk)
    power = _Powers(log_decay, rows, chunk, work)
    states = _states(q, v, state, cu_seqlens, work)
    d_states = _states(q, v, d_last, cu_seqlens, work)
    q3, k3, v3, g3 = (_by_head(x, work) for x in (q, k, v, d_output))
    dq, dk, dv = (torch.empty_like(x) for x in (q3, k3, v3))
    for n, start, stop in chunks:  # dq needs the states from the left
        c = stop - start
        kc, vc, gc = (x[:, start:stop] for x in (k3, v3, g3))
        inside = power.mask(gc @ vc.mT) @ kc
        dq[:, start:stop] = torch.baddbmm(inside, gc * power.since_start(c), states[n].mT)
        states[n] = torch.baddbmm(states[n] * power.whole(c), (kc * power.until_end(c)).mT, vc)
    for n, start, stop in reversed(chunks):  # dk and dv need the states' gradients from the right
        c = stop - start
        qc, kc, vc, gc = (x[:, start:stop] for x in (q3, k3, v3, g3))
        left = power.until_end(c)
        dk[:, start:stop] = torch.baddbmm(power.mask(gc @ vc.mT).mT @ qc, vc * left, d_states[n].mT)
        dv[:, start:stop] = torch.baddbmm(power.mask(qc @ kc.mT).mT @ gc, kc * left, d_states[n])
        d_states[n] = torch.baddbmm(
            d_states[n] * power.whole(c), (qc * power.since_start(c)).mT, gc
        )
    d_state = (
        torch.stack(d_states)
        if cu_seqlens is not None
        else d_states[0].unflatten(0, (rows, q.shape[2]))
    )
    return (
        _by_token(dq, q),
        _by_token(dk, k),
        _by_token(dv, v),
        d_state.clone() if not chunks else d_state,
    )


def _fake_chunked_backward(q, k, v, log_decay, state, cu_seqlens, chunk, d_output, d_last):  # type: ignore[no-untyped-def]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_state = q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=work_dtype(q))
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), d_state


def _save_for_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_output, d_last):  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, cu_seqlens = ctx.saved_tensors
    if d_output is None:
        d_output = torch.zeros_like(v)
    dq, dk, dv, d_state = chunked_backward(
        q, k, v, log_decay, state, cu_seqlens, ctx.chunk, d_output, d_last
    )
    return dq, dk, dv, None, None if state is None else d_state.to(state.dtype), None, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? state, Tensor? cu_seqlens, int chunk"
)
chunked = define(
    "lightning_chunked",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    _chunked,
    _fake_chunked,
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
)
chunked_backward = define_backward(
    "lightning_chunked_backward",
    f"({_INPUTS}, Tensor d_output, Tensor? d_last) -> (Tensor, Tensor, Tensor, Tensor)",
    _chunked_backward,
    _fake_chunked_backward,
    op="lightning_attention",
    instead="those of backend='reference'",
)


def put_(state: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows [S, ...] to the slots [S] of state [N, ...] that are theirs; those of slot -1 are
    written nowhere."""
    rows = rows.to(state.dtype)
    if slots.is_cpu:
        owned = slots >= 0
        state[slots[owned]] = rows[owned]
        return
    # A GPU is not waited for: each slot looks for the row that owns it, and a slot more takes the
    # rows without one.
    owner = slots.new_full((len(state) + 1,), -1, dtype=torch.int64)
    owner[slots.to(torch.int64)] = torch.arange(len(slots), device=slots.device)
    owned = (owner[:-1] >= 0).view(-1, *[1] * (state.dim() - 1))
    state.copy_(rows[owner[:-1].clamp(min=0)].where(owned, state))
