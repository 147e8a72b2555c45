"""Linear attention whose decay each token sets for itself, in plain torch: a trial without kernels.

    S_t = exp(a_t) S_(t-1) + k_t^T v_t,    o_t = q_t S_t,    a_t <= 0 for each head and token

In chunks of C tokens, with c the running sum of a inside the chunk: a token reads the tokens of its
chunk with weight exp(c_i - c_j), and the state before the chunk with weight exp(c_i)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .decay import STRONGEST
from .dispatch import check_devices
from .lightning_torch import CHUNK, first_state, work_dtype


def gated_decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], the state after the last token [B or N, H, K, V]).

    q, k: [B, T, H, K]; v: [B, T, H, V]. log_decay: [B, T, H], real numbers up to 0. state: [B or N,
    H, K, V]; None: zeros. cu_seqlens: [N + 1], where the one row holds N sequences; it is read on
    the host. Products, and what a chunk adds to the state, are rounded to v's dtype or autocast's;
    the state is kept in at least float32. Raises ValueError where shapes do not fit."""
    check_devices("gated_decay_attention", q=q, k=k, v=v, log_decay=log_decay, state=state)
    if log_decay.shape != q.shape[:3]:
        raise ValueError(
            f"log_decay must be {list(q.shape[:3])}, one number a token and head; got "
            f"{list(log_decay.shape)}"
        )
    if cu_seqlens is None:
        return _rows(q, k, v, log_decay, state)
    outputs, states = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        part = slice(start, stop)
        before = None if state is None else state[n : n + 1]
        output, after = _rows(q[:, part], k[:, part], v[:, part], log_decay[:, part], before)
        outputs.append(output)
        states.append(after)
    return torch.cat(outputs, dim=1), torch.cat(states)


def gated_decay_step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, slots: Tensor | None
) -> Tensor:
    """One token of each row, [S, 1, H, ...]: the state [N, H, K, V] of its slot moves on in place.

    slots: int64 [S], -1 for a row whose slot is none; None: row i is slot i."""
    before = state if slots is None else state[slots.clamp(min=0)]
    kv = k[:, 0].to(state.dtype).unsqueeze(-1) * v[:, 0].to(state.dtype).unsqueeze(-2)
    after = before * log_decay[:, 0].to(state.dtype).exp()[..., None, None] + kv
    output = (q[:, 0].to(state.dtype).unsqueeze(-2) @ after).transpose(1, 2).to(v.dtype)
    if slots is None:
        state.copy_(after)
    else:
        # the row that owns each slot; a slot more takes the rows without one
        owner = slots.new_full((len(state) + 1,), -1)
        owner[slots] = torch.arange(len(slots), device=slots.device)
        owned = (owner[:-1] >= 0)[:, None, None, None]
        state.copy_(after[owner[:-1].clamp(min=0)].where(owned, state))
    return output


def _rows(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of rows that hold one sequence each."""
    work, length = work_dtype(q), q.shape[1]
    s = first_state(q, v, state, work)
    if not length:
        return v, s
    chunk = min(CHUNK, length)
    padding = -length % chunk

    def chunks(x: Tensor) -> Tensor:  # [B, chunks, C, H, ...]; a padded token adds nothing
        x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, padding))
        return x.unflatten(1, (-1, chunk))

    q, k, v = (chunks(x) for x in (q, k, v))
    c = chunks(log_decay.to(work).clamp(min=STRONGEST)).cumsum(2)
    last = c[:, :, -1]  # [B, chunks, H]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (c.unsqueeze(3) - c.unsqueeze(2)).masked_fill(later[:, :, None], -torch.inf)
    scores = torch.einsum("bnihk,bnjhk->bnijh", q, k) * between.exp()
    inside = torch.einsum("bnijh,bnjhv->bnihv", scores.to(v.dtype), v)
    weighted = k * (last.unsqueeze(2) - c).exp().unsqueeze(-1).to(k.dtype)
    sums = torch.einsum("bnjhk,bnjhv->bnhkv", weighted, v).to(work)
    through, before = last.exp()[..., None, None], []
    for n in range(sums.shape[1]):
        before.append(s)
        s = s * through[:, n] + sums[:, n]
    earlier = torch.einsum(
        "bnihk,bnhkv->bnihv",
        q * c.exp().unsqueeze(-1).to(q.dtype),
        torch.stack(before, dim=1).to(q.dtype),
    )
    return (inside + earlier).flatten(1, 2)[:, :length], s
