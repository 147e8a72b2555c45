"""SimpleRMSNorm's Triton kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from transnormer.ops import add_rms_norm, dispatch, simple_rms_norm
from transnormer.ops.register import direct

launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
DEVICE = "cuda" if torch.cuda.is_available() and not launch_triton.INTERPRETED else "cpu"
if DEVICE == "cpu" and not launch_triton.INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


def draw(*shape, dtype=torch.float32):
    """An input and the gradient of its output."""
    return (3 * torch.randn(*shape, device=DEVICE)).to(dtype), torch.randn(
        *shape, device=DEVICE
    ).to(dtype)


def both(x, g, **options):
    leaf = x.detach().requires_grad_()
    y = simple_rms_norm(leaf, **options)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def assert_no_further(found, usual, true):
    """The error rule; two roundings of float32, in which both compute, always pass."""
    # interpreted, bfloat16 is cut, not rounded
    cut = DEVICE == "cpu" and found.dtype == torch.bfloat16
    factor, least = (4, 2.0**-9) if cut else (2, torch.finfo(torch.float32).eps)
    error, allowed = (((x.double() - true).norm() / true.norm()).item() for x in (found, usual))
    assert error <= factor * max(allowed, least), (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(7,), (3, 1), (2, 5, 33), (9, 128), (2, 1500), (300, 16), (2, 16_384)]
)
def test_error_is_at_most_twice_that_of_plain_torch(shape, dtype):
    x, g = draw(*shape, dtype=dtype)
    plain, true = both(x, g, backend="torch"), both(x.double(), g.double())
    for found, usual, exact in zip(both(x, g, backend="triton"), plain, true, strict=True):
        assert found.dtype == dtype
        assert_no_further(found, usual, exact)


def fused(x, g, d_sum, other, fusion, **options):
    """Results and gradients of a fused form."""
    leaves = [x.detach().requires_grad_(), other.detach().requires_grad_()]
    if fusion == "gate":
        y = simple_rms_norm(leaves[0], gate=leaves[1], **options)
        return y.detach(), *torch.autograd.grad(y, leaves, g)
    s, y = add_rms_norm(*leaves, **options)
    gradients = torch.autograd.grad((s, y), leaves, (d_sum, g))
    assert torch.equal(*gradients)
    return s.detach(), y.detach(), gradients[0]


@pytest.mark.parametrize("fusion", ["gate", "heads", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 32), (2, 1500), (300, 16)])
def test_fused_with_what_stands_around(shape, dtype, fusion):
    x, g = draw(*shape, dtype=dtype)
    other, d_sum = draw(*shape, dtype=dtype)
    kind = "residual" if fusion == "residual" else "gate"
    # every other piece of a wider tensor, as a projection gives it
    if fusion == "heads" and shape[-1] % 4 == 0:
        pieces = other.unflatten(-1, (4, -1))
        other = torch.stack([pieces, pieces + 1], -2).unbind(-2)[0]
        assert not other.is_contiguous()
    plain = fused(x, g, d_sum, other, kind, backend="torch")
    true = fused(x.double(), g.double(), d_sum.double(), other.double(), kind)
    for found, usual, exact in zip(
        fused(x, g, d_sum, other, kind, backend="triton"), plain, true, strict=True
    ):
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert_no_further(found, usual, exact)


def test_a_wide_residual_takes_a_narrow_update():
    x, update = draw(5, 40)[0], draw(5, 40, dtype=torch.float16)[0]
    for found, want in zip(
        add_rms_norm(x, update, backend="triton"),
        add_rms_norm(x, update, backend="torch"),
        strict=True,
    ):
        torch.testing.assert_close(found, want)
    leaf = update.requires_grad_()
    s, _ = add_rms_norm(x, leaf, backend="triton")
    s.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_a_wide_gate_leaves_the_dtype_as_it_is():
    x, gate = draw(5, 40, dtype=torch.float16)[0], draw(5, 40)[0]
    found, want = (
        simple_rms_norm(x, gate=gate, backend=backend) for backend in ("triton", "torch")
    )
    assert found.dtype == want.dtype == torch.float16
    torch.testing.assert_close(found, want)


def test_the_gradient_of_the_norm_alone_or_of_the_sum_alone():
    x, g = draw(5, 40)
    for take in (0, 1):
        found, want = (
            torch.autograd.grad(add_rms_norm(leaf, leaf.detach(), backend=backend)[take], leaf, g)[
                0
            ]
            for backend, leaf in (
                ("triton", x.clone().requires_grad_()),
                ("torch", x.clone().requires_grad_()),
            )
        )
        torch.testing.assert_close(found, want)


def test_strides_do_not_matter():
    x, g = draw(6, 5, 40)
    want = both(x, g, backend="triton")
    spread = [torch.cat([t, t], -1)[..., :40] for t in (x, g)]
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, g)]
    columns = [t.mT.contiguous().mT for t in (x, g)]
    for x, g in (spread, turned, columns):
        assert all(
            torch.equal(a, b) for a, b in zip(both(x, g, backend="triton"), want, strict=True)
        )
    ones = both(x, torch.ones_like(g), backend="triton")[1]
    assert torch.equal(
        both(x, torch.ones((), device=DEVICE).expand(g.shape), backend="triton")[1], ones
    )


def test_nothing_in_nothing_out():
    for shape in ((0, 4), (3, 0, 4)):
        assert all(x.shape == shape for x in both(*draw(*shape), backend="triton"))


@pytest.mark.parametrize("fusion", ["alone", "gate", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written_and_again_the_same(fusion, dtype):
    for shape in ((1000, 3), (3, 1000)):
        (x, g), (other, d_sum) = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)

        def results(x=x, g=g, other=other, d_sum=d_sum):
            if fusion == "alone":
                return both(x, g, backend="triton")
            return fused(x, g, d_sum, other, fusion, backend="triton")

        for found, again in zip(results(), results(), strict=True):
            assert found.isfinite().all()
            assert torch.equal(found, again)


def test_large_values_in_half_precision_do_not_overflow():
    x = torch.full((2, 8), 60_000.0, dtype=torch.float16, device=DEVICE)
    torch.testing.assert_close(simple_rms_norm(x, backend="triton"), torch.ones_like(x))


def test_compile_passes_through(monkeypatch):
    x, g = draw(4, 20)
    compiled = torch.compile(
        lambda x: simple_rms_norm(2 * x, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    leaf = x.requires_grad_()
    for function in (compiled, lambda x: simple_rms_norm(2 * x)):
        found = torch.autograd.grad(function(leaf), leaf, g)[0]
        want = torch.autograd.grad(simple_rms_norm(2 * leaf, backend="torch"), leaf, g)[0]
        torch.testing.assert_close(found, want)
    # as in a process whose first call is a compiled one
    monkeypatch.setattr(dispatch, "_said", set())
    automatic = torch.compile(lambda x: simple_rms_norm(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(automatic(x), simple_rms_norm(x))


def test_registration():
    x, g = draw(4, 20)
    update, gate = (torch.randn_like(x).requires_grad_() for _ in range(2))
    leaf = x.clone().requires_grad_()
    from transnormer.ops import norm_triton  # noqa: F401

    for arguments in ((leaf, None, None), (leaf, update, None), (leaf, None, gate)):
        torch.library.opcheck(torch.ops.transnormer.rms_norm, (*arguments, 1e-6, torch.float32))
    torch.library.opcheck(torch.ops.transnormer.rms_norm_backward, (x, None, g, None, 1e-6))
    torch.library.opcheck(torch.ops.transnormer.rms_norm_backward, (x, gate.detach(), g, x, 1e-6))


def test_under_autocast_a_product_can_read_the_norm():
    """Norms come in autocast's dtype, the residual stream keeps its own; the gradients are those of
    the cast."""
    x, g = draw(4, 20)
    update = torch.randn_like(x).bfloat16()
    for backend in ("triton", "torch"):
        leaf, want_leaf = (x.clone().requires_grad_() for _ in range(2))
        with torch.autocast(x.device.type, torch.bfloat16):
            alone = simple_rms_norm(leaf, backend=backend)
            s, y = add_rms_norm(leaf, update, backend=backend)
        want_s, want_y = add_rms_norm(want_leaf, update, backend=backend)
        assert (alone.dtype, s.dtype, y.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        torch.testing.assert_close(alone, simple_rms_norm(x, backend=backend).bfloat16())
        torch.testing.assert_close(s, want_s)
        torch.testing.assert_close(y, want_y.bfloat16())
        found = torch.autograd.grad((s, y), leaf, (g, g.bfloat16()))[0]
        torch.testing.assert_close(
            found, torch.autograd.grad((want_s, want_y), want_leaf, (g, g.bfloat16().float()))[0]
        )


def test_what_cannot_run_says_why():
    for x, reason in (
        (torch.ones(2, 3).double(), "float64"),
        (torch.ones(1, 20_000), "20000 is not from 1"),
    ):
        with pytest.raises(
            RuntimeError, match=f"backend 'triton' cannot run this call: .*{reason}"
        ):
            simple_rms_norm(x, backend="triton")


def test_tensors_that_are_still_on_their_way_are_waited_for():
    """Under tensor parallelism an update may be an `AsyncCollectiveTensor`, which has no address
    that a kernel could read."""
    (x, g), (update, h) = draw(7, 40), draw(7, 40)
    gradients = []
    for kind in (AsyncCollectiveTensor, torch.clone):
        leaves = [x.clone().requires_grad_(), update.clone().requires_grad_()]
        s, y = add_rms_norm(leaves[0], kind(leaves[1]), backend="triton")
        gradients.append(
            [s.detach(), y.detach(), *torch.autograd.grad((s, y), leaves[:1], (g, kind(h)))]
        )
    assert not direct(x, AsyncCollectiveTensor(update))
    for found, want in zip(*gradients, strict=True):
        assert torch.equal(found, want)
