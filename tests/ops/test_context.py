"""Context parallelism of Lightning Attention: segments on several processes are the whole row on
one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import Case, assert_no_further, distance, draw, exact, plain
from torch import Tensor

from tests.children import run_processes
from tests.interpreter import faster_interpreter
from transnormer.ops import context as contexts
from transnormer.ops.context import Context
from transnormer.ops.gather import gather_past
from transnormer.ops.lightning import lightning_attention

GPU = torch.cuda.is_available()
RANKS = 3
LENGTHS = (1, 2, 23, 65)  # of a segment
WIDTHS = [(16, 16), (64, 64), (128, 64), (128, 128), (256, 128), (33, 47), (200, 72)]
# Borders where segments meet and elsewhere, empty sequences, one over three segments, one that ends
# with the row.
PACKED = ([0, 9, 0, 3, 0, 20, 37], [23, 0, 23, 23], [69], [1] * 69, [68, 1], [0, 0, 24, 45])


def cases() -> dict[str, tuple[Case, str]]:
    """Name: a case of whole rows, and the backend that segments of it run on."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for backend in ("torch", "triton"):
            # Interpreted, for there is no second GPU to run on; and that cuts bfloat16 where a GPU
            # rounds.
            if backend == "triton" and (GPU or dtype != torch.float32):
                continue
            for length in LENGTHS if backend == "torch" else (23,):
                case = draw(RANKS * length, 16, 32, dtype=dtype, state=False)
                found[f"{backend} {dtype} {length}"] = case, backend
            for lengths in PACKED if backend == "torch" else PACKED[:1]:
                case = draw(0, 16, 32, dtype=dtype, state=False, lengths=lengths)
                found[f"{backend} {dtype} packed {lengths if len(lengths) < 60 else 'ones'}"] = (
                    case,
                    backend,
                )
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    context = Context.of(dist.group.WORLD)
    found = {}
    for name, (case, backend) in cases().items():
        with faster_interpreter():
            ours = {key: whole(part) for key, part in segment(case, context, backend).items()}
        if rank == 0:
            true = exact(dataclasses.replace(case, d_last=torch.zeros_like(case.d_last)))
            theirs = plain(dataclasses.replace(case, d_last=torch.zeros_like(case.d_last)))
            found[name] = {
                key: (distance(x, true[key]), distance(theirs[key], true[key]))
                for key, x in ours.items()
            }
    for lengths in (None, PACKED[0]):  # strides and all that torch.compile takes for granted
        case = draw(12, 16, 32, state=False, lengths=lengths, dtype=torch.float32)
        length = case.q.shape[1] // RANKS
        q, k, v = (x[:, :length].clone().requires_grad_() for x in (case.q, case.k, case.v))
        place = "torch", context.rank, context.ranks, context.group
        op = torch.ops.transnormer.lightning_segment
        torch.library.opcheck(op, (q, k, v, case.log_decay, case.cu_seqlens, *place))
    check_gathered_rows(context)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def check_gathered_rows(context: Context) -> None:
    """What is gathered is the row up to the own tokens, and what all processes make of a token
    comes back to it."""
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(1)
        row = torch.randn(2, 12, 3, 5).to(dtype)
        length = row.shape[1] // context.ranks
        begin = context.rank * length
        mine = row[:, begin : begin + length].requires_grad_()
        end = begin + length
        assert torch.equal(gather_past(mine, context), row[:, :end])
        weights = torch.randn(context.ranks, *row.shape).to(dtype)
        own = weights[context.rank, :, :end]
        (gradient,) = torch.autograd.grad(gather_past(mine, context), mine, own)
        # earlier ranks read nothing of these tokens
        wanted = weights[context.rank :].double().sum(0)[:, begin:end]
        torch.testing.assert_close(gradient, wanted.to(dtype))
    x = torch.randn(2, 3, 4, requires_grad=True)
    arguments = (x, context.rank, context.ranks, context.group)
    torch.library.opcheck(torch.ops.transnormer.gather_past, arguments)


def segment(case: Case, context: Context, backend: str) -> dict[str, Tensor]:
    """Output and gradients of this process' tokens, and once the state that is left at the row's
    end."""
    mine = slice(
        context.rank * case.q.shape[1] // RANKS, (context.rank + 1) * case.q.shape[1] // RANKS
    )
    leaves = [x[:, mine].clone().requires_grad_() for x in (case.q, case.k, case.v)]
    output = lightning_attention(
        *leaves, case.log_decay, cu_seqlens=case.cu_seqlens, context=context, backend=backend
    )
    gradients = torch.autograd.grad(output, leaves, case.d_output[:, mine])
    return {"output": output.detach(), **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))}


def whole(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("context")
    run_processes(work, str(folder), count=RANKS)
    return json.loads((folder / "found.json").read_text())


def test_segments_are_the_whole_row(found: dict[str, Any]) -> None:
    exactly = {name: errors for name, errors in found.items() if "float64" in name}
    assert len(exactly) == len(LENGTHS) + len(PACKED)
    for name, errors in exactly.items():
        for key, (error, _) in errors.items():
            assert error < 1e-12, f"{key} of {name}"


def test_in_lower_precision_they_are_as_exact_as_one_process_must_be(found: dict[str, Any]) -> None:
    for name, errors in found.items():
        for key, (error, yardstick) in errors.items():
            assert error <= 2 * yardstick, f"{key} of {name}"


@pytest.mark.parametrize("to_end", [True, False])
@pytest.mark.parametrize("window", [None, (0, 0), (130, 530), (0, 77)])
def test_the_sum_of_many_tokens_is_cut_in_parts(
    to_end: bool, window: tuple[int, int] | None
) -> None:
    check_sum(40, 70, torch.float32, to_end, window)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_sums_of_all_widths(K: int, V: int, dtype: torch.dtype) -> None:
    for to_end in (True, False):
        for window in (None, (130, 530)):
            check_sum(K, V, dtype, to_end, window)


def check_sum(
    K: int, V: int, dtype: torch.dtype, to_end: bool, window: tuple[int, int] | None
) -> None:
    context_triton = pytest.importorskip("transnormer.ops.context_triton")
    case = draw(
        530,
        K,
        V,
        rows=1,
        decays=[0.0, -1.5, -50.0],
        state=False,
        dtype=dtype,
        device="cuda" if GPU else "cpu",
    )
    bounds = None if window is None else torch.tensor(window, device=case.k.device)
    found = context_triton.weighted_sum(case.k, case.v, case.log_decay, bounds, to_end)
    away = torch.arange(530).flip(0) if to_end else torch.arange(1, 531)
    weights = (away[:, None].to(case.k.device) * case.log_decay.double()).exp()[None, :, :, None]
    tokens = slice(*(window or (0, 530)))

    def sums(dtype: torch.dtype) -> Tensor:
        k, v = (
            case.k[:, tokens].to(dtype),
            case.v[:, tokens].to(dtype) * weights[:, tokens].to(dtype),
        )
        return torch.einsum("bthk,bthv->bhkv", k, v)

    assert_no_further("sum", found, sums(dtype), sums(torch.float64), case.k)


# One device plays all ranks of a context, one after the other: what the gathering would bring is
# noted in a first turn.


def in_turn(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Output and gradients of whole rows, computed by segments."""
    parts = [[x.chunk(RANKS, dim=1)[r] for x in (case.q, case.k, case.v)] for r in range(RANKS)]

    def turn(work: Callable[[int], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        noted: list[tuple[Tensor, Tensor]] = []

        def note(state: Tensor, through: Tensor, *_: object) -> None:
            noted.append((state, through))
            raise Noted

        monkeypatch.setattr(contexts, "_gather", note)
        for rank in range(RANKS):
            with suppress(Noted):
                work(rank)
        everybody = tuple(torch.stack(each) for each in zip(*noted, strict=True))
        monkeypatch.setattr(contexts, "_gather", lambda *_: everybody)
        return [work(rank) for rank in range(RANKS)]

    def place(rank: int) -> tuple[Any, ...]:
        return *parts[rank], case.log_decay, case.cu_seqlens, backend, rank, RANKS, ""

    went = turn(lambda rank: contexts._forward(*place(rank)))
    d_output = case.d_output.chunk(RANKS, dim=1)
    back = turn(
        lambda rank: contexts._backward(*place(rank), *went[rank][2:], d_output[rank].contiguous())
    )
    found = {"output": torch.cat([each[0] for each in went], dim=1)}
    return found | {
        f"d_{x}": torch.cat([each[n] for each in back], dim=1) for n, x in enumerate("qkv")
    }


class Noted(Exception):
    """All that was wanted of the first turn."""


def check_turns(
    K: int, V: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, unit = ("cuda", 130) if GPU else ("cpu", 23)
    for lengths in (None, [0, unit - 40 % unit, 0, 40 % unit, unit + 20, unit - 20]):
        case = draw(RANKS * unit, K, V, dtype=dtype, state=False, lengths=lengths, device=device)
        case = dataclasses.replace(case, d_last=torch.zeros_like(case.d_last))
        found, usual, true = in_turn(case, backend, monkeypatch), plain(case), exact(case)
        for name, x in found.items():
            assert_no_further(name, x, usual[name], true[name], case.q, f"packed {lengths}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_in_turn(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transnormer.ops.context_triton")
    check_turns(16, 24, torch.float32, backend, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_ranks_in_turn_of_all_widths(
    K: int, V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_turns(K, V, dtype, "triton", monkeypatch)


def test_what_does_not_go_together_is_refused() -> None:
    case, context = draw(4), Context(0, 2, "none")
    with pytest.raises(ValueError, match="a state and a context exclude each other"):
        lightning_attention(
            case.q, case.k, case.v, case.log_decay, state=case.state, context=context
        )
    with pytest.raises(RuntimeError, match="segments of a row run on triton or torch"):
        lightning_attention(
            case.q, case.k, case.v, case.log_decay, context=context, backend="reference"
        )
