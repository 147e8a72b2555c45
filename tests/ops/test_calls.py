"""What holds for a call of every op: one device, decays that are decays, and derivatives that are
right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import distance, draw
from torch import Tensor

from transnormer.ops import (
    add_rms_norm,
    lightning_attention,
    lightning_step_,
    linear_cross_entropy,
    simple_rms_norm,
)
from transnormer.ops.gla import gated_linear_attention
from transnormer.ops.lightning import lightning_chunked, lightning_quadratic, lightning_reference
from transnormer.ops.lrpe import lrpe, swish_lrpe

B, T, H, K = 2, 5, 3, 16


def real(*shape: int) -> Tensor:
    return torch.randn(*shape)


def attention_inputs(length: int = T) -> dict[str, Tensor]:
    q, k, v = (real(B, length, H, K) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "log_decay": torch.tensor([0.0, -0.3, -9.0]),
        "state": real(B, H, K, K),
    }


def packed_inputs() -> dict[str, Tensor]:
    inputs = {name: x[:1] if x.dim() > 1 else x for name, x in attention_inputs().items()}
    return inputs | {"cu_seqlens": torch.tensor([0, T])}


# Of every op: a call by names, and its tensors.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Tensor]]]] = {
    "lightning_attention": (lightning_attention, attention_inputs),
    "lightning_attention, packed": (lightning_attention, packed_inputs),
    "lightning_attention, one token": (lightning_attention, lambda: attention_inputs(1)),
    "lightning_step_": (lightning_step_, lambda: attention_inputs(1)),
    "lightning_chunked": (lightning_chunked, attention_inputs),
    "lightning_reference": (lightning_reference, attention_inputs),
    "lightning_quadratic": (
        lightning_quadratic,
        lambda: {name: x for name, x in attention_inputs().items() if name != "state"},
    ),
    "gated_linear_attention": (
        gated_linear_attention,
        lambda: {
            "qkvu": real(B, T, H, 4, K),
            "log_decay": torch.zeros(H),
            "state": real(B, H, K, K),
        },
    ),
    "simple_rms_norm": (simple_rms_norm, lambda: {"x": real(B, T, 6), "gate": real(B, T, 2, 3)}),
    "add_rms_norm": (add_rms_norm, lambda: {"x": real(B, T, 6), "update": real(B, T, 6)}),
    "lrpe": (
        lrpe,
        lambda: {"x": real(B, T, H, K), "theta": real(H, K), "positions": torch.arange(T)},
    ),
    "swish_lrpe": (
        swish_lrpe,
        lambda: {
            "q": real(B, T, H, K),
            "k": real(B, T, H, K),
            "theta": real(H, K),
            "positions": torch.arange(T),
        },
    ),
    "linear_cross_entropy": (
        linear_cross_entropy,
        lambda: {"x": real(T, 4), "weight": real(7, 4), "targets": torch.arange(T)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_on_another_device_is_refused_by_its_name(name: str) -> None:
    call, draw_inputs = CALLS[name]
    inputs = draw_inputs()
    for odd in inputs:
        with pytest.raises(ValueError, match=rf"one device; got .*{odd} on meta.*given no values"):
            call(**inputs | {odd: inputs[odd].to("meta")})


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name not in ("lightning_attention, packed",)]
)
def test_shapes_alone_are_told_on_meta(name: str) -> None:
    call, draw_inputs = CALLS[name]
    inputs = draw_inputs()
    found = call(**{key: x.to("meta") for key, x in inputs.items()})
    want = call(**inputs)
    for ours, theirs in zip(
        *([x] if isinstance(x, Tensor) else x for x in (found, want)), strict=True
    ):
        assert ours.is_meta
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


# Decays.

BACKENDS = ["torch", "reference", "triton"]


def on(backend: str) -> str:
    """The backend, where it can run here."""
    if backend == "triton" and not pytest.importorskip("transnormer.ops.launch_triton").INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    return backend


@pytest.mark.parametrize("lengths", [None, [3, 0, 63]], ids=["rows", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_decay_of_minus_infinity_a_token_sees_itself_alone(
    backend: str, lengths: list[int] | None
) -> None:
    """Values and gradients: of the strongest head o_t = (q_t . k_t) v_t; the other head is as it is
    alone."""
    case = draw(66, rows=1, decays=[-torch.inf, -0.1], lengths=lengths)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.state)]

    def results(log_decay: Tensor, heads: slice) -> list[Tensor]:
        q, k, v, state = (
            x[..., heads, :] if x.dim() == 4 and x is not case.state else x[:, heads]
            for x in leaves
        )
        output, last = lightning_attention(
            q,
            k,
            v,
            log_decay,
            state=state,
            cu_seqlens=case.cu_seqlens,
            return_state=True,
            backend=on(backend),
        )
        return [output, last, *torch.autograd.grad(output.square().sum() + last.sum(), leaves)]

    found = results(case.log_decay, slice(None))
    assert all(x.isfinite().all() for x in found)
    alone = (case.q * case.k).sum(-1, keepdim=True) * case.v
    torch.testing.assert_close(found[0][:, :, 0], alone[:, :, 0], rtol=1e-4, atol=1e-4)
    (d_q,) = torch.autograd.grad(alone[:, :, 0].square().sum(), leaves[:1])
    torch.testing.assert_close(found[2][:, :, 0], d_q[:, :, 0], rtol=1e-4, atol=1e-3)
    for ours, other in zip(found[:2], results(case.log_decay[1:], slice(1, None))[:2], strict=True):
        ours = ours[:, 1:] if ours.shape[-2:] == (16, 16) and ours.shape[1] == 2 else ours[:, :, 1:]
        torch.testing.assert_close(ours, other)


def test_so_it_is_where_time_is_cut() -> None:
    on("triton")
    from transnormer.ops import lightning_triton

    case = draw(130, decays=[-torch.inf, -200.0], rows=1)
    inputs = (case.q, case.k, case.v, case.log_decay, case.state, None)
    back = torch.ops.transnormer.lightning_chunked_backward(*inputs, 64, case.d_output, case.d_last)
    found = (
        *lightning_triton.forward(*inputs, segments=2),
        *lightning_triton.backward(*inputs, case.d_output, case.d_last, segments=2),
    )
    for ours, theirs in zip(
        found, (*torch.ops.transnormer.lightning_chunked(*inputs, 64), *back), strict=True
    ):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_so_it_is_for_what_contexts_exchange() -> None:
    """As the next token reads it, whose decay the kernel counts on where it passes over tokens."""
    on("triton")
    from transnormer.ops.context import _Edges, _weighted_sum

    case = draw(70, decays=[-torch.inf, -0.1])
    edges, next_token = _Edges(case.q, None, 0), case.log_decay.exp()[:, None, None]
    for to_end in (True, False):
        found, want = (
            _weighted_sum(case.k, case.v, case.log_decay, edges, backend, to_end=to_end)
            for backend in ("triton", "torch")
        )
        torch.testing.assert_close(found * next_token, want * next_token)
        torch.testing.assert_close(
            want[:, 0], to_end * (case.k[:, -1, 0, :, None] * case.v[:, -1, 0, None])
        )


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        (torch.tensor([-1.0, 0.1]), "from -inf to 0; got .*0.1"),
        (torch.tensor([-1.0, torch.nan]), "from -inf to 0; got .*nan"),
        (torch.tensor([-1.0, -2.0j]), "real numbers; got torch.complex64"),
        (torch.tensor([False, True]), "real numbers; got torch.bool"),
    ],
    ids=["positive", "nan", "complex", "bool"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_decay_is_refused(decay: Tensor, message: str, backend: str) -> None:
    case = draw(3, decays=[-1.0, -2.0])
    with pytest.raises(ValueError, match=message):
        lightning_attention(case.q, case.k, case.v, decay, backend=on(backend))
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(real(B, T, 2, 4, K), decay)


# Nothing in, nothing out.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "length", "heads"), [(0, 5, 2), (0, 1, 2), (2, 5, 0), (2, 1, 0)])
def test_no_rows_and_no_heads(rows: int, length: int, heads: int, backend: str) -> None:
    case = draw(length, rows=rows, decays=[-0.1] * heads)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.state)]
    output, last = lightning_attention(
        *leaves[:3], case.log_decay, state=leaves[3], return_state=True, backend=on(backend)
    )
    assert output.shape == case.v.shape
    assert last.shape == case.state.shape
    gradients = torch.autograd.grad(output.sum() + last.sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (2, 0)])
def test_no_rows_and_no_heads_in_the_other_ops(rows: int, heads: int, backend: str) -> None:
    on(backend)
    qkvu = real(rows, T, heads, 4, K).requires_grad_()
    if heads or backend == "torch":  # the norm's kernels need a column
        y, last = gated_linear_attention(qkvu, torch.zeros(heads), backend=backend)
        assert (y.shape, last.shape) == ((rows, T, heads * K), (rows, heads, K, K))
        assert torch.autograd.grad(y.sum() + last.sum(), qkvu)[0].shape == qkvu.shape
    q, k, theta = (
        x.requires_grad_()
        for x in (real(rows, T, heads, K), real(rows, T, heads, K), real(heads, K))
    )
    results = swish_lrpe(q, k, theta, torch.arange(T), backend=backend)
    assert all(x.shape == (rows, T, heads, 2 * K) for x in results)
    assert torch.autograd.grad(results[0].sum(), theta)[0].eq(0).all()
    x = real(rows, T, 6)
    assert simple_rms_norm(x, gate=x.unflatten(-1, (2, 3)), backend=backend).shape == x.shape
    assert [y.shape for y in add_rms_norm(x, x, backend=backend)] == [x.shape] * 2
    each = linear_cross_entropy(
        x, real(7, 6), torch.ones(rows, T, dtype=torch.int64), reduction="none", backend=backend
    )
    assert each.shape == (rows, T)


# Derivatives beyond the first backward pass.


def first_order(call: Callable[..., Tensor], leaf: Tensor) -> Tensor:
    return torch.autograd.grad(call(leaf), leaf, create_graph=True)[0]


def scalar(backend: str, op: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A number that an op makes of a tensor, by no linear function, and such a tensor."""
    generator = torch.Generator().manual_seed(1)

    def fixed(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if op == "lightning_attention":
        k, v, decay = fixed(1, 4, 2, K), fixed(1, 4, 2, K), torch.tensor([0.0, -0.5])
        return (
            lambda q: lightning_attention(q, k * q, v, decay, backend=backend).square().sum(),
            fixed(1, 4, 2, K),
        )
    if op == "gated_linear_attention":
        decay = torch.tensor([0.0, -0.5])
        return lambda x: gated_linear_attention(x, decay, backend=backend)[0].square().sum(), fixed(
            1, 4, 2, 4, K
        )
    if op == "simple_rms_norm":
        gate = fixed(3, 8)
        return lambda x: simple_rms_norm(x, gate=gate, backend=backend).pow(3).sum(), fixed(3, 8)
    if op == "add_rms_norm":
        update = fixed(3, 8)
        return lambda x: add_rms_norm(x, update, backend=backend)[1].pow(3).sum(), fixed(3, 8)
    if op == "swish_lrpe":
        theta = fixed(2, K)
        return (
            lambda q: swish_lrpe(q, q, theta, torch.arange(4), backend=backend)[0].pow(3).sum(),
            fixed(1, 4, 2, K),
        )
    weight, targets = fixed(7, 4), torch.arange(5)
    reduction = op.rpartition(" ")[2]
    return (
        lambda x: (
            linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
            .square()
            .sum()
        ),
        fixed(5, 4),
    )


OPS = [
    "lightning_attention", "gated_linear_attention", "simple_rms_norm", "add_rms_norm",
    "swish_lrpe",
    "linear_cross_entropy mean", "linear_cross_entropy none",
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("op", OPS)
def test_a_forward_derivative_is_right_or_refused_by_name(op: str, backend: str) -> None:
    if backend == "reference" and op != "lightning_attention":
        pytest.skip("has no such backend")
    call, x = scalar(on(backend), op)
    name = op.partition(" ")[0]
    named = name.replace("add", "simple")  # they share their kernels
    direction = torch.randn_like(x)
    refused = (
        backend == "triton"
        or name == "linear_cross_entropy"
        or (backend == "torch" and name == "lightning_attention")
    )
    if refused:
        with pytest.raises(RuntimeError, match=f"{named}: .*no forward-mode derivative"):
            torch.func.jvp(call, (x,), (direction,))
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(RuntimeError, match=f"{named}: .*no forward-mode"),
        ):
            call(torch.autograd.forward_ad.make_dual(x, direction))
        return
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf), leaf)
    want = (gradient * direction).sum()
    torch.testing.assert_close(
        torch.func.jvp(call, (x,), (direction,))[1], want, rtol=1e-4, atol=1e-4
    )
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(
            call(torch.autograd.forward_ad.make_dual(x, direction))
        ).tangent
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        call(x)  # nothing is asked of it: it runs as ever


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_right_or_refused_by_name(op: str, backend: str) -> None:
    """As a gradient penalty asks for it: that of the gradient's square."""
    if backend == "reference" and op != "lightning_attention":
        pytest.skip("has no such backend")
    call, x = scalar(on(backend), op)
    name = op.partition(" ")[0]
    leaf = x.clone().requires_grad_()
    gradient = first_order(call, leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(call(leaf), leaf)[0])
    right = backend == "reference" or (
        backend == "torch" and name in ("simple_rms_norm", "add_rms_norm", "swish_lrpe")
    )
    if not right:
        named = {"add_rms_norm": "simple_rms_norm"}.get(name, name)
        if backend == "torch" and name == "gated_linear_attention":
            named = "lightning_attention"
        with pytest.raises(
            RuntimeError, match=f"{named} has no second derivative.*create_graph=True"
        ):
            gradient.square().sum().backward()
        return
    (found,) = torch.autograd.grad(gradient.square().sum(), leaf)
    step = 1e-2 * torch.randn_like(x)
    ends = [
        first_order(call, (x + sign * step).requires_grad_()).square().sum() for sign in (1, -1)
    ]
    torch.testing.assert_close(
        (found * 2 * step).sum(), (ends[0] - ends[1]).detach(), rtol=2e-2, atol=2e-2
    )


def test_a_step_in_place_is_refused_where_a_gradient_is_wanted() -> None:
    inputs = attention_inputs(1)
    for name in ("q", "k", "v"):
        with pytest.raises(ValueError, match="lightning_step_ has no gradient"):
            lightning_step_(**inputs | {name: inputs[name].clone().requires_grad_()})
    with torch.no_grad():
        lightning_step_(**inputs | {"q": inputs["q"].clone().requires_grad_()})


# Autocast.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 20])
def test_autocast_changes_nothing_inside_of_attention(length: int, backend: str) -> None:
    case = draw(length, rows=1, decays=[0.0, -1e-4])

    def results(autocast: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.state)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # which is for forward passes
            output, last = lightning_attention(
                *leaves[:3], case.log_decay, state=leaves[3], return_state=True, backend=on(backend)
            )
        return [
            output,
            last,
            *torch.autograd.grad((output, last), leaves, (case.d_output, case.d_last)),
        ]

    found, want = results(True), results(False)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_autocast_changes_nothing_of_what_contexts_exchange() -> None:
    from transnormer.ops import context

    case = draw(20, decays=[0.0, -0.1])
    edges = context._Edges(case.q, None, 0)
    want = context._weighted_sum(case.k, case.v, case.log_decay, edges, "torch", to_end=True)
    gathered = pytest.MonkeyPatch()
    gathered.setattr(context, "_gather", lambda state, through, *_: (state[None], through[None]))
    with gathered.context(), torch.autocast("cpu", torch.bfloat16):
        _, last, state, _ = torch.ops.transnormer.lightning_segment(
            case.q, case.k, case.v, case.log_decay, None, "torch", 0, 1, ""
        )
    gathered.undo()
    assert last.dtype == state.dtype == torch.float32
    assert distance(last, want) < 1e-6
