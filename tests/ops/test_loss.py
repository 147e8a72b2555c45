"""Head and loss in slices equal the head and loss at once; on the GPU, or with Triton's kernel in
its interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from losses import (
    DEVICE,
    GPU,
    HALF,
    assert_error_is_at_most_twice_that_of_plain_torch,
    draw,
    gradients,
    same,
    whole,
)

from transnormer.ops import linear_cross_entropy, loss


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
