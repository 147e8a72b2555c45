"""The Triton kernels: in Triton's interpreter where there is no GPU, and the full matrix on one.

Interpreted, float32 to bfloat16 truncates, which costs up to twice the error of rounding; the rule
is widened by that."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import (
    DECAYS,
    assert_within_twice,
    compiled_and_eager_gradients,
    distance,
    draw,
    exact,
    plain,
    run,
)

from transnormer.ops import lightning, lightning_attention, lightning_step_
from transnormer.ops.dispatch import choose

launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
lightning_triton = pytest.importorskip("transnormer.ops.lightning_triton")
tiles_triton = pytest.importorskip("transnormer.ops.lightning_tiles_triton")
Tiles = tiles_triton.Tiles
GPU = torch.cuda.is_available() and not launch_triton.INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
if not GPU and not launch_triton.INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
HALF = [torch.bfloat16, torch.float16]
PACKED = [[0, 70, 0, 1, 64, 0], [130, 20, 130], [0, 0, 3], [64] * 2]


def attention(q, k, v, log_decay, **options):
    return lightning_attention(q, k, v, log_decay, return_state=True, backend="triton", **options)


def with_tiles(tiles=None, segments=None):
    """The kernels with another configuration or number of segments than they would choose."""

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, log_decay, state, cu_seqlens):
            ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens)
            return lightning_triton.forward(
                q, k, v, log_decay, state, cu_seqlens, tiles=tiles, segments=segments
            )

        @staticmethod
        def backward(ctx, d_output, d_last):
            gradients = lightning_triton.backward(
                *ctx.saved_tensors, d_output, d_last, tiles=tiles, segments=segments
            )
            return *gradients[:3], None, gradients[3] if gradients[3].numel() else None, None

    return lambda q, k, v, log_decay, *, state, cu_seqlens: Op.apply(
        q, k, v, log_decay, state, cu_seqlens
    )


def check(op, case, note=""):
    interpreted_bfloat16 = not GPU and case.q.dtype == torch.bfloat16
    assert_within_twice(op, case, note, factor=4 if interpreted_bfloat16 else 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("length", [1, 2, 64, 65, 150])
def test_error_is_at_most_twice_that_of_plain_torch(length, dtype):
    check(
        attention, draw(length, decays=[0.0, -0.25, -50.0], dtype=dtype, seed=length, device=DEVICE)
    )


@pytest.mark.parametrize(("K", "V"), [(40, 16), (100, 70), (17, 33)])
def test_any_width(K, V):
    for dtype in (torch.float32, torch.float16):
        check(
            attention,
            draw(70, K, V, rows=1, decays=[0.0, -0.1], dtype=dtype, device=DEVICE),
            f"{K} {V} {dtype}",
        )


@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
@pytest.mark.parametrize("segments", [2, 3])
def test_time_in_segments(segments, state):
    case = draw(150, rows=1, decays=[-0.03, -50.0], state=state, dtype=torch.float32, device=DEVICE)
    check(with_tiles(segments=segments), case)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed_sequences(lengths, state, segments):
    case = draw(
        0, lengths=lengths, state=state, decays=[0.0, -0.5], dtype=torch.float32, device=DEVICE
    )
    check(with_tiles(segments=segments), case)


def test_more_sequences_than_a_block_of_boundaries():
    lengths = [int(n % 10 == 0) for n in range(131)]
    case = draw(0, K=16, V=16, lengths=lengths, decays=[-0.1], dtype=torch.float32, device=DEVICE)
    check(with_tiles(segments=2), case)


@pytest.mark.parametrize("bounds", [torch.int32, torch.int64], ids=str)
def test_packed_through_the_public_op(bounds):
    case = draw(0, lengths=[30, 0, 100], dtype=torch.float16, device=DEVICE)
    case.cu_seqlens = case.cu_seqlens.to(bounds)
    check(attention, case)


@pytest.mark.parametrize(
    "tiles",
    [Tiles(32, 64, 4, 1), Tiles(128, 64, 8, 1), Tiles(64, 64, 4, 2, described=True)],
    ids=str,
)
def test_tiles(tiles):
    case = draw(140, K=48, V=80, rows=1, decays=[-0.05], dtype=torch.float16, device=DEVICE)
    for segments in (1, 2):
        check(with_tiles(tiles, segments), case, f"{segments} segments")


def test_strides_do_not_matter():
    case = draw(40, rows=2, decays=[0.0, -0.5], dtype=torch.float32, device=DEVICE)
    want = run(attention, case)
    for name in ("q", "k", "v", "d_output"):
        setattr(case, name, getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2))
    case.state, case.d_last = (x.mT.contiguous().mT for x in (case.state, case.d_last))
    for name, found in run(attention, case).items():
        assert torch.equal(found, want[name]), name
    q, k, v = torch.cat([case.q, case.k, case.v], -1).split([16, 16, 16], -1)
    assert torch.equal(attention(q, k, v, case.log_decay, state=case.state)[0], want["output"])
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (case.q, case.k, case.v))
    assert torch.equal(attention(q, k, v, case.log_decay, state=case.state)[0], want["output"])
    leaf = case.q.clone().requires_grad_()
    # the gradient is one number, expanded
    attention(leaf, case.k, case.v, case.log_decay)[0].sum().backward()
    copied = case.q.clone().requires_grad_()
    attention(copied, case.k, case.v, case.log_decay)[0].backward(torch.ones_like(case.v))
    assert torch.equal(leaf.grad, copied.grad)


def test_gradients_of_the_output_alone_and_of_the_state_alone():
    case = draw(30, dtype=torch.float32, device=DEVICE)
    for only, other in ((0, "d_last"), (1, "d_output")):
        leaves = [getattr(case, name).clone().requires_grad_() for name in ("q", "k", "v", "state")]
        result = attention(*leaves[:3], case.log_decay, state=leaves[3])[only]
        found = torch.autograd.grad(result, leaves, (case.d_output, case.d_last)[only])
        blank = draw(30, dtype=torch.float32, device=DEVICE)
        setattr(blank, other, torch.zeros_like(getattr(blank, other)))
        want = exact(blank)
        for name, gradient in zip(("q", "k", "v", "state"), found, strict=True):
            assert distance(gradient, want[f"d_{name}"]) < 1e-6, name


def test_two_calls_joined_by_the_state_are_one():
    case = draw(100, decays=[-0.1], dtype=torch.float32, device=DEVICE)

    def halves(q, k, v, log_decay, *, state, cu_seqlens):
        first, between = attention(q[:, :70], k[:, :70], v[:, :70], log_decay, state=state)
        second, last = attention(q[:, 70:], k[:, 70:], v[:, 70:], log_decay, state=between)
        return torch.cat([first, second], 1), last

    check(halves, case)


def test_a_float16_state_beyond_float16_is_read_right():
    case = draw(300, rows=1, decays=[0.0], state=False, dtype=torch.float16, device=DEVICE)
    case.k, case.v = 32 * case.k.abs(), 32 * case.v.abs()
    case.q = case.q / 1000
    output, last = attention(case.q, case.k, case.v, case.log_decay)
    assert last.max() > 65_504
    assert distance(output, exact(case)["output"]) < 1e-2


def test_no_tokens_and_no_rows():
    case = draw(0, device=DEVICE)
    found = run(attention, case)
    assert torch.equal(found["last"], case.state)
    assert torch.equal(found["d_state"], case.d_last)
    none = draw(5, rows=0, device=DEVICE)
    assert run(attention, none)["d_q"].shape == none.q.shape


def test_step_in_place():
    for dtype, (K, V) in itertools.product((torch.float32, torch.bfloat16), ((16, 16), (40, 70))):
        case = draw(1, K, V, dtype=dtype, device=DEVICE)
        state = case.state.float().mT.contiguous().mT
        output = lightning_step_(case.q, case.k, case.v, case.log_decay, state, backend="triton")
        true, yardstick = exact(case), plain(case)
        assert output.dtype == dtype
        assert distance(state, true["last"]) < 1e-6
        assert distance(output, true["output"]) <= 2 * (1 + (not GPU)) * distance(
            yardstick["output"], true["output"]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_with_swish_is_that_of_the_swish(dtype):
    case = draw(1, 40, 24, dtype=dtype, device=DEVICE)
    found, state = {}, {"triton": case.state.float(), "torch": case.state.float()}
    for backend, s in state.items():
        arguments = case.q, case.k, case.v, case.log_decay, s
        found[backend] = lightning_step_(*arguments, swish=True, backend=backend)
    swish = [torch.nn.functional.silu(x.double()) for x in (case.q, case.k)]
    last = case.state.double()
    true = lightning_step_(*swish, case.v.double(), case.log_decay, last)
    for ours, usual, want in (
        (found["triton"], found["torch"], true),
        (state["triton"], state["torch"], last),
    ):
        assert distance(ours, want) <= 2 * (1 + (not GPU)) * distance(usual, want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_a_step_by_slots_is_the_step_of_those_states(dtype):
    case = draw(1, 40, 24, rows=3, device=DEVICE)
    states = torch.full((5, *case.state.shape[1:]), torch.nan, device=DEVICE)
    states[[4, 0]] = case.state[[0, 2]]
    slots = torch.tensor([4, -1, 0], dtype=dtype, device=DEVICE)
    arguments = case.q, case.k, case.v, case.log_decay
    output = lightning_step_(*arguments, states, slots=slots, backend="triton")
    alone = case.state.clone()
    want = lightning_step_(*arguments, alone, backend="triton")
    assert torch.equal(output[[0, 2]], want[[0, 2]])
    assert torch.equal(states[[4, 0]], alone[[0, 2]])
    assert states[1:4].isnan().all()


def test_two_runs_are_equal_to_the_bit():
    case = draw(150, K=40, rows=1, decays=[-0.1], dtype=torch.float16, device=DEVICE)
    first, second = (run(with_tiles(segments=2), case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, [0, 100, 0, 50, 1, 0]], ids=["rows", "packed"])
def test_every_element_is_written(lengths):
    case = draw(
        150, K=17, V=16, rows=1, lengths=lengths, decays=[-0.1], dtype=torch.float32, device=DEVICE
    )
    for segments in (1, 2):
        for name, found in run(with_tiles(segments=segments), case).items():
            assert found.isfinite().all(), name


def test_compile_passes_through():
    case = draw(20, K=16, V=16, decays=[-0.1], rows=1, device=DEVICE)

    for found, want in compiled_and_eager_gradients(attention, case):
        assert torch.equal(found, want)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_registration(packed):
    case = draw(10, decays=[-0.2], rows=1, lengths=[4, 0, 6] if packed else None, device=DEVICE)
    ops = torch.ops.transnormer
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    fixed = [x.detach() for x in leaves]
    torch.library.opcheck(
        ops.lightning_triton,
        (*leaves, case.log_decay, case.state.requires_grad_(), case.cu_seqlens),
    )
    torch.library.opcheck(
        ops.lightning_triton_backward,
        (*fixed, case.log_decay, None, case.cu_seqlens, case.d_output, None),
    )
    if not packed:
        token = [x[:, :1].clone() for x in fixed]
        state = case.state.detach()
        torch.library.opcheck(ops.lightning_triton_step, (*token, case.log_decay, state))
        for slots in (None, torch.zeros(1, dtype=torch.int64, device=DEVICE)):
            torch.library.opcheck(
                ops.lightning_triton_step_, (*token, case.log_decay, state, slots, True)
            )


@pytest.mark.parametrize(
    ("K", "V", "dtype", "reason"),
    [
        (300, 16, torch.float32, "K = 300 is not from 16 to 256"),
        (16, 8, torch.float32, "V = 8 is not from 16 to 256"),
        (16, 16, torch.float64, "float64"),
    ],
)
def test_what_cannot_run_says_why(K, V, dtype, reason):
    case = draw(3, K, V, dtype=dtype, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this call: .*{reason}"):
        attention(case.q, case.k, case.v, case.log_decay)


def test_on_the_cpu_auto_does_not_interpret(monkeypatch):
    case, chosen = draw(3), []
    monkeypatch.setattr(
        lightning, "choose", lambda *call: chosen.append(choose(*call)) or chosen[-1]
    )
    lightning_attention(case.q, case.k, case.v, case.log_decay)
    assert chosen == ["torch"]


def test_at_most_three_configurations_are_tried_and_one_fits_everywhere():
    for K, V, dtype, shared, paired in itertools.product(
        (16, 64, 128, 192, 256),
        (16, 128, 256),
        (torch.float32, *HALF),
        (65_536, 101_376, 166_912, 232_448),
        (False, True),
    ):
        found = tiles_triton.choices(K, V, dtype, shared, paired=paired)
        assert 1 <= len(found) <= 3
        block = tiles_triton.tile_width(K, dtype)
        assert all(tiles.shared_bytes(block, dtype.itemsize) <= shared for tiles in found), (
            K,
            V,
            dtype,
            shared,
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("K", "V"), [(40, 24), (200, 136)])
def test_what_runs_where_shared_memory_is_small(K, V, dtype, monkeypatch):
    monkeypatch.setattr(lightning_triton, "device_limits", lambda index: (4, 65_536, False))
    check(attention, draw(35, K, V, rows=1, decays=[0.0, -0.3], dtype=dtype, device=DEVICE))


@pytest.mark.parametrize(
    ("programs", "chunks", "least", "most"),
    [(1, 1, 1, 1), (256, 128, 1, 1), (64, 2_048, 4, 16), (32, 32, 3, 8)],
)
def test_time_is_cut_where_rows_and_heads_do_not_fill_the_gpu(programs, chunks, least, most):
    assert least <= tiles_triton.segmentation(programs, programs, chunks, 132) <= most


# The full matrix.

WIDTHS = [
    (16, 16),
    (64, 64),
    (128, 128),
    (256, 128),
    (128, 256),
    (256, 256),
    (96, 160),
    (80, 64),
    (33, 47),
    (200, 72),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
class TestMatrix:
    pytestmark = gpu

    @pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 500])
    def test_lengths(self, K, V, dtype, length):
        for state in (True, False):
            case = draw(length, K, V, dtype=dtype, state=state, seed=length, device=DEVICE)
            assert_within_twice(attention, case, f"state {state}")

    @pytest.mark.parametrize("segments", [2, 3])
    def test_segments(self, K, V, dtype, segments):
        case = draw(500, K, V, dtype=dtype, device=DEVICE)
        assert_within_twice(with_tiles(segments=segments), case)

    @pytest.mark.parametrize("lengths", [*PACKED, [1] * 70, [0, 500, 3]], ids=str)
    def test_packed(self, K, V, dtype, lengths):
        for segments in (1, 3):
            case = draw(0, K, V, lengths=lengths, dtype=dtype, device=DEVICE)
            assert_within_twice(with_tiles(segments=segments), case)

    @pytest.mark.usefixtures("poisoned")
    def test_written_and_repeatable(self, K, V, dtype):
        case = draw(300, K, V, dtype=dtype, device=DEVICE)
        first, second = run(attention, case), run(attention, case)
        for name in first:
            wrong = ~first[name].isfinite()
            assert not wrong.any(), (
                f"{name}: {wrong.sum()} of {wrong.numel()}, from {wrong.nonzero()[0].tolist()} on"
            )
            assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("K", "V"),
    [(199, 72), (200, 72), (136, 200), (144, 48), (240, 255), (256, 16), (16, 256), (256, 256)],
)
def test_wide_states_in_half_precision(K, V, dtype):
    """A state in another dtype is another kernel to the compiler, which once spoiled just this."""
    for segments in (1, 2):
        assert_within_twice(
            with_tiles(segments=segments), draw(300, K, V, dtype=dtype, device=DEVICE), state=dtype
        )
    case = draw(0, K, V, lengths=[100, 0, 150], dtype=dtype, device=DEVICE)
    assert_within_twice(attention, case, "packed", state=dtype)


@pytest.mark.parametrize("decay", DECAYS)
class TestLong:
    pytestmark = gpu

    def test_a_million_tokens(self, decay):
        """The second half, begun anew from the first half's state in float64 sums, equals the
        second half of the whole."""
        length, half = 1_048_576, 524_288
        case = draw(1, 64, 64, rows=1, decays=[decay] * 40, state=False, dtype=torch.bfloat16)
        q, k, v = (
            torch.randn(1, length, 40, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
        )
        assert q.numel() > 2**31
        log_decay = case.log_decay.to(DEVICE)
        output, last = attention(q, k, v, log_decay)
        _, middle = attention(q[:, :half], k[:, :half], v[:, :half], log_decay)
        again, last_again = attention(
            q[:, half:], k[:, half:], v[:, half:], log_decay, state=middle
        )
        assert distance(output[:, half:, 39], again[:, :, 39]) < 1e-2
        assert distance(last, last_again) < 1e-4
        tail = slice(length - 100, length)
        before = attention(*(x[:, : length - 100] for x in (q, k, v)), log_decay)[1]
        true = lightning_attention(
            *(x[:, tail].double() for x in (q, k, v)),
            log_decay,
            state=before.double(),
            backend="reference",
        )
        assert distance(output[:, tail], true) < 1e-2

    def test_gradients_of_a_million_tokens(self, decay):
        """Those of the last tokens, from the state before them, in tensors of more than 2^31
        elements."""
        length, heads, rest = 1_048_576, 33, 100
        q, k, v, g = (
            torch.randn(1, length, heads, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)
        )
        assert q.numel() > 2**31
        log_decay = torch.full((heads,), decay, device=DEVICE)
        gradients = lightning_triton.backward(q, k, v, log_decay, None, None, g, None)
        before = lightning_triton.forward(*(x[:, :-rest] for x in (q, k, v)), log_decay)[1]
        leaves = [x[:, -rest:].double().requires_grad_() for x in (q, k, v)]
        output = lightning_attention(*leaves, log_decay, state=before.double(), backend="reference")
        for found, true in zip(
            gradients, torch.autograd.grad(output, leaves, g[:, -rest:].double()), strict=False
        ):
            assert distance(found[:, -rest:], true) < 1e-2
            assert found.isfinite().all()


class TestGraph:
    pytestmark = gpu

    def test_capture_and_replay(self):
        case = draw(300, 64, 64, dtype=torch.bfloat16, device=DEVICE)
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            run(attention, case)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(attention, case)
        for x in (case.q, case.k, case.v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        for name, want in run(attention, case).items():
            assert torch.equal(found[name], want), name

    def test_step_replays(self):
        case = draw(1, 128, 128, dtype=torch.bfloat16, device=DEVICE)
        state = case.state.float()
        lightning_step_(case.q, case.k, case.v, case.log_decay, state.clone())
        graph = torch.cuda.CUDAGraph()
        kept = state.clone()
        with torch.cuda.graph(graph):
            lightning_step_(case.q, case.k, case.v, case.log_decay, state)
        state.copy_(kept)
        for _ in range(3):
            graph.replay()
        want = kept
        for _ in range(3):
            want = lightning_attention(
                case.q,
                case.k,
                case.v,
                case.log_decay,
                state=want,
                return_state=True,
                backend="torch",
            )[1]
        assert distance(state, want) < 1e-6

    def test_inductor(self):
        case = draw(100, 64, 64, dtype=torch.bfloat16, device=DEVICE)
        compiled = torch.compile(attention, fullgraph=True)
        for found, want in zip(
            compiled(case.q, case.k, case.v, case.log_decay),
            attention(case.q, case.k, case.v, case.log_decay),
            strict=True,
        ):
            assert torch.equal(found, want)
