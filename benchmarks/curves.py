"""Curves of whole runs that differ in one thing: real text, a real size, every step as `transnormer
train` makes it.

    python benchmarks/curves.py DATA --device cuda [--size 385m] [--steps 300] [--batch-tokens
    16384] [--variants ...]

DATA is a prepared folder. The first variant also runs from another seed (weights and order of the
data), which says how much of a difference is chance. Writes
benchmarks/results/curves_<gpu>_<date>.json."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from lib import record

from transnormer.train.loop import train
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float8 tensorwise": {"train": {"float8": "tensorwise"}},
    "float8 rowwise": {"train": {"float8": "rowwise"}},
    "muon": {"optim": {"name": "muon"}},
    "8 bits": {"optim": {"bits": 8}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="385m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=2_048)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    data, out = options.data.resolve(), options.out.resolve()
    name = record.device_name(options.device)
    slug = record.slug(name) if options.device != "cpu" else "cpu"
    result: dict[str, Any] = record.head("curves", name, options.commit) | {
        "data": [
            Path(x).name for x in json.loads((data / "data.json").read_text())["source"]["inputs"]
        ],
        "size": options.size,
        "steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "lr": options.lr,
        "rows": [],
    }
    jobs = [(variant, 0) for variant in options.variants] + [(options.variants[0], 1)]
    for variant, seed in jobs:
        row = {"variant": variant, "seed": seed, **one_run(options, data, VARIANTS[variant], seed)}
        result["rows"].append(row)
        (out / f"curves_{slug}_{date.today()}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(variant, seed, row["valid"], f"{row['seconds']} s", flush=True)


def one_run(
    options: argparse.Namespace, data: Path, changes: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The losses of every step, and of the validation split at every tenth part."""
    values: dict[str, dict[str, Any]] = {
        "model": {"size": options.size},
        "data": {"path": str(data)},
        "checkpoint": {"every": 0},
        "train": {
            "steps": options.steps,
            "seq_len": options.seq_len,
            "batch_tokens": options.batch_tokens,
            "seed": seed,
            "dtype": "bfloat16",
            "compile": True,
            "device": options.device,
        },
        "optim": {"lr": options.lr, "warmup_steps": options.steps // 10},
        "eval": {"every": max(1, options.steps // 10), "tokens": 32_768},
    }
    for table, change in changes.items():
        values[table] |= change
    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        summary = train(Recipe.from_dict({"run": "curve", **values}), runs=runs)
        seconds = time.perf_counter() - began
        lines = read_metrics(summary.folder / "metrics.jsonl")
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": statistics.median(
            line["tokens_per_second"] for line in lines[len(lines) // 2 :]
        ),
        "losses": [round(line["loss"], 4) for line in lines if line["loss"] is not None],
        "valid": [
            [line["step"], round(line["valid_loss"], 4)] for line in lines if "valid_loss" in line
        ],
    }


if __name__ == "__main__":
    main()
