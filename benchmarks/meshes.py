"""Meshes of several GPUs: how far from one process they are, how fast, in how much memory, and what
the plan said.

    torchrun --nproc-per-node 2 benchmarks/meshes.py
    torchrun --nproc-per-node 4 benchmarks/meshes.py --kinds --size 7b --shapes 4x2048 \\
        --meshes "tensor 4" "shard 2, tensor 2"

Meshes not named are one process and all processes by each factor alone and, of four or more, by two
of them. An error is ||gradient - gradient in float32 on one process|| / ||...||, the worst of all
parameters, in bf16 autocast; beside it what one process itself is off by, of the same parameter.
Writes benchmarks/results/<name>_<gpu>x<gpus>_<date>.json. """

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lib import gpu, record

from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.data.loader import Batch
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.model.layers import local
from transnormer.planning.hardware import GPUS
from transnormer.planning.memory import Layout, expected_memory, parameter_shapes
from transnormer.planning.mesh_sizes import Parallel
from transnormer.planning.speed import find_speed
from transnormer.train.mesh import Mesh, make_mesh, start
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import clip, parallelize
from transnormer.train.recipe import Optim, Train
from transnormer.train.step import MicrobatchRunner

EVERYTHING = {
    "position_layers": "all",
    "norm": "rmsnorm",
    "bias": True,
    "gate_rank": 16,
    "tie_word_embeddings": False,
}
KINDS: dict[str, dict[str, Any]] = {
    "transnormer": {},
    "transnormer, everything": EVERYTHING,
    "softmax": TRANSFORMER,
}
HOWS = ("plain", "compile", "recompute", "compile, recompute", "compile, graph")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", default="385m", help="of the speeds; errors are of four layers of 45m"
    )
    parser.add_argument(
        "--shapes", nargs="*", default=["8x2048", "2x8192"], help="rows of a data rank x tokens"
    )
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="of the errors")
    parser.add_argument("--hows", nargs="*", default=list(HOWS), help="of the errors")
    parser.add_argument(
        "--meshes", nargs="+", help='of both, such as "one process" or "shard 2, tensor 2"'
    )
    parser.add_argument("--recompute", action="store_true", help="of the speeds")
    parser.add_argument(
        "--graph",
        action="store_true",
        help="of the speeds: also with both passes as one CUDA graph",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also where a step's time goes, of the first rank"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--name", default="meshes", help="of the result: meshes, meshes_profile, meshes_errors"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    with start(Parallel(), options.device) as mesh:
        cuda = mesh.device.type == "cuda"
        name = record.device_name(mesh.device.type)
        slug = next((kind for kind in GPUS if kind in name.lower()), mesh.device.type)
        path = options.out / f"{options.name}_{slug}x{mesh.world}_{date.today()}.json"
        launcher = ("torchrun", "--nproc-per-node", str(mesh.world))
        matmul = record.matmul_flops(mesh.device.type, torch.bfloat16, 8192 if cuda else 512)
        result: dict[str, Any] = record.head(
            options.name, f"{mesh.world} x {name}", options.commit, launcher
        ) | {
            "all_reduce_gb_per_second": all_reduce_speed(mesh),
            "matmul_tflop_per_second": matmul / 1e12,
            "rows": [],
        }
        meshes = {name: named(name, mesh) for name in options.meshes or default_names(mesh.world)}
        for row in itertools.chain(speeds(meshes, options, slug), errors(meshes, options)):
            result["rows"].append(row)
            if mesh.first:
                path.write_text(json.dumps(result, indent=1) + "\n")
                print(
                    {
                        key: value
                        for key, value in row.items()
                        if key not in ("times_ms", "profile")
                    },
                    flush=True,
                )
        del meshes


def default_names(world: int) -> list[str]:
    factors = ("shard", "tensor", "context", "replicate")
    pairs = [f"{one} 2, {other} {world // 2}" for one, other in itertools.combinations(factors, 2)]
    return [
        "one process",
        *(f"{factor} {world}" for factor in factors),
        *(pairs if world >= 4 and world % 2 == 0 else []),
    ]


def named(name: str, mesh: Mesh) -> Mesh:
    """The mesh of all processes that a name such as "shard 2, tensor 2" means."""
    if name == "one process":
        return Mesh(mesh.device)
    return make_mesh(
        Parallel(**{factor: int(size) for factor, size in map(str.split, name.split(","))}),
        mesh.device,
    )


def all_reduce_speed(mesh: Mesh, size: int = 2**28) -> float:
    """Of one GPU, in GB/s: 2 (n - 1) / n bytes go out for each of a tensor's."""
    if mesh.device.type == "cpu":
        size = 2**22
    x = torch.ones(size, device=mesh.device)
    took = min(record.time_ms(lambda: dist.all_reduce(x), mesh.device.type) for _ in range(5))
    return x.nbytes * 2 * (mesh.world - 1) / mesh.world / took / 1e6


def errors(meshes: dict[str, Mesh], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    alone = Mesh(next(iter(meshes.values())).device)
    for kind in options.kinds:
        config = ModelConfig.named("45m", num_hidden_layers=4, **KINDS[kind])
        true = gradients(config, alone, "float32")
        usual = distances(gradients(config, alone, "bfloat16"), true)
        for name, mesh in meshes.items():
            if mesh.world == 1 or (kind == "softmax" and mesh.context > 1):
                continue
            for how in (
                {word: True for word in each.split(", ") if word != "plain"}
                for each in options.hows
            ):
                row = {"model": kind, "mesh": name, **how}
                found = gpu.attempt(partial(gradients, config, mesh, "bfloat16", **how))
                if isinstance(found, str):
                    row["error"] = found
                else:
                    off = distances(found, true)
                    worst = max(off, key=lambda key: off[key] / max(usual[key], 2**-9))
                    row |= {
                        "of": worst,
                        "off": off[worst],
                        "one_process_off": usual[worst],
                        "loss_off": off["loss"],
                    }
                    if not how:
                        row["float32_off"] = max(
                            distances(gradients(config, mesh, "float32"), true).values()
                        )
                yield row
                forget()


def build(config: ModelConfig, mesh: Mesh, dtype: str, **how: Any) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config)
    parallelize(model, mesh, dtype=dtype, **how)
    model.to_empty(device=mesh.device)
    init_weights(model, 1)
    return model


def draw(config: ModelConfig, mesh: Mesh, rows: int, length: int) -> Batch:
    """This rank's part of `rows` rows over all data ranks."""
    ids = torch.randint(
        config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(2)
    )
    mine = ids.chunk(mesh.data_ranks)[mesh.data_rank]
    return mesh.split(Batch(mine[:, :-1], mine[:, 1:])).to(mesh.device)


def gradients(
    config: ModelConfig, mesh: Mesh, dtype: str, graph: bool = False, **how: Any
) -> dict[str, torch.Tensor]:
    """Of four rows of 512 tokens: the loss, every gradient, their norm."""
    model = build(config, mesh, dtype, **how)
    batch = draw(config, mesh, 4, 512)
    learned = torch.full((), 4.0 * 512, device=mesh.device)
    with MicrobatchRunner(model, mesh, Train(dtype=dtype, graph=graph)) as runner:
        if graph:  # recorded with other weights and tokens
            _scale(model, 0.5)
            runner(batch._replace(ids=batch.ids.flip(1)), learned)
            _scale(model, 2.0)
            model.zero_grad()
        loss = runner(batch, learned).clone()
    found = {"loss": mesh.total(loss).double().cpu()}
    for name, p in model.named_parameters():
        gradient: Any = p.grad
        found[name] = (
            (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
            .double()
            .cpu()
        )
    return found | {"norm": clip(model, mesh, 1.0).double().cpu()}


def _scale(model: LanguageModel, factor: float) -> None:
    for p in model.parameters():
        local(p.detach()).mul_(factor)


def distances(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name] - x).norm() / x.norm().clamp(min=1e-30))
        for name, x in true.items()
    }


def speeds(
    meshes: dict[str, Mesh], options: argparse.Namespace, kind: str
) -> Iterator[dict[str, Any]]:
    config = ModelConfig.named(options.size)
    for shape, (name, mesh), graph in itertools.product(
        options.shapes, meshes.items(), (False, True) if options.graph else (False,)
    ):
        rows, length = map(int, shape.split("x"))
        row = {
            "model": "transnormer",
            "size": options.size,
            "mesh": name,
            "rows": rows,
            "seq_len": length,
        }
        row |= {"recompute": True} if options.recompute else {}
        row |= {"graph": True} if graph else {}
        found = gpu.attempt(partial(speed, config, mesh, rows, length, options, graph))
        plan = planned(config, mesh, rows, length, options.recompute, kind)
        yield row | (found if isinstance(found, dict) else {"error": found}) | plan
        forget()


def speed(
    config: ModelConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    options: argparse.Namespace,
    graph: bool,
    steps: int = 8,
) -> dict[str, Any]:
    """Steps with AdamW of the compiled model, `rows` on every data rank."""
    model = build(config, mesh, "bfloat16", compile=True, recompute=options.recompute)
    optimizer = new_optimizer(model, Optim())
    batch = draw(config, mesh, rows * mesh.data_ranks, length)
    tokens, kind = rows * mesh.data_ranks * length, mesh.device.type
    learned = torch.full((), float(tokens), device=mesh.device)
    with MicrobatchRunner(model, mesh, Train(dtype="bfloat16", graph=graph)) as runner:

        def step() -> torch.Tensor:
            loss = runner(batch, learned)
            clip(model, mesh, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        first = record.time_ms(step, kind) / 1e3
        # of what is reserved from here on: a graph's memory is, but never allocated
        if kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = [record.time_ms(step, kind) for _ in range(steps + 2)][2:]
        return {
            "tokens_per_second": round(tokens / statistics.median(times) * 1e3),
            "first_step_seconds": round(first, 1),
            "peak_bytes": torch.cuda.max_memory_allocated()
            if kind == "cuda" and not graph
            else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if kind == "cuda" else None,
            "loss": mesh.total(step()).item(),
            "times_ms": [round(t, 2) for t in times],
        } | ({"profile": gpu.profiled(step)} if options.profile else {})


def planned(
    config: ModelConfig, mesh: Mesh, rows: int, length: int, recompute: bool, kind: str
) -> dict[str, Any]:
    if kind not in GPUS:
        return {}
    shapes = parameter_shapes(config, length)
    layout = Layout(**mesh.sizes, recompute=recompute)
    return {
        "planned_bytes": expected_memory(shapes, layout, rows, length).allocated,
        "planned_tokens_per_second": round(find_speed(shapes, layout, GPUS[kind], rows, length)[0]),
    }


def forget() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    dist.barrier()


if __name__ == "__main__":
    main()
