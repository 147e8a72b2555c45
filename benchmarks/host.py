"""What the host needs for a training step, by mesh: 385m's 24 layers, and hardly anything to
compute.

    python benchmarks/host.py [--meshes one shard replicate tensor context] [--repeats 60]
    python benchmarks/host.py --device cuda --profile [--out FOLDER]

On a CPU the layers are narrow; on a GPU a step has 512 tokens, and `--profile` also lists the
functions that take longest. The other processes are a fake process group, which sends nothing. A
GPU waits whenever it ends its work before the host has queued the next."""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from lib import record

from transnormer.config import ModelConfig
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.planning import memory
from transnormer.planning.check import pretended
from transnormer.planning.memory import Layout
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import clip, parallelize
from transnormer.train.recipe import Optim

NARROW = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "vocab_size": 64,
}
PARTS = ("forward", "backward", "clip", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--meshes", nargs="+", default=["one", "shard", "replicate", "tensor", "context"]
    )
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also the functions that take most, of Python's profiler",
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = record.device_name(options.device)
    result: dict[str, Any] = record.head("host", name, options.commit) | {"rows": []}
    path = (
        options.out
        / f"host_{'cpu' if options.device == 'cpu' else record.slug(name)}_{date.today()}.json"
    )
    usual = memory.GATHERED_BYTES
    for mesh in options.meshes:
        for blocks in (
            ("together", "apart") if mesh != "one" and options.device == "cpu" else ("together",)
        ):
            memory.GATHERED_BYTES = 0 if blocks == "apart" else usual
            found = milliseconds(
                mesh, options.repeats, torch.device(options.device), options.profile
            )
            result["rows"].append({"mesh": mesh, "blocks": blocks, **found})
            print(
                {key: value for key, value in result["rows"][-1].items() if key != "functions"},
                flush=True,
            )
            path.write_text(json.dumps(result, indent=1) + "\n")
            torch.compiler.reset()


def milliseconds(kind: str, repeats: int, device: torch.device, profile: bool) -> dict[str, Any]:
    """Medians of the parts of a compiled step until they are queued, and of the whole until the
    device is done."""
    sizes: dict[str, Any] = {} if kind == "one" else {kind: 2}
    layout, narrow = Layout(**sizes), device.type == "cpu"
    with pretended(layout, device) as mesh:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig.named("385m", **(NARROW if narrow else {})))
        parallelize(model, mesh, compile=True, dtype="bfloat16")
        model.to_empty(device=device)
        init_weights(model, 1)
        optimizer = new_optimizer(model, Optim())
        ids = torch.zeros(
            2 if narrow else 1,
            (32 if narrow else 512) // mesh.context,
            dtype=torch.int64,
            device=device,
        )

        def step() -> list[float]:
            times: list[float] = [time.perf_counter()]
            with torch.autocast(device.type, torch.bfloat16):
                loss: Any = model.loss(ids, ids)
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            clip(model, mesh, 1.0)
            times.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter())
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return times

        steps = [step() for _ in range(repeats + 4)][4:]
        functions = {"functions": called(step)} if profile else {}
    found = {
        part: statistics.median(times[n + 1] - times[n] for times in steps) * 1e3
        for n, part in enumerate(PARTS)
    }
    found["tokens"] = ids.numel() * mesh.context
    found["whole"] = statistics.median(times[-1] - times[0] for times in steps) * 1e3
    return {part: round(value, 1) for part, value in found.items()} | functions


def called(
    step: Callable[[], object], steps: int = 5, most: int = 60
) -> list[tuple[str, int, float, float]]:
    """Of a step the functions with most time of their own: name, calls, ms of their own, and with
    those they call."""
    seen = cProfile.Profile()
    # else the backward pass of a GPU is out of sight
    with torch.autograd.set_multithreading_enabled(False):
        step()
        seen.runcall(lambda: [step() for _ in range(steps)])
    table: dict[Any, Any] = pstats.Stats(seen).stats  # type: ignore[attr-defined]
    found = [
        (
            f"{Path(file).name}:{line} {name}",
            calls // steps,
            round(own / steps * 1e3, 3),
            round(whole / steps * 1e3, 3),
        )
        for (file, line, name), (_, calls, own, whole, _) in table.items()
    ]
    return sorted(found, key=lambda row: -row[2])[:most]


if __name__ == "__main__":
    main()
