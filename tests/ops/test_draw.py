"""Drawing tokens: the shares in which they come, what filters leave, and the kernel beside the
sort."""

from __future__ import annotations

import pytest
import torch

from transnormer.ops.draw import draw

ALL = torch.iinfo(torch.int64).max


def settings(rows, temperature=1.0, top_k=ALL, top_p=1.0, min_p=0.0, uniform=None):
    def column(value, dtype=torch.float64):
        return torch.full((rows, 1), value, dtype=dtype)

    if uniform is None:
        uniform = torch.rand(rows, 1, dtype=torch.float64)
    return column(temperature), column(top_k, torch.int64), column(top_p), column(min_p), uniform


def test_tokens_come_in_their_shares():
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0]]).expand(20_000, -1)
    found = draw(logits, *settings(20_000, temperature=2.0)).bincount(minlength=4) / 20_000
    wanted = (logits[0].double() / 2).softmax(-1)
    torch.testing.assert_close(found.double(), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2, 3}),
        ({"min_p": 0.3, "top_k": 2}, {1, 2}),
        ({"temperature": 1e-40}, {1}),
    ],
)
def test_filters_leave_these(filters: dict, left: set):
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, -torch.inf]]).expand(40, -1)
    uniform = torch.linspace(0, 1 - 1e-9, 40, dtype=torch.float64)[:, None]
    found = draw(logits, *settings(40, uniform=uniform, **filters))
    assert {*found.tolist()} == left


def borders(logits, temperature, top_k, top_p, min_p, uniform, token):
    """How far outside of a token's own part of the whole sum `uniform` lies, as a share of it."""
    x = logits.double()
    x = ((x - x.amax(-1, keepdim=True)) / temperature.clamp(min=1e-30)).exp()
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices
    w = x.gather(-1, order)
    w = w.masked_fill(torch.arange(w.shape[-1]) >= top_k, 0)
    before = w.cumsum(-1) - w
    kept = (before < top_p * w.sum(-1, keepdim=True)) | (top_p >= 1)
    kept &= w >= min_p
    w = w.where(kept, 0)
    sums, target = w.cumsum(-1), uniform * w.sum(-1, keepdim=True)
    place = (order == token[:, None]).int().argmax(-1, keepdim=True)
    high, own = sums.gather(-1, place), w.gather(-1, place)
    outside = torch.maximum(high - own - target, target - high).clamp(min=0)
    return outside / w.sum(-1, keepdim=True)


HALF, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("filters", "dtype"),
    [
        ({}, HALF),
        ({"temperature": 0.3}, torch.float16),
        ({"temperature": 30.0}, HALF),
        ({"temperature": 0.0}, HALF),
        ({"top_p": 0.9}, WIDE),
        ({"top_p": 0.01}, HALF),
        ({"top_k": 1}, HALF),
        ({"top_k": 50, "top_p": 0.8}, HALF),
        ({"min_p": 0.05}, HALF),
        ({"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7}, HALF),
    ],
    ids=str,
)
def test_the_kernel_draws_what_the_sort_does(filters: dict, dtype: torch.dtype):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    rows, vocab = 8, 301
    logits = (3 * torch.randn(rows, vocab)).to(dtype)  # half precision has many equal ones
    logits[3] = 1.0
    logits[4, 5:] = -torch.inf
    logits[5, ::2] = -0.0
    given = settings(rows, **filters)
    found = draw(logits.to(device), *(x.to(device) for x in given), backend="triton").cpu()
    wanted = draw(logits, *given, backend="torch")
    assert (found == wanted).float().mean() >= 0.9
    assert borders(logits, *given, found).max() < 1e-5


def test_a_row_that_is_not_finite_ends():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.full((3, 20), torch.nan)
    logits[1], logits[2] = torch.inf, -torch.inf
    given = (x.to(device) for x in settings(3, top_p=0.5, top_k=3))
    found = draw(logits.to(device), *given, backend="triton")
    assert ((found >= 0) & (found < 20)).all()
