"""SimpleRMSNorm: equation 14 and its gradient."""

from __future__ import annotations

import pytest
import torch

from transnormer.ops import simple_rms_norm


def formula(x, eps=1e-6):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 5, 33), (0, 4)])
def test_formula_and_gradient(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    found = simple_rms_norm(x)
    torch.testing.assert_close(found, formula(x))
    gradient = torch.randn_like(found)
    ours, want = (torch.autograd.grad(y, x, gradient)[0] for y in (found, formula(x)))
    torch.testing.assert_close(ours, want)


def test_gradcheck():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: simple_rms_norm(x, 1e-3), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_a_rounding_or_two(dtype):
    x = (30 * torch.randn(64, 300)).to(dtype)
    found = simple_rms_norm(x)
    assert found.dtype == dtype
    assert (
        (found.double() - formula(x)).abs() <= 2 * torch.finfo(dtype).eps * formula(x).abs()
    ).all()


def test_large_values_in_half_precision_do_not_overflow():
    x = torch.full((2, 8), 60_000.0, dtype=torch.float16)
    torch.testing.assert_close(simple_rms_norm(x), torch.ones_like(x))


def test_zeros_give_zeros_and_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = simple_rms_norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad.isfinite().all()


def test_scale_of_the_input_does_not_matter():
    x = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(simple_rms_norm(1000 * x, 0.0), simple_rms_norm(x, 0.0))
