"""Lightning Attention in plain torch: the chunked form is the recurrence, everywhere."""

from __future__ import annotations

import logging

import pytest
import torch
from oracle import (
    DECAYS,
    assert_within_twice,
    compiled_and_eager_gradients,
    distance,
    draw,
    exact,
    run,
)

from transnormer.ops import dispatch, lightning_attention, lightning_step_
from transnormer.ops.lightning import (
    check,
    lightning_chunked,
    lightning_quadratic,
    lightning_reference,
)

LENGTHS = [1, 63, 64, 65, 200]
PACKED = [[5], [0, 70, 0, 1, 64, 0], [64, 64], [0, 0, 3]]


def attention(q, k, v, log_decay, **options):
    return lightning_attention(q, k, v, log_decay, return_state=True, **options)


def assert_exact(op, case, within=1e-10):
    found, true = run(op, case), exact(case)
    for name, want in true.items():
        if want.numel():
            assert distance(found[name], want) < within, name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
def test_chunked_is_the_recurrence_in_float64(length, state):
    assert_exact(attention, draw(length, K=12, V=20, state=state, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 7, 16, 128, 1000])
def test_any_chunk_gives_the_same(chunk):
    case = draw(100, K=8, V=5, dtype=torch.float64)
    assert_exact(lambda *x, **options: lightning_chunked(*x, **options, chunk=chunk), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_error_is_at_most_twice_that_of_plain_torch(length, dtype):
    assert_within_twice(attention, draw(length, K=24, V=16, dtype=dtype, seed=length))


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
def test_packed_sequences_are_separate_sequences(lengths, state):
    case = draw(0, K=8, V=12, lengths=lengths, state=state, dtype=torch.float64)
    assert_exact(attention, case)
    output, last = attention(
        case.q, case.k, case.v, case.log_decay, state=case.state, cu_seqlens=case.cu_seqlens
    )
    start = 0
    for n, length in enumerate(lengths):
        part = slice(start, start + length)
        alone, alone_last = attention(
            case.q[:, part],
            case.k[:, part],
            case.v[:, part],
            case.log_decay,
            state=case.state[n : n + 1] if state else None,
        )
        assert distance(output[:, part], alone) < 1e-12
        assert distance(last[n : n + 1], alone_last) < 1e-12
        start += length


def test_packed_sequences_keep_the_error_rule():
    assert_within_twice(attention, draw(0, lengths=[30, 0, 100, 1], dtype=torch.bfloat16))


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 100])
def test_two_calls_joined_by_the_state_are_one(cut):
    """Output, state, and the gradients that flow back through the state."""
    case = draw(100, dtype=torch.float64)

    def halves(q, k, v, log_decay, *, state, cu_seqlens):
        first, between = attention(q[:, :cut], k[:, :cut], v[:, :cut], log_decay, state=state)
        second, last = attention(q[:, cut:], k[:, cut:], v[:, cut:], log_decay, state=between)
        return torch.cat([first, second], 1), last

    assert_exact(halves, case)


def test_one_token_at_a_time_is_the_whole():
    case = draw(20, dtype=torch.float64)
    state, outputs = case.state, []
    for t in range(20):
        token = slice(t, t + 1)
        output, state = attention(
            case.q[:, token], case.k[:, token], case.v[:, token], case.log_decay, state=state
        )
        outputs.append(output)
    want = exact(case)
    assert distance(torch.cat(outputs, 1), want["output"]) < 1e-12
    assert distance(state, want["last"]) < 1e-12


def test_step_in_place_moves_the_state_on():
    case = draw(1)
    state = case.state.clone()
    output = lightning_step_(case.q, case.k, case.v, case.log_decay, state)
    want, last = attention(case.q, case.k, case.v, case.log_decay, state=case.state)
    assert torch.equal(output, want)
    assert torch.equal(state, last)
    two = draw(2)
    with pytest.raises(ValueError, match="T = 1"):
        lightning_step_(two.q, two.k, two.v, two.log_decay, two.state)


def test_a_step_by_slots_moves_those_states_alone():
    case = draw(1, rows=3)
    states = torch.full((5, *case.state.shape[1:]), torch.nan)
    states[[4, 0]] = case.state[[0, 2]]
    slots = torch.tensor([4, -1, 0])
    output = lightning_step_(case.q, case.k, case.v, case.log_decay, states, slots=slots)
    want, last = attention(case.q, case.k, case.v, case.log_decay, state=case.state)
    assert torch.equal(output[[0, 2]], want[[0, 2]])
    assert torch.equal(states[[4, 0]], last[[0, 2]])
    assert states[1:4].isnan().all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1], r"slots must be \[3\] integers, one a row"),
        ([0.0, 1.0, 2.0], "integers"),
        ([0, 1, 5], r"different numbers below N = 5; got \[0, 1, 5\]"),
        ([2, 1, 2], "different numbers"),
        ([0, 1, -2], "must be -1, or"),
    ],
)
def test_slots_that_do_not_fit_are_refused(slots, message):
    case = draw(1, rows=3)
    states = case.state.new_zeros(5, *case.state.shape[1:])
    with pytest.raises(ValueError, match=message):
        lightning_step_(case.q, case.k, case.v, case.log_decay, states, slots=torch.tensor(slots))
    with pytest.raises(ValueError, match=r"state must be \[N, "):
        lightning_step_(
            case.q, case.k, case.v, case.log_decay, states[:, 1:], slots=torch.arange(3)
        )


def test_no_tokens_keep_the_state_and_pass_its_gradient():
    case = draw(0)
    found = run(attention, case)
    assert found["output"].shape == case.v.shape
    assert torch.equal(found["last"], case.state)
    assert torch.equal(found["d_state"], case.d_last)


def test_left_padding_is_k_zero():
    case, padding = draw(50, state=False, dtype=torch.float64), 13
    padded = [
        torch.cat([torch.randn(2, padding, *x.shape[2:]).to(x), x], 1)
        for x in (case.q, case.k, case.v)
    ]
    padded[1][:, :padding] = 0
    output, last = attention(*padded, case.log_decay)
    want, want_last = attention(case.q, case.k, case.v, case.log_decay)
    assert distance(output[:, padding:], want) < 1e-12
    assert distance(last, want_last) < 1e-12


def test_strides_do_not_matter():
    case = draw(70, dtype=torch.float64)
    by_head = draw(70, dtype=torch.float64)
    for name in ("q", "k", "v", "d_output"):
        setattr(by_head, name, getattr(by_head, name).transpose(1, 2).contiguous().transpose(1, 2))
    by_head.state = by_head.state.mT.contiguous().mT
    for name, want in run(attention, case).items():
        assert distance(run(attention, by_head)[name], want) < 1e-13, name
    fused = torch.cat([case.q, case.k, case.v], -1)
    q, k, v = fused.split([16, 16, 16], -1)
    want = lightning_attention(case.q, case.k, case.v, case.log_decay)
    assert distance(lightning_attention(q, k, v, case.log_decay), want) < 1e-13
    expanded = case.d_output[:1, :1].expand_as(case.d_output)
    leaf = case.q.clone().requires_grad_()
    lightning_attention(leaf, case.k, case.v, case.log_decay).backward(expanded)
    copied = case.q.clone().requires_grad_()
    lightning_attention(copied, case.k, case.v, case.log_decay).backward(expanded.contiguous())
    assert distance(leaf.grad, copied.grad) < 1e-13


def test_quadratic_form_is_the_recurrence():
    case = draw(90, state=False, dtype=torch.float64)
    assert (
        distance(lightning_quadratic(case.q, case.k, case.v, case.log_decay), exact(case)["output"])
        < 1e-12
    )


def test_gradcheck():
    case = draw(9, K=3, V=2, rows=1, decays=[0.0, -0.7], dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.state)]

    def op(q, k, v, state):
        return lightning_chunked(q, k, v, case.log_decay, state=state, chunk=4)

    assert torch.autograd.gradcheck(op, leaves)


def test_gradient_of_the_state_alone_and_of_the_output_alone():
    case = draw(70, dtype=torch.float64)
    zero = {"d_output": torch.zeros_like(case.d_output), "d_last": torch.zeros_like(case.d_last)}
    for only in (0, 1):
        leaves = [getattr(case, name).clone().requires_grad_() for name in ("q", "k", "v", "state")]
        q, k, v, state = leaves
        result = attention(q, k, v, case.log_decay, state=state)[only]
        name = ("d_output", "d_last")[only]
        found = torch.autograd.grad(result, leaves, getattr(case, name), allow_unused=True)
        other = ("d_last", "d_output")[only]
        blank = draw(70, dtype=torch.float64)
        setattr(blank, other, zero[other])
        want = exact(blank)
        for leaf, gradient in zip(("q", "k", "v", "state"), found, strict=True):
            true = want[f"d_{leaf}"]
            assert (
                distance(torch.zeros_like(true) if gradient is None else gradient, true) < 1e-10
            ), (name, leaf)


def test_state_may_be_in_another_dtype_and_gets_its_gradient_in_it():
    case = draw(10, dtype=torch.bfloat16)
    found = run(attention, case)
    assert found["last"].dtype == torch.float32
    assert found["d_state"].dtype == torch.bfloat16
    assert found["output"].dtype == torch.bfloat16
    assert found["d_q"].dtype == torch.bfloat16


def test_the_papers_first_inference_overflows_where_this_does_not():
    """kv_t = kv_(t-1) + k_t lambda^-t v_t, o_t = q_t lambda^t kv_t: the same function, until
    lambda^-t overflows."""
    case = draw(400, rows=1, decays=[-0.5], state=False)
    rate = case.log_decay.exp()
    kv, outputs = torch.zeros(16, 16), []
    for t in range(400):
        kv = kv + case.k[0, t, 0, :, None] * rate ** -(t + 1) * case.v[0, t, 0]
        outputs.append(case.q[0, t, 0] * rate ** (t + 1) @ kv)
    original, want = torch.stack(outputs), exact(case)["output"][0, :, 0]
    assert distance(original[:100], want[:100]) < 1e-4
    assert not original.isfinite().all()
    assert (
        distance(lightning_attention(case.q, case.k, case.v, case.log_decay)[0, :, 0], want) < 1e-6
    )


@pytest.mark.parametrize("decay", [0.0, -1e-5, -0.01, -8.0])
def test_very_long_sequences_stay_finite_and_right(decay):
    case = draw(20_000, K=2, V=2, rows=1, decays=[decay], dtype=torch.float32)
    output, last = attention(case.q, case.k, case.v, case.log_decay, state=case.state)
    wide = case.to(torch.float64)
    # one cumulative scan in float64 per quarter, an independent way to the end
    true, state = [], wide.state[0, 0]
    rate = torch.tensor(decay, dtype=torch.float64).exp()
    for t in range(20_000):
        state = rate * state + wide.k[0, t, 0, :, None] * wide.v[0, t, 0]
        true.append(wide.q[0, t, 0] @ state)
    assert distance(output[0, :, 0], torch.stack(true)) < 1e-5
    assert distance(last[0, 0], state) < 1e-5


def test_compile_passes_through():
    case = draw(70, K=8, V=8, decays=[-0.1])

    for found, want in compiled_and_eager_gradients(attention, case):
        assert distance(found, want) < 1e-6


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_registration(packed):
    case = draw(10, K=3, V=2, decays=[-0.2], lengths=[4, 0, 6] if packed else None)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    arguments = (*leaves, case.log_decay, case.state.requires_grad_(), case.cu_seqlens, 4)
    torch.library.opcheck(torch.ops.transnormer.lightning_chunked, arguments)
    arguments = (
        *(x.detach() for x in leaves),
        case.log_decay,
        None,
        case.cu_seqlens,
        4,
        case.d_output,
        None,
    )
    torch.library.opcheck(torch.ops.transnormer.lightning_chunked_backward, arguments)


def test_reference_backend():
    case = draw(30, dtype=torch.bfloat16)
    output, last = attention(case.q, case.k, case.v, case.log_decay, backend="reference")
    want = lightning_reference(case.q, case.k, case.v, case.log_decay)
    assert torch.equal(output, want[0])
    assert torch.equal(last, want[1])
    assert output.dtype == torch.bfloat16
    assert last.dtype == torch.float32


def wrong(**changes):
    case = draw(6)
    arguments = {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "log_decay": case.log_decay,
        "state": None,
        "cu_seqlens": None,
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 6, 5, 8)}, r"q and k must be \[B, T, H, K\].*\[2, 6, 5, 8\]"),
        ({"v": torch.randn(2, 7, 5, 16)}, r"v \[B, T, H, V\].*\[2, 7, 5, 16\]"),
        ({"q": torch.randn(6, 5, 16)}, "q and k must be"),
        (
            {"v": torch.randn(2, 6, 5, 16).half()},
            "share a floating dtype; got torch.float32, torch.float32 and torch.float16",
        ),
        ({"log_decay": torch.zeros(3)}, r"log_decay must be \[5\], one number a head; got \[3\]"),
        ({"log_decay": torch.zeros(5, requires_grad=True)}, "gets no gradient; detach it"),
        (
            {"state": torch.zeros(2, 5, 16, 8)},
            r"state must be \[2, 5, 16, 16\]; got \[2, 5, 16, 8\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 6])}, "over one row.*B = 2"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(changes, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(**wrong(**changes))


@pytest.mark.parametrize("bounds", [[0, 3], [1, 6], [0, 4, 2, 6], [0.0, 6.0], [6]], ids=str)
def test_cu_seqlens_must_cover_the_row_in_order(bounds):
    case = draw(6, rows=1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        lightning_attention(case.q, case.k, case.v, case.log_decay, cu_seqlens=torch.tensor(bounds))


def test_unknown_backend_names_those_there_are():
    case = draw(3)
    with pytest.raises(ValueError, match=r"no backend 'cuda'; there are auto, .*torch, reference"):
        lightning_attention(case.q, case.k, case.v, case.log_decay, backend="cuda")


def test_dispatch_takes_the_first_that_can_and_says_so_once(caplog):
    refusals = {"fast": "needs a GPU", "slow": None, "slower": None}
    with caplog.at_level(logging.INFO, logger="transnormer"):
        assert dispatch.choose("an op", "auto", refusals) == "slow"
        assert dispatch.choose("an op", "auto", refusals) == "slow"
    assert [record.getMessage() for record in caplog.records] == [
        "an op runs on backend slow; not fast: needs a GPU"
    ]
    assert dispatch.choose("an op", "slower", refusals) == "slower"
    with pytest.raises(RuntimeError, match="backend 'fast' cannot run this call: needs a GPU"):
        dispatch.choose("an op", "fast", refusals)
    with pytest.raises(ValueError, match="no backend 'faster'; there are auto, fast, slow, slower"):
        dispatch.choose("an op", "faster", refusals)


def test_checks_pass_what_fits():
    case = draw(6, lengths=[2, 4])
    check(case.q, case.k, case.v, case.log_decay, case.state, case.cu_seqlens)
    assert len(DECAYS) == case.q.shape[2]
