"""Head and loss in slices equal the head and loss at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from transnormer.ops import linear_cross_entropy, loss


def draw(*shape, vocab=37, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    targets = torch.randint(vocab, shape, generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), targets


def whole(x, weight, targets, **options):
    """Everything at once in float64."""
    logits = x.double() @ weight.double().T
    value = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
    return value.view(targets.shape) if options.get("reduction") == "none" else value


@pytest.fixture(params=[1, 37 * 3, 2**22], ids=["token", "three", "all"])
def slices(request, monkeypatch):
    monkeypatch.setattr(loss, "SLICE_ELEMENTS", request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(11,), (2, 5), (2, 2, 3)])
def test_value_and_gradients(shape, reduction):
    x, weight, targets = draw(*shape)
    targets.view(-1)[2] = -100
    found = linear_cross_entropy(x, weight, targets, reduction=reduction)
    want = whole(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(found, want)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * want, (x, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("slices")
def test_one_loss_a_token():
    x, weight, targets = draw(3, 4)
    targets[1, 2] = 5
    found = linear_cross_entropy(x, weight, targets, reduction="none", ignore_index=5)
    torch.testing.assert_close(found, whole(x, weight, targets, reduction="none", ignore_index=5).detach())
    assert found[1, 2] == 0
    assert not found.requires_grad


def test_no_token_counts():
    x, weight, targets = draw(4)
    value = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    assert value == 0
    for gradient in torch.autograd.grad(value, (x, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_no_tokens():
    x, weight, targets = draw(0)
    assert linear_cross_entropy(x, weight, targets) == 0
    assert linear_cross_entropy(x, weight, targets, reduction="none").shape == (0,)


@pytest.mark.parametrize("target", [37, -1, -101])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_an_error(target, reduction):
    x, weight, targets = draw(4)
    targets[1] = target
    with pytest.raises(ValueError, match=f"target.*{target}"):
        linear_cross_entropy(x, weight, targets, reduction=reduction)


def test_only_the_gradients_that_are_asked_for():
    x, weight, targets = draw(6)
    for ours, frozen in ((x, weight), (weight, x)):
        frozen.requires_grad_(False)
        (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), ours)
        (want,) = torch.autograd.grad(whole(x, weight, targets), ours)
        torch.testing.assert_close(found, want)
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(x, weight, targets).requires_grad


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    x, weight, targets = draw(50, width=32, dtype=dtype)
    each = linear_cross_entropy(x, weight, targets, reduction="none")
    assert each.dtype == torch.float32
    true = whole(x, weight, targets, reduction="none")
    plain = F.cross_entropy(x @ weight.T, targets, reduction="none")
    assert (each - true).norm() <= 2 * (plain - true).norm()
    true, plain = true.mean(), F.cross_entropy(x @ weight.T, targets)
    found = linear_cross_entropy(x, weight, targets)
    gradients = [torch.autograd.grad(value, (x, weight)) for value in (found, plain, true)]
    for ours, theirs, want in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - want.double()).norm() <= 2 * (theirs.double() - want.double()).norm()


def test_large_logits_do_not_overflow():
    x, weight, targets = draw(5, dtype=torch.float32)
    found = linear_cross_entropy(1000 * x, weight, targets)
    torch.testing.assert_close(found.double(), whole(1000 * x, weight, targets))


def test_logits_of_all_tokens_never_exist(monkeypatch):
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
    x, weight, targets = draw(500, vocab=100)
    with Watch():
        linear_cross_entropy(x, weight, targets).backward()
    assert largest == x.numel() == 4000


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.randn(3, 8), torch.randn(9, 7), torch.zeros(3, dtype=torch.long)), {}, r"\[3, 8\], \[9, 7\], \[3\]"),
        ((torch.randn(3, 8), torch.randn(9, 8), torch.zeros(4, dtype=torch.long)), {}, "do not fit"),
        ((torch.randn(3, 8), torch.randn(9, 8), torch.zeros(3, dtype=torch.long)), {"reduction": "max"}, "got 'max'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)
