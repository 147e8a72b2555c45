"""The short convolution's Triton kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from transnormer.ops.convolution import short_convolution, short_convolution_step_

launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
DEVICE = "cuda" if torch.cuda.is_available() and not launch_triton.INTERPRETED else "cpu"
if DEVICE == "cpu" and not launch_triton.INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(kind, rows, length, channels, taps=4, *, past=True, dtype=torch.float32):
    """(x, weight, past, cu_seqlens, positions) and the gradients of the results."""
    bounds = positions = None
    sequences = rows
    if kind == "packed":  # one of them empty, and one of a single token
        third = length // 3
        bounds = torch.tensor([0, third, third, third + 1, length], device=DEVICE)
        sequences = 4
    if kind == "placed":
        positions = torch.randint(0, 6, (rows, length), device=DEVICE)

    def random(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    earlier = random(sequences, taps - 1, channels) if past else None
    inputs = random(rows, length, channels), random(channels, taps), earlier, bounds, positions
    return inputs, [random(rows, length, channels), random(sequences, taps - 1, channels)]


def both(inputs, gradients, backend):
    """Results, and the gradients of what has one."""
    leaves = [None if part is None else part.detach().requires_grad_() for part in inputs[:3]]
    found = short_convolution(*leaves, *inputs[3:], backend=backend)
    leaves = [leaf for leaf in leaves if leaf is not None]
    return *(part.detach() for part in found), *torch.autograd.grad(found, leaves, gradients)


def wide(parts):
    return [
        part.double() if part is not None and part.is_floating_point() else part for part in parts
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape", "past"),
    [
        ("rows", (2, 40, 70), False),
        ("rows", (1, 75, 20), True),
        ("rows", (2, 2, 5), True),
        ("rows", (1, 9, 64, 1), True),
        ("rows", (2, 8, 16, 7), True),
        ("packed", (1, 75, 20), True),
        ("packed", (1, 75, 20), False),
        ("packed", (1, 4, 20), True),
        ("placed", (2, 40, 20), True),
    ],
)
def test_error_is_at_most_twice_that_of_plain_torch(kind, shape, past, dtype):
    inputs, gradients = draw(kind, *shape, past=past, dtype=dtype)
    # interpreted, bfloat16 is cut, not rounded
    factor = 4 if DEVICE == "cpu" and dtype == torch.bfloat16 else 2
    found, plain = (both(inputs, gradients, backend) for backend in ("triton", "torch"))
    true = both(wide(inputs), wide(gradients), "torch")
    for ours, usual, exact in zip(found, plain, true, strict=True):
        assert (ours.shape, ours.dtype) == (usual.shape, usual.dtype)
        error, allowed = ((part.double() - exact).norm() for part in (ours, usual))
        assert error <= factor * max(allowed, exact.norm() * torch.finfo(torch.float32).eps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["rows", "packed", "placed"])
def test_every_element_is_written_and_again_the_same(kind):
    for dtype in DTYPES[:2]:
        inputs, gradients = draw(kind, 1, 35, 5, dtype=dtype)
        results = (both(inputs, gradients, "triton") for _ in range(2))
        for found, again in zip(*results, strict=True):
            assert found.isfinite().all()
            assert torch.equal(found, again)


def test_strides_do_not_matter():
    inputs, gradients = draw("placed", 2, 9, 20)
    want = both(inputs, gradients, "triton")
    turned = [None if part is None else part.mT.contiguous().mT for part in inputs]
    assert not turned[0].is_contiguous()
    turned_gradients = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in gradients]
    for found, wanted in zip(both(turned, turned_gradients, "triton"), want, strict=True):
        assert torch.equal(found, wanted)
    # places that all rows share
    for places in (inputs[4][:1], inputs[4][0]):
        shared = [*inputs[:4], places]
        for found, wanted in zip(
            both(shared, gradients, "triton"), both(shared, gradients, "torch"), strict=True
        ):
            torch.testing.assert_close(found, wanted)


def test_the_gradient_of_one_result_alone():
    inputs, gradients = draw("rows", 2, 2, 5)
    for take in (0, 1):
        found, want = (
            torch.autograd.grad(
                short_convolution(*leaves, backend=backend)[take],
                leaves,
                gradients[take],
                materialize_grads=True,
                allow_unused=True,
            )
            for backend in ("triton", "torch")
            for leaves in [[part.clone().requires_grad_() for part in inputs[:3]]]
        )
        for ours, wanted in zip(found, want, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_nothing_in_nothing_out():
    inputs, gradients = draw("rows", 2, 0, 5)
    y, last, dx, d_weight, d_past = both(inputs, gradients, "triton")
    assert y.shape == dx.shape == (2, 0, 5)
    assert torch.equal(last, inputs[2])
    assert torch.equal(d_past, gradients[1])
    assert not d_weight.any()
    assert both(*draw("rows", 0, 3, 5), "triton")[0].shape == (0, 3, 5)


def test_compile_passes_through():
    inputs, gradients = draw("packed", 1, 9, 5)

    def call(*leaves):
        return short_convolution(*leaves, *inputs[3:], backend="triton")

    leaves = [part.clone().requires_grad_() for part in inputs[:3]]
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    found = *found, *torch.autograd.grad(found, leaves, gradients)
    for ours, wanted in zip(found, both(inputs, gradients, "triton"), strict=True):
        assert torch.equal(ours, wanted)


def test_registration():
    from transnormer.ops import convolution_triton  # noqa: F401

    ops = torch.ops.transnormer
    for kind, past in (("packed", True), ("placed", False)):
        inputs, gradients = draw(kind, 1, 5, 4, past=past)
        leaves = [None if part is None else part.clone().requires_grad_() for part in inputs[:3]]
        torch.library.opcheck(ops.short_convolution, (*leaves, *inputs[3:]))
        torch.library.opcheck(ops.short_convolution_backward, (*inputs, *gradients))
    x, memory, slots = torch.randn(2, 1, 4), torch.randn(3, 3, 4), torch.tensor([1, -1])
    step = x.to(DEVICE), torch.randn(4, 4).to(DEVICE), memory.to(DEVICE), slots.to(DEVICE)
    torch.library.opcheck(ops.short_convolution_step_, step)


def test_gradients_have_no_gradient():
    (x, weight, *_), _ = draw("rows", 1, 5, 4)
    leaf = x.requires_grad_()
    y, _ = short_convolution(leaf, weight, backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="short_convolution has no second derivative"):
        gradient.sum().backward()


def test_what_cannot_run_says_why():
    (x, weight, *_), _ = draw("rows", 1, 5, 4, taps=9)
    with pytest.raises(RuntimeError, match="cannot run this call: J = 9 is not from 1 to 8"):
        short_convolution(x, weight, backend="triton")
    with pytest.raises(RuntimeError, match="cannot run this call: float64"):
        short_convolution(x.double(), weight[:, :4], backend="triton")
    memory = torch.zeros(4, 4, 3, device=DEVICE).mT
    with pytest.raises(RuntimeError, match="cannot run this call: memory is not contiguous"):
        short_convolution_step_(x[:, :1], weight[:, :4], memory, backend="triton")


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_in_place(dtype, taps):
    """Rows with slots, one without, and rows that are slots; parts of longer rows."""
    (x, weight, memory, *_), _ = draw("rows", 5, 3, 300, taps, dtype=dtype)
    for slots in (None, torch.tensor([3, -1, 0], device=DEVICE)):
        ours, plain = memory.clone(), memory.clone()
        for t in range(3):
            token = x[:3, t : t + 1]
            found = short_convolution_step_(token, weight, ours, slots, backend="triton")
            want = short_convolution_step_(token, weight, plain, slots, backend="torch")
            owned = slice(None) if slots is None else slots >= 0
            torch.testing.assert_close(found[owned], want[owned], rtol=2**-6, atol=2**-6)
        # the last place is for those without a slot
        assert torch.equal(ours[:-1], plain[:-1])
