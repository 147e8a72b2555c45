"""Linear attention with a decay of each token's own: the recurrence, whole, packed, by steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from transnormer.ops.gated_decay import gated_decay_attention, gated_decay_step_
from transnormer.ops.lightning import lightning_attention


def drawn(rows: int, length: int) -> tuple[torch.Tensor, ...]:
    q, k = (torch.randn(rows, length, 2, 5, dtype=torch.float64) for _ in range(2))
    v = torch.randn(rows, length, 2, 3, dtype=torch.float64)
    return q, k, v, -(torch.rand(rows, length, 2, dtype=torch.float64) ** 3)


def replacing(rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """The same for the delta rule: keys of length 1, and what each token replaces."""
    q, k, v, log_decay = drawn(rows, length)
    return q, F.normalize(k, dim=-1), v, log_decay, torch.rand_like(log_decay)


def recurrence(q, k, v, log_decay, state, replaced=None):
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t].exp()[..., None, None] * state
        value = v[:, t]
        if replaced is not None:
            recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            value = replaced[:, t, :, None] * (value - recalled)
        state = state + k[:, t, :, :, None] * value[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("draw", [drawn, replacing])
@pytest.mark.parametrize("length", [1, 5, 64, 150])
def test_chunks_are_the_recurrence(length: int, draw: Callable[..., Any]) -> None:
    inputs = [x.requires_grad_() for x in draw(2, length)]
    state = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    q, k, v, log_decay, *replaced = inputs
    found = gated_decay_attention(q, k, v, log_decay, state, None, *replaced)
    wanted = recurrence(q, k, v, log_decay, state, *replaced)
    for part, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(part, other)
    weights = [torch.randn_like(part) for part in wanted]
    gradients = (torch.autograd.grad(each, [*inputs, state], weights) for each in (found, wanted))
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("keys", [1, 2, 600])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 2.5e-2)])
def test_repeated_keys_and_strong_decays_lose_little(
    keys: int, dtype: torch.dtype, most: float
) -> None:
    q, k, v, _, _ = (x.to(dtype).double() for x in replacing(1, 300))
    k = k[:, torch.arange(300) % keys]
    log_decay = torch.full((1, 300, 2), -0.01, dtype=torch.float64)
    log_decay[:, 20:52] = -1_000.0  # after which small ones must not be lost
    replaced = torch.ones_like(log_decay)
    state = torch.zeros(1, 2, 5, 3, dtype=torch.float64)
    wanted, after = recurrence(q, k, v, log_decay, state, replaced)
    low = (x.to(dtype) for x in (q, k, v))
    found, end = gated_decay_attention(*low, log_decay.float(), None, None, replaced.float())
    for part, exact in ((found, wanted), (end, after)):
        assert (part - exact).norm() < most * exact.norm()


def test_with_one_decay_for_all_tokens_it_is_lightning_attention() -> None:
    q, k, v, _ = drawn(2, 100)
    fixed = torch.tensor([-0.5, -0.01], dtype=torch.float64)
    found, state = gated_decay_attention(q, k, v, fixed.expand(2, 100, 2))
    wanted, end = lightning_attention(q, k, v, fixed, return_state=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state, end)


def test_packed_sequences_are_each_alone() -> None:
    inputs, bounds = replacing(1, 90), torch.tensor([0, 70, 70, 90])
    state = torch.randn(3, 2, 5, 3, dtype=torch.float64)
    *inputs, replaced = inputs
    found, after = gated_decay_attention(*inputs, state, bounds, replaced)
    for n, part in enumerate((slice(0, 70), slice(70, 90))):
        row = 2 * n
        own = [x[:, part] for x in inputs]
        alone = gated_decay_attention(*own, state[row : row + 1], None, replaced[:, part])
        torch.testing.assert_close(found[:, part], alone[0])
        torch.testing.assert_close(after[row : row + 1], alone[1])
    assert torch.equal(after[1], state[1])


@pytest.mark.parametrize("draw", [drawn, replacing])
def test_a_step_moves_the_named_slots_alone(draw: Callable[..., Any]) -> None:
    q, k, v, log_decay, *replaced = draw(3, 1)
    state = torch.randn(4, 2, 5, 3, dtype=torch.float64)
    before = state.clone()
    slots = torch.tensor([2, -1, 0])
    output = gated_decay_step_(q, k, v, log_decay, state, slots, *replaced)
    wanted, after = recurrence(q, k, v, log_decay, before[[2, 0, 0]], *replaced)
    torch.testing.assert_close(output[[0, 2]], wanted[[0, 2]])
    torch.testing.assert_close(state[[2, 0]], after[[0, 2]])
    assert torch.equal(state[[1, 3]], before[[1, 3]])


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v, _ = drawn(1, 4)
    with pytest.raises(ValueError, match=r"log_decay must be \[1, 4, 2\]"):
        gated_decay_attention(q, k, v, torch.zeros(2))
    with pytest.raises(ValueError, match=r"replaced must be \[1, 4, 2\]"):
        gated_decay_attention(q, k, v, torch.zeros(1, 4, 2), replaced=torch.zeros(4, 2))
    for bounds in ([0, 3], [0], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to T = 4"):
            gated_decay_attention(q, k, v, torch.zeros(1, 4, 2), None, torch.tensor(bounds))
    empty = gated_decay_attention(*(x[:, :0] for x in drawn(2, 3)))
    assert empty[0].shape == (2, 0, 2, 3)
    assert not empty[1].any()
