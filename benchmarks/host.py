"""What the host needs for a training step, by mesh: 385m's 24 layers, but so narrow that hardly anything is computed.

    python benchmarks/host.py [--meshes one shard replicate tensor context] [--repeats 60]

Over a fake process group, which sends nothing. A GPU that is through its work sooner than the host queues the next waits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import record
import torch

from transnormer.config import ModelConfig
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.train import parallel
from transnormer.train.optim import new_optimizer
from transnormer.train.parallel import clip, parallelize
from transnormer.train.plan import Layout
from transnormer.train.plan_check import pretended
from transnormer.train.recipe import Optim

NARROW = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64, "intermediate_size": 128, "vocab_size": 64}
PARTS = ("forward", "backward", "clip", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["one", "shard", "replicate", "tensor", "context"])
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, usual = [], parallel.GATHERED_BYTES
    for mesh in options.meshes:
        for blocks in ("together", "apart") if mesh != "one" else ("together",):
            parallel.GATHERED_BYTES = 0 if blocks == "apart" else usual
            rows.append({"mesh": mesh, "blocks": blocks, **milliseconds(mesh, options.repeats)})
            print(rows[-1], flush=True)
            torch.compiler.reset()
    print(record.save("host", "cpu", rows))


def milliseconds(kind: str, repeats: int) -> dict[str, float]:
    """Medians of the parts of a compiled step, and of the whole."""
    sizes: dict[str, Any] = {} if kind == "one" else {kind: 2}
    layout, device = Layout(**sizes), torch.device("cpu")
    with pretended(layout, device) as mesh:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig.named("385m", **NARROW))
        parallelize(model, mesh, compile=True, dtype="bfloat16")
        model.to_empty(device=device)
        init_weights(model, 1)
        optimizer = new_optimizer(model, Optim())
        ids = torch.zeros(2, 32 // mesh.context, dtype=torch.int64)

        def step() -> list[float]:
            times: list[float] = [time.perf_counter()]
            with torch.autocast("cpu", torch.bfloat16):
                loss: Any = model.loss(ids, ids)
            times.append(time.perf_counter())
            loss.backward()
            times.append(time.perf_counter())
            clip(model, mesh, 1.0)
            times.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter())
            return times

        steps = [step() for _ in range(repeats + 4)][4:]
    found = {part: statistics.median(times[n + 1] - times[n] for times in steps) * 1e3 for n, part in enumerate(PARTS)}
    found["whole"] = statistics.median(times[-1] - times[0] for times in steps) * 1e3
    return {part: round(value, 1) for part, value in found.items()}


if __name__ == "__main__":
    main()
