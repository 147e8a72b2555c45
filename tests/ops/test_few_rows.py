"""Products of few rows with what stands around them: the kernel is no further from float64 than
the parts one after another are."""

from __future__ import annotations

import pytest
import torch
from losses import GPU
from oracle import distance

from transnormer.ops.few_rows import MOST_ROWS, few_rows_linear

DEVICE = "cuda" if GPU else "cpu"

# What stands around the product in a block, and what else may.
AROUND = {
    "alone": (),
    "norm": ("eps",),
    "norm and gain": ("eps", "gain"),
    "residual": ("residual",),
    "gate and residual": ("gate", "residual"),
    "norm, gate and residual": ("eps", "gate", "residual"),
    "norm, gain and gate": ("eps", "gain", "gate"),
    "norm and pair": ("eps", "second"),
    "norm, gain and swish": ("eps", "gain", "second", "swish"),
    "everything": ("eps", "gain", "gate", "second", "swish", "residual"),
}


def draw(rows: int, N: int, heads: int, width: int, around, dtype) -> dict:
    """The arguments of a call; the gate is every other piece of a wider tensor, as a projection
    gives it."""

    def random(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    K = heads * width
    drawn = {
        "eps": 1e-6,
        "gain": random(K),
        "gate": torch.randn(rows, 1, heads, 2, width, device=DEVICE).to(dtype)[..., 1, :],
        "second": random(N, K),
        "swish": True,
        "residual": random(rows, 1, N),
    }
    arguments = {name: drawn[name] for name in around}
    return {"x": 3 * random(rows, 1, K), "weight": random(N, K) / K**0.5, **arguments}


def exactly(arguments: dict) -> torch.Tensor:
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return few_rows_linear(**wide, backend="torch")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_error_is_at_most_twice_that_of_the_parts(around, dtype, backend):
    # rows, N, heads, their width: K is also above one block, and no power of two
    for sizes in ((1, 70, 3, 20), (3, 13, 5, 9), (16, 70, 3, 20), (1, 6, 9, 128), (5, 21, 5, 64)):
        arguments = draw(*sizes, around, dtype)
        true = exactly(arguments)
        found = few_rows_linear(**arguments, backend=backend)
        usual = few_rows_linear(**arguments, backend="torch")
        assert (found.dtype, found.shape) == (dtype, usual.shape)
        # interpreted, bfloat16 is cut, not rounded
        cut = not GPU and dtype == torch.bfloat16
        factor, least = (4, 2.0**-9) if cut else (2, torch.finfo(torch.float32).eps)
        assert distance(found, true) <= factor * max(distance(usual, true), least), sizes


@pytest.mark.parametrize("rows", [1, 7])
def test_large_values_in_half_precision_do_not_overflow(rows, backend):
    x = torch.full((rows, 40), 60_000.0, dtype=torch.float16, device=DEVICE)
    weight = torch.ones(3, 40, dtype=torch.float16, device=DEVICE)
    found = few_rows_linear(x, weight, eps=1e-6, gate=x / 600, backend=backend)
    torch.testing.assert_close(found, torch.full_like(found, 4_000))


def test_what_cannot_run_says_why():
    pytest.importorskip("transnormer.ops.launch_triton")
    x, weight = torch.ones(2, 8, device=DEVICE), torch.ones(3, 8, device=DEVICE)
    rows = torch.ones(MOST_ROWS + 1, 8, device=DEVICE)
    for arguments, reason in (
        ((rows, weight), "17 rows are not from 1 to 16"),
        ((x, weight.bfloat16()), "several dtypes"),
        ((x.double(), weight.double()), "float64"),
        ((x, weight.mT.contiguous().mT), "columns are not adjacent"),
        ((x, weight.clone().requires_grad_()), "a gradient is wanted"),
    ):
        with pytest.raises(RuntimeError, match=f"'triton' cannot run this call: .*{reason}"):
            few_rows_linear(*arguments, backend="triton")
    wide = torch.ones(2, 9, device=DEVICE)
    for named, message in (
        ({"x": wide}, r"x must be \[..., K\] and weight \[N, K\]"),
        ({"gain": x[0]}, "a gain is the norm's"),
        ({"gate": wide}, r"a gate is \[..., K\]"),
        ({"second": wide}, "the second weight is like the first"),
        ({"swish": True}, "there is no second weight"),
        ({"residual": wide}, "a residual is"),
    ):
        with pytest.raises(ValueError, match=message):
            few_rows_linear(**{"x": x, "weight": weight, **named})


def test_the_torch_form_has_a_gradient_and_compiles():
    x, weight = torch.randn(2, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w: few_rows_linear(x, w, eps=1e-3, second=w), (x.requires_grad_(), weight)
    )
    compiled = torch.compile(few_rows_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, eps=1e-3), few_rows_linear(x, weight, eps=1e-3))
