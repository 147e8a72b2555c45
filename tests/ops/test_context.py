"""Context parallelism of Lightning Attention: segments on several processes are the whole row on one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import Case, distance, draw, exact, plain
from torch import Tensor

from transnormer.ops.context import Context
from transnormer.ops.lightning import lightning_attention

GPU = torch.cuda.is_available()
RANKS = 3
LENGTHS = (1, 2, 23, 65)  # of a segment
# Borders where segments meet and elsewhere, empty sequences, one over three segments, one that ends with the row.
PACKED = ([0, 9, 0, 3, 0, 20, 37], [23, 0, 23, 23], [69], [1] * 69, [68, 1], [0, 0, 24, 45])


def cases() -> dict[str, tuple[Case, str]]:
    """Name: a case of whole rows, and the backend that segments of it run on."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for backend in ("torch", "triton"):
            # Interpreted, for there is no second GPU to run on; and that cuts bfloat16 where a GPU rounds.
            if backend == "triton" and (GPU or dtype != torch.float32):
                continue
            for length in LENGTHS if backend == "torch" else (23,):
                case = draw(RANKS * length, 16, 32, dtype=dtype, state=False)
                found[f"{backend} {dtype} {length}"] = case, backend
            for lengths in PACKED if backend == "torch" else PACKED[:1]:
                case = draw(0, 16, 32, dtype=dtype, state=False, lengths=lengths)
                found[f"{backend} {dtype} packed {lengths if len(lengths) < 60 else 'ones'}"] = case, backend
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )  # fmt: skip
    context = Context.of(dist.group.WORLD)
    found = {}
    for name, (case, backend) in cases().items():
        ours = {key: whole(part) for key, part in segment(case, context, backend).items()}
        if rank == 0:
            true = exact(dataclasses.replace(case, d_last=torch.zeros_like(case.d_last)))
            theirs = plain(dataclasses.replace(case, d_last=torch.zeros_like(case.d_last)))
            found[name] = {key: (distance(x, true[key]), distance(theirs[key], true[key])) for key, x in ours.items()}
    for lengths in (None, PACKED[0]):  # strides and all that torch.compile takes for granted
        case = draw(12, 16, 32, state=False, lengths=lengths, dtype=torch.float32)
        length = case.q.shape[1] // RANKS
        q, k, v = (x[:, :length].clone().requires_grad_() for x in (case.q, case.k, case.v))
        place = "torch", context.rank, context.ranks, context.group
        op = torch.ops.transnormer.lightning_segment
        torch.library.opcheck(op, (q, k, v, case.log_decay, case.cu_seqlens, *place))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def segment(case: Case, context: Context, backend: str) -> dict[str, Tensor]:
    """Output and gradients of this process' tokens, and once the state that is left at the row's end."""
    mine = slice(context.rank * case.q.shape[1] // RANKS, (context.rank + 1) * case.q.shape[1] // RANKS)
    leaves = [x[:, mine].clone().requires_grad_() for x in (case.q, case.k, case.v)]
    output = lightning_attention(*leaves, case.log_decay, cu_seqlens=case.cu_seqlens, context=context, backend=backend)
    gradients = torch.autograd.grad(output, leaves, case.d_output[:, mine])
    return {"output": output.detach(), **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))}


def whole(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("context")
    mp.spawn(work, (str(folder),), nprocs=RANKS)
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
def test_the_sum_of_many_tokens_is_cut_in_parts(to_end: bool, window: tuple[int, int] | None) -> None:
    context_triton = pytest.importorskip("transnormer.ops.context_triton")
    case = draw(530, 40, 70, rows=1, decays=[0.0, -1.5, -50.0], state=False, device="cuda" if GPU else "cpu")
    bounds = None if window is None else torch.tensor(window, device=case.k.device)
    found = context_triton.weighted_sum(case.k, case.v, case.log_decay, bounds, to_end)
    away = torch.arange(530).flip(0) if to_end else torch.arange(1, 531)
    weights = (away[:, None].to(case.k.device) * case.log_decay.double()).exp()
    first, stop = window or (0, 530)
    true = torch.einsum(
        "bthk,th,bthv->bhkv",
        *(x[:, first:stop].double() if x.dim() == 4 else x[first:stop] for x in (case.k, weights, case.v)),
    )
    assert (found - true).norm() <= 1e-6 * true.norm()


def test_what_does_not_go_together_is_refused() -> None:
    case, context = draw(4), Context(0, 2, "none")
    with pytest.raises(ValueError, match="a state and a context exclude each other"):
        lightning_attention(case.q, case.k, case.v, case.log_decay, state=case.state, context=context)
    with pytest.raises(RuntimeError, match="segments of a row run on triton or torch"):
        lightning_attention(case.q, case.k, case.v, case.log_decay, context=context, backend="reference")
