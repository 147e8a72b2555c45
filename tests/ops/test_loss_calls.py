"""How head and loss are called: in little memory, compiled, registered, refused, and on a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from losses import (
    DEVICE,
    HALF,
    assert_error_is_at_most_twice_that_of_plain_torch,
    draw,
    gpu,
    gradients,
)

from transnormer.ops import dispatch, linear_cross_entropy, loss


@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written(monkeypatch, backend, exact):
    monkeypatch.setattr(loss, "SLICE_ELEMENTS", 200)
    x, weight, targets = draw(13, dtype=exact)
    targets[4] = -100
    value = linear_cross_entropy(x, weight, targets, backend=backend)
    assert all(found.isfinite().all() for found in (value, *gradients(value, x, weight)))
    assert (
        linear_cross_entropy(x, weight, targets, reduction="none", backend=backend).isfinite().all()
    )


def test_logits_of_all_tokens_never_exist(monkeypatch, backend, exact):
    """Every tensor that is made during forward and backward is small beside [tokens, vocab]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for made in result if isinstance(result, tuple | list) else (result,):
                if isinstance(made, torch.Tensor):
                    largest = max(largest, made.numel())
            return result

    monkeypatch.setattr(loss, "SLICE_ELEMENTS", 1000)
    monkeypatch.setattr(loss, "CUDA_SLICE_BYTES", 8000)
    x, weight, targets = draw(500, vocab=100, dtype=exact)
    with Watch():
        linear_cross_entropy(x, weight, targets, backend=backend).backward()
    assert largest == x.numel() == 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_passes_through(dtype, backend, monkeypatch):
    monkeypatch.setattr(loss, "SLICE_ELEMENTS", 100)
    # as in a process whose first call is a compiled one
    monkeypatch.setattr(dispatch, "_said", set())

    def function(x, weight, targets, chosen, reduction="mean"):
        return 3 * linear_cross_entropy(2 * x, weight, targets, backend=chosen, reduction=reduction)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, weight, targets = draw(12, dtype=dtype)
    targets[3] = -100
    for chosen in (backend, "auto"):
        found, want = (f(x, weight, targets, chosen) for f in (compiled, function))
        assert torch.equal(found, want)
        for ours, theirs in zip(
            gradients(found, x, weight), gradients(want, x, weight), strict=True
        ):
            assert torch.equal(ours, theirs)
    factors = torch.randn(12, device=DEVICE)
    found, want = (f(x, weight, targets, backend, "none") for f in (compiled, function))
    assert torch.equal(found, want)
    found, want = ((factors * value).sum() for value in (found, want))
    for ours, theirs in zip(gradients(found, x, weight), gradients(want, x, weight), strict=True):
        assert torch.equal(ours, theirs)


def test_registration(backend):
    x, weight, targets = draw(4, dtype=torch.float32)
    op = torch.ops.transnormer.linear_cross_entropy
    for needs in ((True, True), (True, False), (False, True)):
        leaves = [
            leaf.detach().requires_grad_(need)
            for leaf, need in zip((x, weight), needs, strict=True)
        ]
        for each in (False, True):
            torch.library.opcheck(op, (*leaves, targets, -100, backend, each, *needs))
    fixed = (x.detach(), weight.detach(), targets)
    torch.library.opcheck(op, (*fixed, -100, backend, True, False, False))
    back = torch.ops.transnormer.linear_cross_entropy_backward
    torch.library.opcheck(back, (*fixed, torch.randn(4, device=DEVICE), -100, backend, True, False))
    if backend == "triton":
        from transnormer.ops import loss_triton

        logits, losses = torch.randn(4, 40, device=DEVICE), torch.zeros(4, device=DEVICE)
        for gradient, sums, shared in (
            (True, True, False),
            (False, True, True),
            (True, False, True),
        ):
            norms = torch.zeros(4, device=DEVICE)
            arguments = (
                logits.clone(),
                targets,
                losses.clone(),
                norms,
                37,
                -100,
                gradient,
                sums,
                shared,
            )
            torch.library.opcheck(loss_triton.op, arguments)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (torch.randn(3, 8), torch.randn(9, 7), torch.zeros(3, dtype=torch.long)),
            {},
            r"\[3, 8\], \[9, 7\], \[3\]",
        ),
        (
            (torch.randn(3, 8), torch.randn(9, 8), torch.zeros(4, dtype=torch.long)),
            {},
            "do not fit",
        ),
        (
            (torch.randn(3, 8), torch.randn(9, 8), torch.zeros(3, dtype=torch.long)),
            {"reduction": "max"},
            "got 'max'",
        ),
        (
            (torch.randn(3, 8), torch.randn(9, 8), torch.zeros(3, dtype=torch.long)),
            {"backend": "cpu"},
            "'cpu'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)


def test_what_cannot_run_says_why():
    x, weight, targets = draw(3)
    with pytest.raises(
        RuntimeError, match="linear_cross_entropy: backend 'triton' cannot run this call: float64"
    ):
        linear_cross_entropy(x, weight, targets, backend="triton")


LARGE = {"vocab": 64_000, "width": 1_024, "dtype": torch.bfloat16}


class TestOnTheGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    @pytest.mark.parametrize("vocab", [64_000, 50_257, 300, 2**20 + 3])
    def test_error(self, vocab, dtype):
        x, weight, targets = draw(700, vocab=vocab, width=64, dtype=dtype)
        targets[::5] = -100
        assert_error_is_at_most_twice_that_of_plain_torch(x, weight, targets, "triton")

    def test_memory(self):
        x, weight, targets = draw(32_768, **LARGE)
        for leaf in (x, weight):
            leaf.data /= 32
        for _ in range(2):  # the first time also holds the workspace of the products
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = gradients(linear_cross_entropy(x, weight, targets), x, weight)
            torch.cuda.synchronize()
        assert all(gradient.isfinite().all() for gradient in found)
        assert torch.cuda.max_memory_allocated() - before < 1.2e9

    def test_offsets_beyond_32_bits(self):
        softmax_loss_ = pytest.importorskip("transnormer.ops.loss_triton").softmax_loss_
        rows, vocab = 2**15 + 100, 2**16
        logits = torch.zeros(rows, vocab, device=DEVICE, dtype=torch.bfloat16)
        logits[-1, :5] = 1
        targets, losses = torch.full((rows,), 3, device=DEVICE), torch.empty(rows, device=DEVICE)
        tail = logits[-1:].float().requires_grad_()
        true = F.cross_entropy(tail, targets[-1:])
        softmax_loss_(logits, targets, losses, vocab, -100, True)
        torch.testing.assert_close(losses[-1], true.detach())
        torch.testing.assert_close(logits[-1:], gradients(true, tail)[0].bfloat16())

    def test_nobody_waits(self):
        x, weight, targets = draw(5_000, **LARGE)
        gradients(linear_cross_entropy(x, weight, targets), x, weight)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(linear_cross_entropy(x, weight, targets), x, weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_capture_and_replay(self):
        x, weight, targets = draw(5_000, **LARGE)

        def run():
            value = linear_cross_entropy(x, weight, targets)
            return value.detach(), *gradients(value, x, weight)

        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            run()
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        x.data.copy_(torch.randn_like(x))
        targets.copy_(targets.flip(0))
        graph.replay()
        for ours, want in zip(found, run(), strict=True):
            torch.testing.assert_close(ours, want)

    def test_inductor(self):
        x, weight, targets = draw(5_000, **LARGE)
        compiled = torch.compile(lambda *leaves: 2 * linear_cross_entropy(*leaves), fullgraph=True)
        found, want = compiled(x, weight, targets), 2 * linear_cross_entropy(x, weight, targets)
        torch.testing.assert_close(found, want)
        for ours, theirs in zip(
            gradients(found, x, weight), gradients(want, x, weight), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_a_target_out_of_range_is_asserted(self, backend):
        program = (
            "import torch; from transnormer.ops import linear_cross_entropy as f; "
            "x, w = torch.randn(4, 8, device='cuda'), torch.randn(37, 8, device='cuda'); "
            f"f(x, w, torch.full((4,), 37, device='cuda'), backend={backend!r}).item()"
        )
        found = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True
        )
        assert found.returncode != 0
        # whichever call the failure then surfaces in
        assert "_assert_async_cuda_kernel" in found.stderr
