"""Memory as planned beside memory as allocated, in steps of the real sharded, compiled model on one
GPU.

All other processes are pretended by a fake process group. What they would send is any number, so
times and losses say nothing.

    python benchmarks/plan.py [--size 385m] [--seconds 300] [--commit HASH] [--out FOLDER]
    python benchmarks/plan.py --size 7b --compare-tensor [--name plan_tensor]

Writes benchmarks/results/plan_<gpu>_<date>.json. --compare-tensor is as in `transnormer plan`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib import gpu, record

from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.planning.check import pretended
from transnormer.planning.memory import Layout, expected_memory, parameter_shapes
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import parallelize
from transnormer.train.recipe import Optim

SEQ_LEN = 2_048
KINDS: dict[str, dict[str, Any]] = {
    "transnormer": {},
    "LRPE in every layer": {"position_layers": "all"},
    "layernorm": {"norm": "layernorm"},
    "softmax": TRANSFORMER,
}
CASES: list[tuple[str, dict[str, Any], int]] = [  # model, layout, rows of a data rank
    *(
        ("transnormer", {**mesh, "recompute": again}, 16)
        for mesh in (
            {},
            {"tensor": 2},
            {"shard": 8},
            {"shard": 4, "tensor": 2},
            {"context": 2},
            {"tensor": 8},
        )
        for again in (False, True)
    ),
    *(
        ("transnormer", {**mesh, "recompute": again}, 4)
        for mesh in ({"shard": 8}, {"replicate": 2}, {"shard": 8, "accumulate": 2})
        for again in (False, True)
    ),
    *(
        (kind, {**mesh, "recompute": again}, 1)
        for kind in ("LRPE in every layer", "layernorm")
        for mesh in ({"shard": 8}, {"shard": 4, "tensor": 2})
        for again in (False, True)
    ),
    *(("softmax", {**mesh, "recompute": True}, 16) for mesh in ({}, {"shard": 8})),
]
COMPARED: list[tuple[str, dict[str, Any], int]] = [
    (kind, {"shard": 8 // tensor, "tensor": tensor}, 4)
    for kind in ("transnormer", "softmax")
    for tensor in (8, 4, 2, 1)
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="385m")
    parser.add_argument(
        "--compare-tensor", action="store_true", help="eight GPUs by tensor and shard"
    )
    parser.add_argument("--name", default="plan", help="of the result")
    parser.add_argument(
        "--seconds", type=float, default=600, help="begin no further case after so many"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    name = record.device_name("cuda")
    slug = record.slug(name)
    result: dict[str, Any] = record.head(options.name, name, options.commit)
    result |= {"size": options.size, "seq_len": SEQ_LEN, "rows": []}
    end = time.perf_counter() + options.seconds
    for kind, mesh, rows in COMPARED if options.compare_tensor else CASES:
        if time.perf_counter() > end:
            break
        row = {"model": kind, **mesh, "rows": rows}
        found = gpu.attempt(
            partial(one, ModelConfig.named(options.size, **KINDS[kind]), Layout(**mesh), rows)
        )
        result["rows"].append(row | (found if isinstance(found, dict) else {"error": found}))
        print(result["rows"][-1], flush=True)
        (options.out / f"{options.name}_{slug}_{date.today()}.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def one(config: ModelConfig, layout: Layout, rows: int) -> dict[str, Any]:
    """The peak of the third step, when nothing is compiled any more and the optimizer has its
    memory."""
    device = torch.device("cuda")
    with pretended(layout, device) as mesh:
        with torch.device("meta"):
            model = LanguageModel(config)
        parallelize(model, mesh, recompute=layout.recompute, compile=True, dtype="bfloat16")
        model.to_empty(device=device)
        init_weights(model, 1)
        optimizer = new_optimizer(model, Optim())
        ids = torch.randint(config.vocab_size, (rows, SEQ_LEN // layout.context), device=device)
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            for _ in range(layout.accumulate):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = model.loss(ids, ids, reduction="sum") / ids.numel()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    planned = expected_memory(parameter_shapes(config, SEQ_LEN), layout, rows, SEQ_LEN)
    return {"measured_bytes": torch.cuda.max_memory_allocated(), "planned_bytes": planned.allocated}


if __name__ == "__main__":
    main()
