"""Hidden states, heads and targets for the tests of the loss, and what its results are compared
with."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from transnormer.ops import linear_cross_entropy

GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
HALF = [torch.bfloat16, torch.float16]


def draw(*shape, vocab=37, width=8, dtype=torch.float64, device=DEVICE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=generator).to(device, dtype)
    weight = torch.randn(vocab, width, generator=generator).to(device, dtype)
    targets = torch.randint(vocab, shape, generator=generator).to(device)
    return x.requires_grad_(), weight.requires_grad_(), targets


def whole(x, weight, targets, **options):
    """Everything at once in float64."""
    logits = x.double() @ weight.double().T
    value = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
    return value.view(targets.shape) if options.get("reduction") == "none" else value


def same(found, want):
    """To the precision of what was found."""
    torch.testing.assert_close(found, want.to(found.dtype))


def distance(found, true):
    assert found.isfinite().all()
    return ((found.double() - true.double()).norm() / true.double().norm().clamp(min=1e-300)).item()


def gradients(value, *leaves, factor=1, **options):
    return torch.autograd.grad(factor * value, leaves, **options)


def assert_error_is_at_most_twice_that_of_plain_torch(x, weight, targets, backend):
    # interpreted: cut, not rounded
    factor = 4 if backend == "triton" and not GPU and x.dtype == torch.bfloat16 else 2
    least = torch.finfo(torch.float32).eps  # of what is summed in float32

    def plain(**options):
        logits = F.linear(x, weight).flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), **options)

    each, usual, true = (
        linear_cross_entropy(x, weight, targets, reduction="none", backend=backend),
        plain(reduction="none").view(targets.shape),
        whole(x, weight, targets, reduction="none"),
    )
    assert each.dtype == torch.float32
    assert distance(each, true) <= factor * max(distance(usual, true), least)
    single = [
        (torch.linspace(-1, 2, x.shape[0], device=DEVICE) * value).sum()
        for value in (each, usual, true)
    ]
    means = (
        linear_cross_entropy(x, weight, targets, backend=backend),
        plain(),
        whole(x, weight, targets),
    )
    for values in (single, means):
        for ours, theirs, want in zip(
            *(gradients(value, x, weight) for value in values), strict=True
        ):
            assert ours.dtype == x.dtype
            assert distance(ours, want) <= factor * max(distance(theirs, want), least)
