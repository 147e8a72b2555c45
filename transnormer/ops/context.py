"""Lightning Attention on a row whose tokens several processes share: context parallelism, exact at
any length.

Process r of R holds tokens [r T, (r + 1) T) of every row. With lambda = exp(log_decay), its own
tokens leave at its end

    S_r = sum over its t of lambda^(T - 1 - t) k_t^T v_t        (from a zero state)

and what it has to begin with is P_r = sum over j < r of lambda^((r - 1 - j) T) S_j. So all S_j, and
how much of a state each segment lets through, are gathered, [B, H, K, V] floats from each whatever
T is; then the segment is walked as ever, from P_r. Backward is the same from right to left: the
gradient of P_r, summed over its own tokens, is gathered, and the decayed sum of the later ones is
the gradient of the state that leaves r. (The idea is LASP-2's, arXiv 2502.07563.)

Costs a token and head beside the op's own: 2 K V FLOPs each way, and one more read of k and v, or
of q and d_output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import lightning_torch
from .collectives import all_gather, group_of, name_of
from .decay import finite
from .register import define, define_backward


@dataclass(frozen=True)
class Context:
    """The processes that share each row's tokens: this one holds the segment `rank` of `ranks`."""

    rank: int
    ranks: int
    group: str  # the process group's name (collectives.py)

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Context:
        """Ranks in the group's order hold segments in the row's."""
        return cls(group.rank(), group.size(), name_of(group))


def attend_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    context: Context,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(output [B, T, H, V], state after this segment [B or N, H, K, V]) of this process' T tokens
    of each row.

    q, k: [B, T, H, K]; v: [B, T, H, V]; T alike on all. cu_seqlens: [N + 1], of the whole row of R
        T tokens.
    backend: "triton" or "torch", as `lightning_attention` chose. The state's gradient does not
    flow."""
    arguments = (
        q,
        k,
        v,
        log_decay,
        cu_seqlens,
        backend,
        context.rank,
        context.ranks,
        context.group,
    )
    output, last, *_ = _segment(*arguments)
    return output, last


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    rank: int,
    ranks: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, last state; for the backward: the first state, and what each segment lets through of
    a state [R, H])."""
    edges = _Edges(q, cu_seqlens, rank)
    through = (finite(log_decay) * q.shape[1]).exp().to(lightning_torch.work_dtype(q))
    if edges.through is not None:
        through = through * edges.through
    sums, through = _gather(
        _weighted_sum(k, v, log_decay, edges, backend, to_end=True), through, ranks, group
    )
    state = edges.place(_carried(sums, through, range(rank)), incoming=True)
    if backend == "triton":
        from . import lightning_triton

        output, last = lightning_triton.forward(q, k, v, log_decay, state, edges.bounds)
    else:
        output, last = lightning_torch.chunked(
            q, k, v, log_decay, state, edges.bounds, lightning_torch.CHUNK
        )
    return output, last, state, through


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    rank: int,
    ranks: int,
    group: str,
    state: Tensor,
    through: Tensor,
    d_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    edges = _Edges(q, cu_seqlens, rank)
    own = _weighted_sum(q, d_output, log_decay, edges, backend, to_end=False)
    sums, _ = _gather(own, through[rank], ranks, group)
    d_last = edges.place(_carried(sums, through, range(ranks - 1, rank, -1)), incoming=False)
    if backend == "triton":
        from . import lightning_triton

        found = lightning_triton.backward(q, k, v, log_decay, state, edges.bounds, d_output, d_last)
    else:
        found = lightning_torch.chunked_backward(
            q, k, v, log_decay, state, edges.bounds, lightning_torch.CHUNK, d_output, d_last
        )
    return found[0], found[1], found[2]


class _Edges:
    """Which sequence goes on across each edge of this segment, if one does. Nothing is read on the
    host.

    bounds: [N + 1] of the sequences within the segment, None where rows are not packed.
    through: 1 where a sequence spans the whole segment, 0 where a border cuts what is carried; None
    if not packed."""

    def __init__(self, q: Tensor, cu_seqlens: Tensor | None, rank: int) -> None:
        self._length = q.shape[1]
        self.bounds = self.through = None
        if cu_seqlens is None:
            return
        cu, start = cu_seqlens.to(torch.int64), rank * self._length
        stop = start + self._length
        self.bounds = (cu - start).clamp(0, self._length)  # most sequences are empty here
        edges = torch.arange(start, stop + 1, self._length, device=cu.device)
        # that own the token after each edge
        first, last = torch.searchsorted(cu, edges, right=True) - 1
        sequence = torch.arange(len(cu) - 1, device=cu.device)
        self._enters = (sequence == first) & (cu[first] < start)
        self._leaves = (sequence == last) & (cu[last] < stop)
        self._enters_until = torch.where(cu[first] < start, self.bounds[first + 1], 0)
        self._leaves_from = self.bounds[last]  # the length, where none does
        self.through = cu[last] <= start

    def window(self, *, to_end: bool) -> Tensor | None:
        """[2]: from which token on, and up to which, tokens are of the sequence that crosses the
        end or the start."""
        if self.bounds is None:
            return None
        if to_end:
            return torch.stack(
                [self._leaves_from, torch.full_like(self._leaves_from, self._length)]
            )
        return torch.stack([torch.zeros_like(self._enters_until), self._enters_until])

    def place(self, state: Tensor, *, incoming: bool) -> Tensor:
        """The carried state as [B, H, K, V], or in the row of [N, H, K, V] whose sequence crosses
        the edge."""
        if self.bounds is None:
            return state
        return state * (self._enters if incoming else self._leaves)[:, None, None, None]


def _weighted_sum(
    a: Tensor, b: Tensor, log_decay: Tensor, edges: _Edges, backend: str, *, to_end: bool
) -> Tensor:
    """sum over t of weight_t a_t^T b_t, [B, H, K, V], over the sequence that crosses an edge, in at
    least float32.

    The weight is what is left of a token at the end, lambda^(T-1-t), or at it of the first state,
    lambda^(t+1)."""
    window = edges.window(to_end=to_end)
    if backend == "triton":
        from .context_triton import weighted_sum

        return weighted_sum(a, b, log_decay, window, to_end)
    work = lightning_torch.work_dtype(a)
    t = torch.arange(a.shape[1], device=a.device)
    away = a.shape[1] - 1 - t if to_end else t + 1
    weights = (away[:, None] * finite(log_decay)).exp()  # [T, H]
    if window is not None:
        weights = weights * ((t >= window[0]) & (t < window[1]))[:, None]
    return torch.einsum("bthk,bthv->bhkv", a.to(work), b.to(work) * weights.to(work).unsqueeze(-1))


def _gather(state: Tensor, through: Tensor, ranks: int, group: str) -> tuple[Tensor, Tensor]:
    """Everybody's, in order: [R, B, H, K, V] and [R, H], in one exchange."""
    mine = torch.cat([state.flatten(), through])
    everybody = mine.new_empty(ranks * mine.numel())
    all_gather(everybody, mine, group=group_of(group))
    states, through = everybody.view(ranks, -1).split([state.numel(), through.numel()], dim=1)
    return states.unflatten(1, state.shape), through.contiguous()


def _carried(states: Tensor, through: Tensor, order: range) -> Tensor:
    """[B, H, K, V]: of states [R, B, H, K, V] those of `order`, each decayed by all that come later
    in it; else zero."""
    if not order:
        return torch.zeros_like(states[0])
    carried = states[order[0]].clone()
    for n in order[1:]:  # a launch each: a product of all of them takes ten
        carried = torch.addcmul(states[n], carried, through[n, :, None, None])
    return carried


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, cu_seqlens, *ctx.rest = inputs
    _, last, state, through = output
    ctx.mark_non_differentiable(last, state, through)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_decay, cu_seqlens, state, through)


def _differentiate(ctx: Any, d_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, cu_seqlens, state, through = ctx.saved_tensors
    if d_output is None:  # the others wait for the exchange all the same
        d_output = torch.zeros_like(v)
    arguments = (q, k, v, log_decay, cu_seqlens, *ctx.rest, state, through, d_output)
    return *_segment_backward(*arguments), *[None] * 6


# One op, exchange and all: nothing of it need be seen by the compiler, nor done where only shapes
# are wanted.


def _fake(q, k, v, log_decay, cu_seqlens, backend, rank, ranks, group):  # type: ignore[no-untyped-def]
    work = lightning_torch.work_dtype(q)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty((sequences, q.shape[2], q.shape[3], v.shape[3]), dtype=work)
    output = torch.empty_like(v, memory_format=torch.contiguous_format)
    return output, state, torch.empty_like(state), q.new_empty((ranks, q.shape[2]), dtype=work)


def _fake_backward(q, k, v, *_):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? cu_seqlens, str backend, int rank, "
    "int ranks, str group"
)
_segment = define(
    "lightning_segment",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    save_for_backward=_save_for_backward,
    differentiate=_differentiate,
)
_segment_backward = define_backward(
    "lightning_segment_backward",
    f"({_INPUTS}, Tensor state, Tensor through, Tensor d_output) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    op="lightning_attention",
    instead="without a context those of backend='reference'",
)
