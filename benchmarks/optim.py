"""AdamW against Muon on Shakespeare: equal steps, each at its best rate of a grid.

    python benchmarks/optim.py [--names adamw muon] [--rates 3e-3 ... 9.6e-2] [--seeds 3] [--steps
    150] [--processes 2]

The validation loss after the last step of the demo's model at half its depth and width. Every rate
runs with seed 0, the best one of each optimizer with the other seeds too; a seed is that of the
weights and of the order of the data."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lib import record

from transnormer import LanguageModel, ModelConfig
from transnormer.data.loader import Loader
from transnormer.data.prepare import prepare
from transnormer.data.shards import TokenData
from transnormer.model.language_model import init_weights
from transnormer.train.optim import learning_rate, new_optimizer
from transnormer.train.recipe import Optim

TEXT = Path(__file__).parent.parent / "examples" / "shakespeare.txt"
SEQ_LEN, ROWS = 128, 8
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 176,
}


def train(data: str, name: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run; a row of the result."""
    torch.set_num_threads(1)
    model = LanguageModel(ModelConfig(vocab_size=1_024, embed_scale=True, **SHAPE))  # type: ignore[arg-type]
    init_weights(model, seed)
    recipe = Optim(name=name, lr=rate, warmup_steps=steps // 15)
    optimizer = new_optimizer(model, recipe)
    loader = Loader(TokenData(data, "train"), seq_len=SEQ_LEN, batch_size=ROWS, seed=seed)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        batch = next(loader)
        model.loss(batch.ids, batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    valid = Loader(TokenData(data, "valid"), seq_len=SEQ_LEN, batch_size=ROWS, seed=0)
    with torch.no_grad():
        losses = [
            model.loss(batch.ids, batch.targets).item()
            for batch in (next(valid) for _ in range(16))
        ]
    row = {
        "name": name,
        "rate": rate,
        "seed": seed,
        "valid_loss": statistics.fmean(losses),
        "seconds": round(seconds, 1),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", nargs="+", default=["adamw", "muon"])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.processes, get_context("spawn")) as pool,
    ):
        data = str(Path(folder) / "data")
        prepare([TEXT], data, vocab_size=1_024, split=0.05)

        def run(jobs: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
            return list(
                pool.map(train, *zip(*[(data, *job, options.steps) for job in jobs], strict=True))
            )

        rows = run([(name, rate, 0) for name in options.names for rate in options.rates])
        best = {
            name: min(
                (row for row in rows if row["name"] == name), key=lambda row: row["valid_loss"]
            )["rate"]
            for name in options.names
        }
        rows += run(
            [(name, best[name], seed) for name in options.names for seed in range(1, options.seeds)]
        )
    summary = []
    for name, rate in best.items():
        losses = [row["valid_loss"] for row in rows if (row["name"], row["rate"]) == (name, rate)]
        summary.append(
            {
                "name": name,
                "rate": rate,
                "mean": statistics.fmean(losses),
                "deviation": statistics.stdev(losses),
            }
        )
    facts = {
        "model": SHAPE,
        "tokens_a_step": SEQ_LEN * ROWS,
        "steps": options.steps,
        "summary": summary,
    }
    print(record.save("optim", "cpu", rows, **facts), *summary, sep="\n")


if __name__ == "__main__":
    main()
