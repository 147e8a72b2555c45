"""Gated Linear Attention as one op, against its parts in float64; the kernels in Triton's
interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_no_further, distance, plain_attention

from transnormer.ops.gla import gated_linear_attention
from transnormer.ops.norm import simple_rms_norm

launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
GPU = torch.cuda.is_available() and not launch_triton.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
if not GPU and not launch_triton.INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DECAYS = [0.0, -0.25, -50.0]


def draw(B, T, V, dtype, sequences, state):
    """qkvu, state or None, and the gradients of the two results."""
    H = len(DECAYS)
    shapes = [(B, T, H, 4, V), (sequences, H, V, V), (B, T, H * V), (sequences, H, V, V)]
    qkvu, before, dy, d_last = (torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)
    return qkvu, before if state else None, dy, d_last


def run(op, dtype, state_dtype, tensors, cu_seqlens):
    """Both results and the gradients."""
    qkvu, before, dy, d_last = tensors
    leaves = [qkvu.to(dtype).requires_grad_()]
    leaves += [] if before is None else [before.to(state_dtype).requires_grad_()]
    log_decay = torch.tensor(DECAYS, device=DEVICE)
    y, last = op(
        leaves[0], log_decay, state=leaves[1] if len(leaves) == 2 else None, cu_seqlens=cu_seqlens
    )
    gradients = torch.autograd.grad((y, last), leaves, (dy.to(y.dtype), d_last.to(last.dtype)))
    return y.detach(), last.detach(), *gradients


def plain(qkvu, log_decay, *, state, cu_seqlens):
    q, k, v, u = qkvu.unbind(3)
    mixed, last = plain_attention(
        F.silu(q), F.silu(k), v, log_decay, state=state, cu_seqlens=cu_seqlens
    )
    return simple_rms_norm(mixed.flatten(-2), gate=u, backend="torch"), last


def triton(qkvu, log_decay, **options):
    return gated_linear_attention(qkvu, log_decay, backend="triton", **options)


def check(T, V, dtype, *, B=2, lengths=None, state=True, scale=1.0):
    """At most twice as far from the parts in float64 as plain torch is (interpreted bfloat16
    truncates: four times)."""
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    qkvu, *others = draw(B, T, V, dtype, B if lengths is None else len(lengths), state)
    tensors = (qkvu * scale, *others)
    ours = run(triton, dtype, torch.float32, tensors, cu_seqlens)
    yardstick = run(plain, dtype, dtype, tensors, cu_seqlens)
    true = run(plain, torch.float64, torch.float64, tensors, cu_seqlens)
    factor = 4 if not GPU and dtype == torch.bfloat16 else 2
    for name, found, usual, want in zip(
        ("y", "last", "d_qkvu", "d_state"), ours, yardstick, true, strict=False
    ):
        assert_no_further(name, found, usual, want, tensors[0], factor=factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "V"), [(2, 16), (65, 32), (65, 40), (130, 16)])
def test_error_is_at_most_twice_that_of_plain_torch(T, V, dtype):
    check(T, V, dtype, state=T != 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swish_where_it_saturates(dtype):
    check(65, 32, dtype, state=False, scale=100.0)


def test_packed():
    for state in (True, False):
        check(135, 16, torch.float32, B=1, lengths=[70, 0, 1, 64], state=state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [16, 33, 64, 96, 128, 256])
def test_matrix(V, dtype):
    for T in (2, 64, 129, 700):
        check(T, V, dtype, state=T != 129)
    check(700, V, dtype, B=1, lengths=[130, 0, 70, 500])


def test_two_runs_are_equal_to_the_bit_and_all_is_written():
    tensors = draw(2, 100, 16, torch.float32, 2, True)
    first, second = (run(triton, torch.float32, torch.float32, tensors, None) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_backends_agree_and_compile_passes_through():
    tensors = draw(2, 70, 16, torch.float32, 2, True)
    want = run(lambda *args, **more: gated_linear_attention(*args, backend="torch", **more),
               torch.float32,
               torch.float32, tensors, None)  # fmt: skip
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")
    for found in (run(triton, torch.float32, torch.float32, tensors, None),
                  run(compiled, torch.float32, torch.float32, tensors, None)):  # fmt: skip
        for a, b in zip(found, want, strict=True):
            assert distance(a, b) < 1e-5


def test_registration():
    qkvu, state, *_ = draw(2, 5, 16, torch.float32, 2, True)
    from transnormer.ops import gla_triton  # noqa: F401

    inputs = (
        qkvu.requires_grad_(),
        torch.tensor(DECAYS, device=DEVICE),
        state.requires_grad_(),
        None,
        1e-6,
    )
    torch.library.opcheck(torch.ops.transnormer.gla_triton.default, inputs, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    qkvu, log_decay = (
        torch.randn(2, 5, 3, 4, 16, device=DEVICE),
        torch.tensor(DECAYS, device=DEVICE),
    )
    for backend in ("auto", "triton"):
        with pytest.raises(ValueError, match=r"log_decay must be \[3\]"):
            gated_linear_attention(qkvu, log_decay[:2], backend=backend)
        with pytest.raises(ValueError, match=r"state must be \[2, 3, 16, 16\]"):
            gated_linear_attention(
                qkvu, log_decay, state=torch.zeros(1, 3, 16, 16, device=DEVICE), backend=backend
            )
        with pytest.raises(ValueError, match=r"must be \[B, T, H, 4, V\]"):
            gated_linear_attention(qkvu[:, :, :, :3], log_decay, backend=backend)


def test_one_token_and_strided_input_take_the_parts():
    qkvu = torch.randn(2, 1, 3, 4, 16, device=DEVICE)
    log_decay = torch.tensor(DECAYS, device=DEVICE)
    assert gated_linear_attention(qkvu, log_decay)[0].shape == (2, 1, 48)
    for x, reason in (
        (qkvu, "one token"),
        (torch.randn(2, 5, 3, 16, 4, device=DEVICE).mT, "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            triton(x, log_decay)
