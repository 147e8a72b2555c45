"""Swish and LRPE: the property that gives it its name, and the kernels against float64."""

from __future__ import annotations

import pytest
import torch

from transnormer.ops.lrpe import lrpe, swish_lrpe

INPUTS = ("q", "k", "theta")


def draw(rows=2, length=40, heads=3, width=20, dtype=torch.float32, start=0, device="cpu"):
    """q, k, theta, positions and the results' gradients."""
    q, k = (torch.randn(rows, length, heads, width).to(dtype).to(device) for _ in range(2))
    theta = 10_000 ** -torch.rand(heads, width, device=device)
    gradients = [torch.randn(rows, length, heads, 2 * width).to(dtype).to(device) for _ in range(2)]
    return [q, k, theta], start + torch.arange(length, device=device), gradients


def both(inputs, positions, gradients, **options):
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = swish_lrpe(*leaves, positions, **options)
    return *(x.detach() for x in results), *torch.autograd.grad(results, leaves, gradients)


def test_scores_depend_on_the_distance_alone():
    (q, k, theta), positions, _ = draw(rows=1, length=1)
    for start in (0, 7, 1_000_000):
        here = lrpe(q, theta, positions + start + 5), lrpe(k, theta, positions + start)
        found = (here[0] * here[1]).sum(-1)
        torch.testing.assert_close(found, (q * k * (5 * theta).cos()).sum(-1), rtol=1e-5, atol=1e-5)


def test_gradcheck():
    (q, k, theta), positions, _ = draw(rows=1, length=3, heads=1, width=2)
    leaves = [x.double().requires_grad_() for x in (q, k, theta)]
    assert torch.autograd.gradcheck(lambda *x: swish_lrpe(*x, positions), leaves)


class TestTriton:
    """In Triton's interpreter where there is no GPU."""

    @pytest.fixture(autouse=True)
    def device(self):
        launch = pytest.importorskip("transnormer.ops.launch_triton")
        if not torch.cuda.is_available() and not launch.INTERPRETED:
            pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
        return "cpu" if launch.INTERPRETED else "cuda"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(("width", "start"), [(16, 0), (20, 3), (128, 1_000_000)])
    def test_error_is_at_most_twice_that_of_plain_torch(self, width, start, dtype, device):
        inputs, positions, gradients = draw(width=width, start=start, dtype=dtype, device=device)
        # interpreted, bfloat16 is cut, not rounded
        factor = 4 if device == "cpu" and dtype == torch.bfloat16 else 2
        found = both(inputs, positions, gradients, backend="triton")
        plain = both(inputs, positions, gradients, backend="torch")
        true = both([x.double() for x in inputs], positions, [x.double() for x in gradients])
        for ours, usual, exact in zip(found, plain, true, strict=True):
            assert ours.dtype == usual.dtype
            error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, usual))
            assert error <= factor * max(allowed, torch.finfo(torch.float32).eps)

    @pytest.mark.usefixtures("poisoned")
    def test_every_element_is_written_and_again_the_same(self, device):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs, positions, gradients = draw(length=35, dtype=dtype, device=device)
            results = (both(inputs, positions, gradients, backend="triton") for _ in range(2))
            for found, again in zip(*results, strict=True):
                assert found.isfinite().all()
                assert torch.equal(found, again)

    def test_strides_and_rows_with_places_of_their_own(self, device):
        inputs, positions, gradients = draw(length=35, device=device)
        positions = torch.stack([positions, positions + 1000])
        want = both(inputs, positions, gradients, backend="torch")
        inputs[:2] = torch.stack(inputs[:2], -2).unbind(-2)
        gradients = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in gradients]
        for found, wanted in zip(
            both(inputs, positions, gradients, backend="triton"), want, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    def test_compile_passes_through_and_nothing_gives_nothing(self, device):
        inputs, positions, gradients = draw(length=5, device=device)
        compiled = torch.compile(
            lambda *x: swish_lrpe(*x, positions, backend="triton"),
            fullgraph=True,
            backend="aot_eager",
        )
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(compiled(*leaves), leaves, gradients)
        for a, b in zip(
            found, both(inputs, positions, gradients, backend="triton")[2:], strict=True
        ):
            assert torch.equal(a, b)
        inputs, positions, gradients = draw(length=0, device=device)
        assert torch.equal(
            both(inputs, positions, gradients, backend="triton")[-1], torch.zeros_like(inputs[2])
        )

    def test_registration(self, device):
        from transnormer.ops import lrpe_triton  # noqa: F401

        (q, k, theta), positions, gradients = draw(length=5, width=4, device=device)
        leaves = [x.clone().requires_grad_() for x in (q, k, theta)]
        torch.library.opcheck(torch.ops.transnormer.swish_lrpe, (*leaves, positions))
        torch.library.opcheck(
            torch.ops.transnormer.swish_lrpe_backward, (q, k, theta, positions, *gradients)
        )
