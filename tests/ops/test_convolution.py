"""The short convolution: torch's own, in pieces, packed, and on rows that processes share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transnormer.ops.convolution import short_convolution, short_convolution_step_


def drawn(rows: int, length: int, channels: int = 5, taps: int = 4) -> tuple[torch.Tensor, ...]:
    x = torch.randn(rows, length, channels, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(channels, taps, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 3, 9])
def test_it_is_a_depthwise_convolution_that_sees_nothing_later(length: int, taps: int) -> None:
    x, weight = drawn(2, length, taps=taps)
    y, last = short_convolution(x, weight)
    row = F.pad(x.transpose(1, 2), (taps - 1, 0))
    wanted = F.conv1d(row, weight.flip(1)[:, None], groups=5).transpose(1, 2) if length else x
    torch.testing.assert_close(y, wanted)
    assert torch.equal(last, row.transpose(1, 2)[:, length:])
    d_y = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), d_y)
    for gradient, other in zip(
        found, torch.autograd.grad(wanted, (x, weight), d_y, allow_unused=not length), strict=True
    ):
        if other is not None:
            torch.testing.assert_close(gradient, other)


def test_pieces_and_packed_sequences_are_the_whole() -> None:
    x, weight = drawn(2, 9)
    whole, end = short_convolution(x, weight)
    past, pieces = None, []
    for piece in x.split([1, 2, 6], dim=1):
        y, past = short_convolution(piece, weight, past)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(past, end)
    # three packed sequences, one of them empty, and their continuations
    row, bounds = torch.cat([x[0, :2], x[1, :5]])[None], torch.tensor([0, 2, 2, 7])
    y, past = short_convolution(row, weight, cu_seqlens=bounds)
    assert torch.equal(y[0], torch.cat([whole[0, :2], whole[1, :5]]))
    assert not past[1].any()
    row, bounds = torch.cat([x[0, 2:], x[1, 5:]])[None], torch.tensor([0, 7, 7, 11])
    y, past = short_convolution(row, weight, past, bounds)
    assert torch.equal(y[0], torch.cat([whole[0, 2:], whole[1, 5:]]))
    assert torch.equal(past[[0, 2]], end)
    d_y = torch.randn_like(y)
    assert all(map(torch.any, torch.autograd.grad(y, (x, weight), d_y)))


def test_places_keep_packed_sequences_apart() -> None:
    x, weight = drawn(1, 8)
    whole, _ = short_convolution(x, weight, cu_seqlens=torch.tensor([0, 5, 8]))
    places = torch.tensor([[3, 4, 0, 1, 2]])
    y, _ = short_convolution(x[:, 3:], weight, x[:, :3], positions=places)
    torch.testing.assert_close(y, whole[:, 3:])


def test_sums_of_bfloat16_are_rounded_once() -> None:
    x, weight = (part.detach().bfloat16() for part in drawn(2, 50))
    y, _ = short_convolution(x, weight)
    exact, _ = short_convolution(x.double(), weight.double())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_nothing_of_another_sequence_is_read_be_it_infinite() -> None:
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    x[0, 2] = torch.inf
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    y, _ = short_convolution(x, torch.ones(2, 4, dtype=torch.float64), positions=places)
    assert y[0, 3:].isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight = drawn(2, 3)
    with pytest.raises(ValueError, match=r"x must be \[B, T, 5\]; got \[2, 3, 4\]"):
        short_convolution(x[..., :4], weight)
    with pytest.raises(ValueError, match=r"past must be \[2, 3, 5\]; got \[1, 3, 5\]"):
        short_convolution(x, weight, x[:1])
    with pytest.raises(ValueError, match="all tensors must be on one device"):
        short_convolution(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"positions must be \[B or 1, T\] of x; got \[2\]"):
        short_convolution(x, weight, positions=torch.arange(2))
    for wrong in (weight[0], weight[:, :0]):
        with pytest.raises(ValueError, match=r"weight must be \[C, J\], J at least 1"):
            short_convolution(x, wrong)
    with pytest.raises(ValueError, match="got no number"):
        short_convolution(x[:1], weight, cu_seqlens=torch.tensor([], dtype=torch.int64))
    bounds = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="packed sequences stand in one row; got 2 rows"):
        short_convolution(x, weight, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="give one"):
        short_convolution(x[:1], weight, cu_seqlens=bounds, positions=torch.arange(3))
    with pytest.raises(ValueError, match=r"x must be \[S, 1, 5\]; got \[2, 3, 5\]"):
        short_convolution_step_(x, weight, x)
    with pytest.raises(ValueError, match=r"memory must be \[slots, 3, 5\]; got \[2, 1, 5\]"):
        short_convolution_step_(x[:, :1], weight, x[:, :1])
    with pytest.raises(ValueError, match="2 rows have no slot each in a memory of 1"):
        short_convolution_step_(x[:, :1], weight, x[:1])
    with pytest.raises(ValueError, match=r"slots must be \[2\], one a row; got \[3\]"):
        short_convolution_step_(x[:, :1], weight, x, bounds.repeat(2)[:3])
    with pytest.raises(ValueError, match="short_convolution_step_ has no gradient"):
        short_convolution_step_(x[:, :1], weight, x)


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_steps_in_place_are_the_whole(taps: int) -> None:
    x, weight = (part.detach() for part in drawn(2, 7, taps=taps))
    whole, last = short_convolution(x, weight)
    memory = torch.zeros(4, taps - 1, 5, dtype=torch.float64)
    slots = torch.tensor([2, -1])  # the second row has none
    steps = [short_convolution_step_(x[:, t : t + 1], weight, memory, slots) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=1)[0], whole[0])
    assert torch.equal(memory[2], last[0])
    assert not memory[:2].any()
