"""Linear attention whose decay each token sets for itself, and the delta rule: trials in plain
torch, without kernels.

    S_t = exp(a_t) S_(t-1) + k_t^T v_t,    o_t = q_t S_t,    a_t <= 0 for each head and token

In chunks of C tokens, with c the running sum of a inside the chunk: a token reads the tokens of its
chunk with weight exp(c_i - c_j), and the state before the chunk with weight exp(c_i).

By the delta rule (Schlag et al. 2021, Yang et al. 2024) a token does not add its value to what
the state holds for its key. It replaces a part b_t, from 0 to 1, of what the state holds. Keys must
have length 1 for that:

    S_t = exp(a_t) S_(t-1) + k_t^T u_t,    u_t = b_t (v_t - k_t exp(a_t) S_(t-1))

The u of a chunk solve a triangular system: u_i = b_i (v_i - exp(c_i) k_i S - sum over j < i of
exp(c_i - c_j) (k_i . k_j) u_j), where S is the state before the chunk."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay import STRONGEST
from .dispatch import check_devices
from .lightning_torch import CHUNK, first_state, put_, work_dtype


def gated_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    replaced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], the state after the last token [B or N, H, K, V]).

    q, k: [B, T, H, K]; v: [B, T, H, V]. log_decay: [B, T, H], real numbers up to 0. state: [B or N,
    H, K, V]; None: zeros. cu_seqlens: [N + 1], where the one row holds N sequences; it is read on
    the host. replaced: [B, T, H], b of the delta rule, from 0 to 1, with keys of length 1; None:
    values are added. Products, and what a chunk adds to the state, are rounded to v's dtype or
    autocast's; the state is kept in at least float32. Raises ValueError where shapes do not fit."""
    check_devices(
        "gated_decay_attention",
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        state=state,
        replaced=replaced,
    )
    for name, given in (("log_decay", log_decay), ("replaced", replaced)):
        if given is not None and given.shape != q.shape[:3]:
            raise ValueError(
                f"{name} must be {list(q.shape[:3])}, one number a token and head; got "
                f"{list(given.shape)}"
            )
    if cu_seqlens is None:
        return _rows(q, k, v, log_decay, replaced, state)
    outputs, states, bounds = [v[:, :0]], [], cu_seqlens.tolist()
    if len(q) != 1 or len(bounds) < 2 or bounds != sorted([0, *bounds[1:-1], q.shape[1]]):
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {q.shape[1]} in one row; got {bounds}"
        )
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        part = slice(start, stop)
        before = None if state is None else state[n : n + 1]
        own = None if replaced is None else replaced[:, part]
        output, after = _rows(q[:, part], k[:, part], v[:, part], log_decay[:, part], own, before)
        outputs.append(output)
        states.append(after)
    return torch.cat(outputs, dim=1), torch.cat(states)


def gated_decay_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor | None,
    replaced: Tensor | None = None,
) -> Tensor:
    """One token of each row, [S, 1, H, ...]: the state [N, H, K, V] of its slot moves on in place.

    slots: int64 [S], -1 for a row whose slot is none; None: row i is slot i. replaced: [S, 1, H],
    as `gated_decay_attention` takes it."""
    before = state if slots is None else state[slots.clamp(min=0)]
    before = before * log_decay[:, 0].to(state.dtype).exp()[..., None, None]
    key, value = k[:, 0].to(state.dtype).unsqueeze(-2), v[:, 0].to(state.dtype).unsqueeze(-2)
    if replaced is not None:
        value = (value - key @ before) * replaced[:, 0].to(state.dtype)[..., None, None]
    after = before + key.transpose(-1, -2) * value
    output = (q[:, 0].to(state.dtype).unsqueeze(-2) @ after).transpose(1, 2).to(v.dtype)
    if slots is None:
        state.copy_(after)
    else:
        put_(state, slots, after)
    return output


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    replaced: Tensor | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_decay_attention` of rows that hold one sequence each."""
    work, length = work_dtype(q), q.shape[1]
    s = first_state(q, v, state, work)
    if not length:
        return v, s
    chunk = min(CHUNK, 1 << (length - 1).bit_length())  # a power of two
    padding = -length % chunk

    def chunks(x: Tensor) -> Tensor:  # [B, chunks, H, C, ...]; a padded token adds nothing
        x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, padding))
        return x.unflatten(1, (-1, chunk)).transpose(2, 3)

    q, k, v = (chunks(x) for x in (q, k, v))
    # Sums in float64, because the difference of two large ones may be small.
    c = chunks(log_decay.double().clamp(min=STRONGEST)).cumsum(-1)
    last, faded = c[..., -1:], c.exp().to(work).unsqueeze(-1)  # [B, chunks, H, 1], [..., C, 1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(later, -torch.inf).exp().to(work)
    weighted = (k * (last - c).exp().unsqueeze(-1).to(k.dtype)).transpose(-1, -2)
    through = last.exp().to(work).unsqueeze(-1)
    if replaced is None:
        before, s = _states(s, through, (weighted @ v).to(work))
    else:
        values, keys = _replacing(k, v, between, faded, chunks(replaced.to(work)))
        before, v, s = _replaced_states(s, through, weighted, values, keys, v.dtype)
    scores = (q @ k.transpose(-1, -2)) * between
    inside = scores.to(v.dtype) @ v
    earlier = (q * faded.to(q.dtype)) @ before.to(q.dtype)
    return (inside + earlier).transpose(2, 3).flatten(1, 2)[:, :length], s


def _states(s: Tensor, through: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the chunks [B, chunks, H, K, V], and that after the last.

    through: what is left of a state after a chunk, [B, chunks, H, 1, 1]. sums: what it adds."""
    before = []
    for n in range(sums.shape[1]):
        before.append(s)
        s = s * through[:, n] + sums[:, n]
    return torch.stack(before, dim=1), s


def _replaced_states(
    s: Tensor, through: Tensor, weighted: Tensor, values: Tensor, keys: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_states`, for the delta rule; and its u [B, chunks, H, C, V], in `dtype`.

    weighted: the keys as the end of their chunk sees them, [B, chunks, H, K, C]. values, keys: as
    `_replacing` gives them. u is a difference, so it is computed in their dtype."""
    before, written = [], []
    for n in range(values.shape[1]):
        before.append(s)
        with torch.autocast(s.device.type, enabled=False):
            u = (values[:, n] - keys[:, n] @ s).to(dtype)
        written.append(u)
        s = s * through[:, n] + (weighted[:, n] @ u).to(s.dtype)
    return torch.stack(before, dim=1), torch.stack(written, dim=1), s


def _replacing(
    k: Tensor, v: Tensor, between: Tensor, faded: Tensor, replaced: Tensor
) -> tuple[Tensor, Tensor]:
    """(values [..., C, V], keys [..., C, K]): u of the delta rule is values - keys S, where S is
    the state before the chunk, and is linear in it.

    between: exp(c_i - c_j) [..., C, C]; faded: exp(c_i) [..., C, 1]; replaced: b [..., C]. All in
    at least float32, because where keys repeat, what is written nearly cancels."""
    b = replaced.unsqueeze(-1)
    with torch.autocast(k.device.type, enabled=False):
        wide = k.to(replaced.dtype)
        matrix = (b * (wide @ wide.transpose(-1, -2)) * between).tril(-1)
        solved = _unit_inverse(matrix) * b.transpose(-1, -2)
        return solved @ v.to(solved.dtype), (solved * faded.transpose(-1, -2)) @ wide


def _unit_inverse(below: Tensor) -> Tensor:
    """The inverse of I + below, by products alone, which a CUDA graph can hold.

    below [..., C, C] is zero but under its diagonal, and C is a power of two. From blocks of one
    number on, two blocks become one twice as large."""
    count, size = below.shape[-1], 1
    inverse = below.new_ones(*below.shape[:-2], count, 1, 1)  # [..., blocks, size, size]
    while size < count:
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        pairs = below.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
        between = pairs[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        left = torch.cat([first, -(second @ between @ first)], dim=-2)
        inverse = torch.cat([left, F.pad(second, (0, 0, size, 0))], dim=-1)
        size *= 2
    return inverse.squeeze(-3)
