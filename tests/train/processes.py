"""Training steps on several processes, which are started once for many of them, and how far they
are from one's."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from transnormer.config import ModelConfig
from transnormer.data.loader import Batch
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.ops import convolution, dispatch, lightning, loss, lrpe, norm
from transnormer.planning import memory
from transnormer.planning.mesh_sizes import Parallel
from transnormer.train import segments
from transnormer.train.mesh import Mesh, make_mesh
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import clip, parallelize
from transnormer.train.parallelize import whole as gathered
from transnormer.train.recipe import Optim

from ..children import run_processes
from ..interpreter import faster_interpreter

TINY = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}  # fmt: skip
ROWS, LENGTH = 4, 16
# borders of the sequences in ROWS x LENGTH tokens, none where these are cut
PACKED = [0, 3, 3, 20, 37, 41, 64]


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step on a mesh, to be compared with the same step of one process."""

    parallel: Parallel
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float64"
    recompute: bool = False
    compile: str = ""  # a backend of torch.compile
    accumulate: int = 1
    packed: bool = False  # for one data rank
    kernels: bool = False  # Triton's, interpreted; not in float64
    float8: str = ""  # of bfloat16
    segment: int = 0  # tokens of a row held at a time; of one process whole rows
    apart: bool = False  # every block gathered by itself, as large ones are
    seed: int = 2  # of the tokens

    def __str__(self) -> str:
        sizes = (
            "x".join(f"{k}{v}" for k, v in dataclasses.asdict(self.parallel).items() if v > 1)
            or "shard"
        )
        flags = [self.dtype, *(f"{k}={v}" for k, v in self.model.items())]
        changed = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)[3:]
            if getattr(self, f.name) != f.default
        }
        flags += [f"{name}={value}" for name, value in changed.items()]
        return f"{sizes} {' '.join(flags)}"


def run(cases: Sequence[Case], world: int, folder: Path) -> list[dict[str, Any]]:
    """What each case found (`compare`), from processes on gloo. If one raised, only that case, with
    its traceback as "error"."""
    with suppress(mp.ProcessExitedException):
        run_processes(_work, world, list(cases), str(folder), count=world)
    return json.loads((folder / "found.json").read_text())


def _work(rank: int, world: int, cases: list[Case], folder: str) -> None:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = []
    for case in cases:
        torch.compiler.reset()
        try:
            found.append(compare(case))
        except Exception:
            if world > 1:  # the others may wait for this one
                Path(folder, "found.json").write_text(
                    json.dumps([{"case": str(case), "error": traceback.format_exc()}])
                )
                sys.stdout.flush()
                os._exit(1)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compare(case: Case) -> dict[str, Any]:
    """The largest relative differences from one process, by kind of what `step` finds.

    In bfloat16 each error from float64 is divided by that of one process in bfloat16. Tensors of 2
    to 99 numbers are left out, because their errors may be zero, and so is Adam's first step,
    because it depends on signs alone. The loss and the norm are allowed one rounding."""
    if case.kernels:
        return _with_kernels(dataclasses.replace(case, kernels=False)) | {"case": str(case)}
    mesh = make_mesh(case.parallel, torch.device("cpu"))
    ours = step(case, mesh)
    if not mesh.first:
        return {}
    alone = Mesh(torch.device("cpu"))
    plain = dataclasses.replace(case, recompute=False, compile="", segment=0)
    true = step(plain, alone, exact=True)
    errors = distances(ours, true)
    if case.dtype != "float64":
        theirs = distances(step(plain, alone), true)
        few = {
            name for name, x in true.items() if 1 < x.numel() < 100 or name.startswith("stepped/")
        }
        least = {name: 2**-9 if x.numel() == 1 else 1e-30 for name, x in true.items()}
        errors = {
            name: error / max(theirs[name], least[name])
            for name, error in errors.items()
            if name not in few
        }
    return {
        "case": str(case),
        "worst": max(errors, key=lambda name: errors[name]),
        "error": "",
        **summary(errors),
    }


def _with_kernels(case: Case) -> dict[str, Any]:
    with faster_interpreter(), pytest.MonkeyPatch.context() as patch:
        for module in (convolution, lightning, loss, lrpe, norm):
            patch.setattr(
                module, "triton_refusal", lambda *x, named: dispatch.triton_refusal(*x, named=True)
            )
        return compare(case)


def summary(errors: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, error in errors.items():
        kind = name.partition("/")[0]
        found[kind] = max(found.get(kind, 0.0), error)
    return found


def distances(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == true.keys()
    return {
        name: (
            (found[name].double() - true[name].double()).norm()
            / true[name].double().norm().clamp(min=1e-30)
        ).item()
        for name in true
    }


def build(case: Case, mesh: Mesh) -> LanguageModel:
    config = ModelConfig.from_dict(TINY).replace(**case.model)
    with torch.device("meta"):
        model = LanguageModel(config)
    if case.dtype == "float64":
        model.double()
    original, most = torch.compile, memory.GATHERED_BYTES
    memory.GATHERED_BYTES = 0 if case.apart else most
    if case.compile:
        torch.compile = partial(original, backend=case.compile)  # type: ignore[assignment]
    dtype = case.dtype if case.dtype == "bfloat16" else "float32"
    settings: dict[str, Any] = {
        "recompute": case.recompute,
        "compile": bool(case.compile),
        "float8": case.float8,
    }
    parallelize(model, mesh, dtype=dtype, **settings)
    torch.compile, memory.GATHERED_BYTES = original, most
    model.to_empty(device="cpu")
    init_weights(model, 1)
    return model


def batches(case: Case) -> list[Batch]:
    """Of all ranks: the microbatches of a step, a fifth of their targets not counted."""
    generator = torch.Generator().manual_seed(case.seed)
    vocab = ModelConfig.from_dict(TINY).replace(**case.model).vocab_size
    found = []
    for _ in range(case.accumulate):
        ids = torch.randint(vocab, (ROWS, LENGTH + 1), generator=generator)
        targets = ids[:, 1:].where(torch.rand(ROWS, LENGTH, generator=generator) > 0.2, -100)
        batch = Batch(ids[:, :-1], targets)
        found.append(
            batch
            if not case.packed
            else Batch(*(x.reshape(1, -1) for x in batch[:2]), torch.tensor(PACKED))
        )
    return found


def step(case: Case, mesh: Mesh, exact: bool = False) -> dict[str, Tensor]:
    """Loss, gradient norm and, whole, by name: weights, gradients, the same clipped to half their
    norm, new weights.

    exact: the same weights, but all in float64.
    """
    model = build(dataclasses.replace(case, float8="") if exact else case, mesh)
    if exact:
        model.double()
    every = batches(case)
    rows = ROWS // mesh.data_ranks
    mine = [
        mesh.split(
            batch if case.packed else Batch(*(x[mesh.data_rank * rows :][:rows] for x in batch[:2]))
        )
        for batch in every
    ]
    learned = mesh.total(torch.tensor(sum(batch.learned for batch in mine)))
    assert learned == sum(batch.learned for batch in every)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in mine:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16" and not exact):
            if case.segment:
                loss += segments.backward(
                    model, batch.ids, batch.targets, case.segment, 1 / learned.double()
                )
                continue
            part = (
                model.loss(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens, reduction="sum")
                / learned
            )
        part.backward()
        loss += part.detach()
    found = {"loss": mesh.total(loss)} | {
        f"weight/{name}": x for name, x in full_tensors(model).items()
    }
    found |= {f"gradient/{name}": whole(p.grad).clone() for name, p in model.named_parameters()}
    total = (
        torch.stack([x.double().square().sum() for name, x in found.items() if "gradient/" in name])
        .sum()
        .sqrt()
    )
    found["norm"] = clip(model, mesh, total.item() / 2)
    found |= {f"clipped/{name}": whole(p.grad).clone() for name, p in model.named_parameters()}
    new_optimizer(model, Optim()).step()
    return found | {f"stepped/{name}": x for name, x in full_tensors(model).items()}


def full_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Copies of whole weights by name on rank 0; {} on the others. All ranks call it."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors = gathered(model.state_dict())
    return {name: tensor.detach().clone() for name, tensor in tensors if first}


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x
