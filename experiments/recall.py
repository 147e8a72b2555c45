"""Train small models on associative recall and copying, and count right answers.

    python experiments/recall.py associations --arms published hybrid llama-scaled
    python experiments/recall.py copies --widths 64 128 --rates 1e-3 3e-3
    python experiments/recall.py associations --steps 20 --rows 4 --out build/recall   # a try

Each run is one arm of tables.toml, one width and one learning rate, on tokens that never repeat. It
leaves one JSON in --out, and is not run again. Of the rates the best one counts, as for every arm.
A model has two layers with heads of 64, and everything else that the arm has in other tables."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import arms
import torch

from transnormer.config import ModelConfig
from transnormer.evaluation import recall
from transnormer.files import write_text
from transnormer.model.language_model import LanguageModel, init_weights
from transnormer.provenance import provenance
from transnormer.train.optim import learning_rate, new_optimizer
from transnormer.train.recipe import Optim

LAYERS = 2
VOCAB = 8_192
LENGTH = 256  # tokens of a row of associations in training
PAIRS = (4, 8, 16, 32, 64)
LONGER = 1_024  # and of rows that are only evaluated, with as many pairs
COPY = 129  # tokens of a row of copies
SCORED_ROWS = 256


def model_of(arm: str, width: int) -> ModelConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 2 * width,
    }
    return ModelConfig.from_dict({**shape, **arms.words_of(arm, LAYERS)})


def batch(
    task: str,
    rows: int,
    generator: torch.Generator,
    pairs: int | None = None,
    length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a task. Of associations, pairs: None draws one of PAIRS; length: None is LENGTH."""
    if task == "copies":
        return recall.copies(rows, COPY, VOCAB, generator)
    if pairs is None:
        drawn = torch.randint(len(PAIRS), (), generator=generator, device=generator.device)
        pairs = PAIRS[int(drawn)]
    return recall.associations(rows, length or LENGTH, pairs, VOCAB, generator)


def scores(model: LanguageModel, task: str, generator: torch.Generator) -> dict[str, float]:
    """The share of right answers, by what was asked."""
    if task == "copies":
        return {str(COPY): recall.accuracy(model, *batch(task, SCORED_ROWS, generator))}
    found = {}
    for length in (LENGTH, LONGER):
        for pairs in PAIRS:
            ids, targets = batch(task, SCORED_ROWS, generator, pairs, length)
            found[f"{pairs} pairs, {length} tokens"] = recall.accuracy(model, ids, targets, 16)
    return found


def measure(task: str, arm: str, width: int, rate: float, given: argparse.Namespace) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_of(arm, width)
    model = LanguageModel(config).to(device)
    init_weights(model, seed=0)
    optim = Optim(lr=rate, warmup_steps=max(1, given.steps // 10))
    optimizer, began = new_optimizer(model, optim), time.monotonic()
    drawn = torch.Generator(device).manual_seed(1)
    curve = []
    for step in range(1, given.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, given.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(*batch(task, given.rows, drawn))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, given.steps // 20) == 0:
            curve.append([step, loss.item()])
    found = scores(model.eval(), task, torch.Generator(device).manual_seed(2))
    command = shlex.join(["python", "experiments/recall.py", *sys.argv[1:]])
    return {
        "task": task,
        "arm": arm,
        "width": width,
        "lr": rate,
        "steps": given.steps,
        "rows": given.rows,
        "parameters": model.parameter_count(),
        "state_bytes": config.state_bytes(COPY if task == "copies" else LENGTH, itemsize=2),
        "seconds": round(time.monotonic() - began, 2),
        "accuracy": found,
        "curve": curve,
        "model": config.to_dict(),
        **provenance(device, of=given.commit, command=command),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("associations", "copies"))
    parser.add_argument(
        "--arms", nargs="+", default=["published", "base", "base-conv", "hybrid", "llama-scaled"]
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--rows", type=int, default=64, help="of a step")
    parser.add_argument("--out", type=Path, default=arms.HERE / "results" / "recall")
    parser.add_argument("--commit", help="of this code, where it has no git with it")
    given = parser.parse_args()
    for width in given.widths:
        for arm in given.arms:
            for rate in given.rates:
                path = given.out / f"{given.task}-{arm.replace('/', '_')}-{width}-{rate:g}.json"
                if path.exists():
                    continue
                record = measure(given.task, arm, width, rate, given)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(record, indent=1) + "\n")
                worst = min(record["accuracy"].values())
                figures = f"worst accuracy {worst:.3f}, {record['seconds']:.0f} s"
                print(f"{path.stem}: {figures}", flush=True)


if __name__ == "__main__":
    main()
