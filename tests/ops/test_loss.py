"""Head and loss in slices equal the head and loss at once; on the GPU, or with Triton's kernel in
its interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from transnormer.ops import dispatch, linear_cross_entropy, loss

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


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
        if not GPU and not launch_triton.INTERPRETED:
            pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def exact(backend):
    """The widest dtype of the backend."""
    return torch.float64 if backend == "torch" else torch.float32


@pytest.fixture(params=[1, 37 * 3, 2**22], ids=["token", "three", "all"])
def slices(request, monkeypatch):
    monkeypatch.setattr(loss, "SLICE_ELEMENTS", request.param)
    monkeypatch.setattr(loss, "CUDA_SLICE_BYTES", 4 * request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(11,), (2, 5), (2, 2, 3)])
def test_value_and_gradients(shape, reduction, backend, exact):
    x, weight, targets = draw(*shape, dtype=exact)
    targets.view(-1)[2] = -100
    found = linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
    want = whole(x, weight, targets, reduction=reduction)
    same(found, want)
    for ours, theirs in zip(
        gradients(found, x, weight, factor=3), gradients(want, x, weight, factor=3), strict=True
    ):
        same(ours, theirs)


@pytest.mark.usefixtures("slices")
def test_one_loss_a_token(backend, exact):
    x, weight, targets = draw(3, 4, dtype=exact)
    targets[1, 2] = 5
    options = {"reduction": "none", "ignore_index": 5}
    found = linear_cross_entropy(x, weight, targets, backend=backend, **options)
    want = whole(x, weight, targets, **options)
    same(found, want)
    assert found[1, 2] == 0
    factors = torch.randn(3, 4, device=DEVICE, dtype=exact)  # of which each token has its own
    # that of a token that does not count is nobody's
    factors[0, 1], factors[1, 2] = 0, float("nan")
    found, want = ((factors * value).nansum() for value in (found, want))
    for ours, theirs in zip(gradients(found, x, weight), gradients(want, x, weight), strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_mean_of_single_losses_has_the_gradients_of_the_mean(dtype, backend):
    """Though 1 / 4,000 of a soft-max of 37 may be too small for float16."""
    x, weight, targets = draw(40, dtype=dtype)
    x.data /= 4  # no soft-max that is all but certain
    each, mean = (
        linear_cross_entropy(x, weight, targets, reduction=kind, backend=backend)
        for kind in ("none", "mean")
    )
    found, want = (gradients(value, x, weight, factor=0.01) for value in (each.sum() / 40, mean))
    for ours, theirs in zip(found, want, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_single_losses_that_are_not_wanted_have_zero_gradients(backend, exact):
    x, weight, targets = draw(4, dtype=exact)
    each = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    for gradient in gradients((0 * each).sum(), x, weight, retain_graph=True):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    (found,) = gradients(each[1], x)
    assert found[1].any()
    assert not found[[0, 2, 3]].any()


def test_no_token_counts(backend, exact):
    x, weight, targets = draw(4, dtype=exact)
    value = linear_cross_entropy(x, weight, torch.full_like(targets, -100), backend=backend)
    assert value == 0
    for gradient in gradients(value, x, weight):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_tokens(backend, exact):
    x, weight, targets = draw(0, dtype=exact)
    value = linear_cross_entropy(x, weight, targets, backend=backend)
    assert value == 0
    assert torch.equal(gradients(value, weight)[0], torch.zeros_like(weight))
    each = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    assert each.shape == (0,)
    assert torch.equal(gradients(each.sum(), weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize("target", [37, -1, -101])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_error(target, reduction):
    x, weight, targets = draw(4, device="cpu")
    targets[1] = target
    with pytest.raises(ValueError, match=f"target.*{target}"):
        linear_cross_entropy(x, weight, targets, reduction=reduction)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="outside a vocabulary of 37"):
        compiled(x, weight, targets, reduction=reduction)


def test_only_the_gradients_that_are_asked_for(backend, exact):
    x, weight, targets = draw(6, dtype=exact)
    for ours, frozen in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        for reduction in ("mean", "none"):
            options = {"reduction": reduction}
            (found,) = gradients(
                linear_cross_entropy(x, weight, targets, backend=backend, **options).sum(), ours
            )
            (want,) = gradients(whole(x, weight, targets, **options).sum(), ours)
            same(found, want)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets, backend=backend).requires_grad


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


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_error(dtype, backend):
    x, weight, targets = draw(50, width=32, dtype=dtype)
    targets[7] = -100
    assert_error_is_at_most_twice_that_of_plain_torch(x, weight, targets, backend)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 64, 257, 20_001])
def test_any_vocabulary(vocab, dtype, backend):
    x, weight, targets = draw(9, vocab=vocab, width=16, dtype=dtype)
    targets[3], targets[-1] = -100, vocab - 1
    if vocab > 1:
        assert_error_is_at_most_twice_that_of_plain_torch(x, weight, targets, backend)
    else:
        value = linear_cross_entropy(x, weight, targets, backend=backend)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients(value, x, weight))


def test_strides_do_not_matter(backend, exact):
    x, weight, targets = draw(6, 5, dtype=exact)
    want = gradients(linear_cross_entropy(x, weight, targets, backend=backend), x, weight)
    spread = [torch.stack([t, t], -1)[..., 0] for t in (x, weight, targets)]
    turned = [t.mT.contiguous().mT for t in (x, weight, targets)]
    for some, head, aims in (spread, turned):
        assert not aims.is_contiguous()
        for found, gradient in zip(
            gradients(linear_cross_entropy(some, head, aims, backend=backend), x, weight),
            want,
            strict=True,
        ):
            same(found, gradient)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_weight_in_float32_keeps_a_gradient_in_float32(dtype, backend):
    x, weight, targets = draw(40, dtype=dtype)
    master = weight.detach().float().requires_grad_()
    value = linear_cross_entropy(x, weight, targets, backend=backend)
    mixed = linear_cross_entropy(x, master, targets, backend=backend)
    assert torch.equal(value, mixed)
    for ours, theirs, kind in zip(
        gradients(mixed, x, master),
        gradients(value, x, weight),
        (dtype, torch.float32),
        strict=True,
    ):
        assert ours.dtype == kind
        torch.testing.assert_close(ours.to(dtype), theirs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_chooses_the_dtype_of_the_products(dtype, compiled, backend):
    x, weight, targets = draw(40, dtype=torch.float32)
    function = linear_cross_entropy
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, dtype):
        found = function(x, weight, targets, backend=backend)
    want = linear_cross_entropy(x.to(dtype), weight, targets, backend=backend)
    assert torch.equal(found, want)
    for ours, theirs in zip(gradients(found, x, weight), gradients(want, x, weight), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    wide = x.double()
    with torch.autocast(DEVICE, dtype):  # which leaves float64 alone
        assert linear_cross_entropy(wide, weight, targets).dtype == torch.float64


def test_gradients_of_a_mean_are_those_of_the_sum_rounded_once():
    """1 / 4,080 is no number of bfloat16: rounded to it first, every gradient would be off by 0.4
    %."""
    x, weight, targets = draw(4_080, dtype=torch.bfloat16)
    head = weight.detach().float().requires_grad_()
    total, mean = (
        linear_cross_entropy(x, head, targets, reduction=kind) for kind in ("sum", "mean")
    )
    for whole_sum, found in zip(gradients(total, x, head), gradients(mean, x, head), strict=True):
        assert torch.equal(
            found, (whole_sum.float() * torch.tensor(1 / 4_080, device=DEVICE)).to(found.dtype)
        )


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_equal_bit_for_bit(dtype, backend):
    x, weight, targets = draw(50, vocab=300, width=16, dtype=dtype)
    first, second = (linear_cross_entropy(x, weight, targets, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(gradients(first, x, weight), gradients(second, x, weight), strict=True):
        assert torch.equal(a, b)


def test_the_same_graph_twice(backend):
    x, weight, targets = draw(6, dtype=torch.float32)
    value = linear_cross_entropy(x, weight, targets, backend=backend)
    once = gradients(value, x, weight, retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    for first, before, again in zip(once, kept, gradients(value, x, weight, factor=4), strict=True):
        assert torch.equal(first, before)
        assert torch.equal(again, 4 * first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    x, weight, targets = draw(6)
    value = linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    for factor in (1, weight.sum()):
        (found,) = gradients(value, x, factor=factor, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
            found.sum().backward(retain_graph=True)


def test_large_logits_do_not_overflow(backend):
    x, weight, targets = draw(5, dtype=torch.float32)
    found = linear_cross_entropy(1000 * x, weight, targets, backend=backend)
    same(found, whole(1000 * x, weight, targets))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value, backend):
    x, weight, targets = draw(5, dtype=torch.float32)
    x.data[2, 3] = value
    each = linear_cross_entropy(x, weight, targets, reduction="none", backend=backend)
    assert not each[2].isfinite()
    assert each[[0, 1, 3, 4]].isfinite().all()
    targets[2] = -100
    assert linear_cross_entropy(x, weight, targets, backend=backend).isfinite()


def test_logits_of_minus_infinity_count_for_nothing(backend):
    logits = torch.randn(3, 300, device=DEVICE)
    logits[0, :299] = logits[1, 5:] = logits[2, ::2] = float("-inf")
    targets, losses = torch.tensor([299, 2, 7], device=DEVICE), torch.empty(3, device=DEVICE)
    want, found = logits.clone().requires_grad_(), logits.clone()
    true = F.cross_entropy(want, targets, reduction="none")
    softmax_loss_(backend)(found, targets, losses, 300, -100, True)
    same(losses, true.detach())
    same(found, gradients(true.sum(), want)[0])


def test_slices_of_the_vocabulary_combine_to_the_whole(backend):
    logits, targets = (
        torch.randn(4, 96, device=DEVICE),
        torch.tensor([70, -100, 3, 40], device=DEVICE),
    )
    want, true = logits.clone(), torch.empty(4, device=DEVICE)
    softmax_loss_(backend)(want, targets, true, 96, -100, True)
    parts = ((0, 41), (41, 96))
    sums = []

    class VocabShard:
        """Of one part; what the parts found goes into sums until all did, and is combined
        afterwards."""

        def __init__(self, first):
            self.first = first

        def combined(self, *mine):
            if len(sums) < len(parts):
                sums.append([x.clone() for x in mine])
                return mine
            norms, at_target = (torch.stack(each) for each in zip(*sums, strict=True))
            return norms.logsumexp(0), at_target.sum(0)

    for gradient in (False, True):
        for first, stop in parts:
            part, losses = (
                logits[:, first:stop].contiguous(),
                torch.full((4,), float("nan"), device=DEVICE),
            )
            softmax_loss_(backend)(
                part, targets, losses, stop - first, -100, gradient, VocabShard(first)
            )
            if gradient:
                same(losses, true)
                same(part, want[:, first:stop])


def softmax_loss_(backend):
    if backend == "torch":
        return loss._softmax_loss_
    from transnormer.ops import loss_triton

    return loss_triton.softmax_loss_


def test_columns_beyond_the_vocabulary_count_for_nothing():
    loss_triton = pytest.importorskip("transnormer.ops.loss_triton")
    if not GPU and not pytest.importorskip("transnormer.ops.launch_triton").INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    for vocab, pitch in ((37, 64), (64, 128), (100, 101)):
        found = torch.full((5, pitch), float("nan"), device=DEVICE)
        found[:, :vocab] = torch.randn(5, vocab)
        want, targets = found.clone(), torch.tensor([0, -100, 5, vocab - 1, 2], device=DEVICE)
        losses = torch.full((5,), float("nan"), device=DEVICE)
        loss_triton.softmax_loss_(found, targets, losses, vocab, -100, False)
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))
        true = torch.empty_like(losses)
        loss._softmax_loss_(want, targets, true, vocab, -100, True)
        same(losses, true)
        loss_triton.softmax_loss_(found, targets, losses, vocab, -100, True)
        same(found[:, :vocab], want[:, :vocab])
        assert not found[:, vocab:].any()


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
