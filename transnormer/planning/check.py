"""Checks a plan against the real sharding code, on pretended processes, and builds the tables of
`transnormer plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from ..config import ModelConfig
from ..layer_config import LayerConfig
from ..model.language_model import LanguageModel
from ..train.mesh import Mesh, make_mesh
from ..train.parallelize import parallelize
from . import scaling
from .memory import Layout, Memory, block_kinds, one_of_each
from .search import Job, Plan, saving

MOST_PRETENDED = 4_096  # processes; torch makes a group of processes for each, one after another


@contextmanager
def pretended(layout: Layout, device: torch.device) -> Iterator[Mesh]:
    """The mesh of this process and of pretended ones, by PyTorch's fake process group: what they
    send is arbitrary.

    Raises RuntimeError inside a process group.
    """
    if layout.world == 1:
        yield Mesh(device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan cannot be checked inside a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    try:
        yield make_mesh(layout, device)
    finally:
        dist.destroy_process_group()


def weight_bytes(config: ModelConfig, layout: Layout) -> int:
    """Bytes of the weights that the first of `layout.world` processes holds, by `parallelize`
    itself.

    The other processes are pretended, the weights are on the meta device. Blocks of a kind hold
    alike, so one or two of each are cut. Raises RuntimeError inside a process group."""
    kinds = block_kinds(config)
    # whose copies hold alike, too
    with pretended(replace(layout, replicate=1), torch.device("cpu")) as mesh:

        def cut(blocks: list[LayerConfig]) -> int:
            with torch.device("meta"):
                model = LanguageModel(one_of_each(config, blocks))
            parallelize(model, mesh, recompute=layout.recompute, dtype="bfloat16")
            return sum(held(p).nbytes for p in model.parameters())

        once = cut([*kinds])
        return once + sum(
            (count - 1) * (cut([*kinds, kind]) - once) for kind, count in kinds.items() if count > 1
        )


def held(x: Any) -> Any:
    """What this process has of a DTensor, even where its process group is gone; any other tensor as
    it is."""
    return getattr(x, "_local_tensor", x)


def check_plan(config: ModelConfig, plan: Plan) -> bool:
    """Whether the plan was checked: not where too many processes would have to be pretended.

    Raises RuntimeError where the real shards are not as large as planned.
    """
    if plan.layout.world // plan.layout.replicate > MOST_PRETENDED:
        return False
    real = weight_bytes(config, plan.layout)
    if real != plan.memory.weights:
        raise RuntimeError(
            f"planned {plan.memory.weights:,} bytes of weights a GPU for {plan.layout}, but it "
            f"has {real:,}"
        )
    return True


# What is shown.


MEANINGS = {
    "replicate": "copies of the model",
    "shard": "GPUs that share a copy",
    "context": "GPUs that share a row",
    "tensor": "GPUs that share products",
    "accumulate": "microbatches a step",
    "recompute": "activations twice",
}


def table(job: Job, plans: list[Plan]) -> Table:
    """One column a plan; memory in GiB."""
    shown = Table(title=_title(job), title_justify="left")
    shown.add_column("", overflow="fold")
    for n in range(len(plans)):
        shown.add_column("best" if n == 0 else f"{n + 1}.", justify="right", no_wrap=True)

    def add(name: str, values: list[str], end: bool = False) -> None:
        shown.add_row(name, *values, end_section=end)

    for name, meaning in MEANINGS.items():
        values = [getattr(plan.layout, name) for plan in plans]
        shown_values = [("yes" if x else "no") if isinstance(x, bool) else f"{x:,}" for x in values]
        add(f"{name}: {meaning}", shown_values, name == "recompute")
    for item in dataclasses.fields(Memory):
        add(f"{item.name}, GiB a GPU", [_gib(getattr(plan.memory, item.name)) for plan in plans])
    add(f"together, of {job.gpu.gib:g}", [_gib(plan.memory.total) for plan in plans], True)
    add("tokens/s", [f"{plan.tokens_per_second:,.0f}" for plan in plans])
    add("tokens/s a GPU", [f"{plan.tokens_per_second / job.gpus:,.0f}" for plan in plans])
    add("days", [f"{plan.days:,.1f}" for plan in plans])
    add("energy of the GPUs, MWh", [f"{plan.megawatt_hours:,.2f}" for plan in plans], True)
    for factor in plans[0].bytes_per_step:
        sent = [plan.bytes_per_step[factor] for plan in plans]
        if any(sent):
            add(f"sent for {factor}, GB a step", [f"{x / 1e9:,.2f}" for x in sent])
    return shown


def as_settings(job: Job, plan: Plan) -> list[str]:
    """A plan as the settings of a recipe that train so."""
    settings: dict[str, object] = {
        f"parallel.{name}": size for name, size in plan.layout.sizes.items()
    }
    settings |= {
        "train.accumulate": plan.layout.accumulate,
        "train.recompute": plan.layout.recompute,
        "train.seq_len": job.seq_len,
        "train.batch_tokens": job.rows * job.seq_len,
        "train.dtype": "bfloat16",
        "train.compile": True,
    }
    return [f"{key}={str(value).lower()}" for key, value in settings.items()]


def compared(models: dict[str, list[Plan]]) -> Table:
    """Memory and speed a GPU by tensor parallelism, models side by side."""
    columns = [f"{name}, {what}" for name in models for what in ("GB", "tokens/s")]
    shown = Table("tensor", *columns)
    for column in shown.columns:
        column.justify = "right"
    for row in zip(*models.values(), strict=True):
        cells = [
            [f"{p.memory.allocated / 1e9:.1f}", f"{p.tokens_per_second / p.layout.world:,.0f}"]
            for p in row
        ]
        shown.add_row(str(row[0].layout.tensor), *(cell for pair in cells for cell in pair))
    shown.add_section()
    shown.add_row(
        "saved", *(cell for plans in models.values() for cell in (f"{saving(plans):.1%}", ""))
    )
    return shown


def record(job: Job, plans: list[Plan]) -> dict[str, Any]:
    """For --json: everything in bytes, seconds' rates, days and nats."""
    fits = scaling.read_fits()
    found = scaling.predict_model(job.config, job.tokens, fits) if fits else None
    return {
        "model": job.config.to_dict(),
        "parameters": job.config.parameter_count(),
        "gpus": job.gpus,
        "gpu": job.gpu_name,
        "tokens": job.tokens,
        "seq_len": job.seq_len,
        "batch_tokens": job.rows * job.seq_len,
        "predicted_loss": dataclasses.asdict(found) if found else None,
        "plans": [
            {
                **dataclasses.asdict(plan),
                "memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
            }
            for plan in plans
        ],
    }


def _title(job: Job) -> str:
    return (
        f"{job.config.parameter_count() / 1e9:,.2f} billion parameters, {job.tokens / 1e9:,.0f} "
        "billion tokens on "
        f"{job.gpus} x {job.gpu_name}\n{job.rows:,} rows of {job.seq_len:,} tokens a step"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"
