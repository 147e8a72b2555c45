"""One run: train it, score it, write its JSON. experiments/run.py starts this, a process a run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import CONFIRMING_SEED, Run, folder_of, known, recipe

from transnormer.data.shards import TokenData
from transnormer.files import write_text
from transnormer.formats.folders import load
from transnormer.inference.sampling import Sampling, SamplingBatch, sample
from transnormer.model.language_model import LanguageModel
from transnormer.model.slots import Slots
from transnormer.ops.loss import linear_cross_entropy
from transnormer.provenance import provenance
from transnormer.train.loop import Interrupted, train
from transnormer.train.metrics import read_metrics

POSITIONS = 64  # `loss_by_position` has at most this many values
SCORED_TOKENS = 32_768  # about as many are read in one forward pass


@torch.inference_mode()
def score(
    model: LanguageModel,
    data: TokenData,
    seq_len: int,
    rows: int | None = None,
    *,
    text: bool = True,
) -> dict[str, Any]:
    """The loss of all tokens of a split, in windows of `seq_len` tokens that are each read from a
    fresh state.

    Every token is predicted once, the first one from the end-of-text token. The first token of data
    that are not text is left out, because it stands for no sample (sequences.py). rows: windows at
    a time. Returns loss (nats a token), bits_per_byte or else bits_per_sample (to which the ends of
    documents add their bits), nats, tokens, documents and loss_by_position, the mean loss at each
    1/POSITIONS of a window."""
    first = 0 if text else 1
    tokens, rows = data.tokens - first, rows or max(1, SCORED_TOKENS // seq_len)
    windows = -(-tokens // seq_len)
    ids = torch.zeros(windows * seq_len + 1, dtype=torch.int64)
    ids[0], ids[1 : tokens + 1] = data.end_of_text, torch.from_numpy(data.window(first, tokens))
    ids = ids.to(model.device)
    targets = ids[1:].clone()
    targets[tokens:] = -100
    sums = torch.zeros(seq_len, dtype=torch.float64, device=model.device)
    for inputs, wanted in zip(
        ids[:-1].view(-1, seq_len).split(rows), targets.view(-1, seq_len).split(rows), strict=True
    ):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden, _ = model.hidden(inputs)
            loss = linear_cross_entropy(hidden, model.head_weight, wanted, reduction="none")
        sums += loss.double().sum(0)
    counts = (targets.view(-1, seq_len) != -100).sum(0)
    assert int(counts.sum()) == tokens
    nats = float(sums.sum())
    parts = (each.tensor_split(min(POSITIONS, seq_len)) for each in (sums, counts))
    by_position = [float(total.sum() / count.sum()) for total, count in zip(*parts, strict=True)]
    bits = nats / math.log(2)
    return {
        "loss": nats / tokens,
        **(
            {"bits_per_byte": bits / data.bytes}
            if text
            else {"bits_per_sample": bits / (tokens - data.documents)}
        ),
        "nats": nats,
        "tokens": tokens,
        "documents": data.documents,
        "loss_by_position": by_position,
    }


@torch.inference_mode()
def draw(model: LanguageModel, rows: int, length: int, end: int, seed: int) -> np.ndarray:
    """Samples that the model draws at temperature 1 behind the end-of-text token, uint8 [rows,
    length].

    The token of level n is end + 1 + n. Only levels are sampled; the end of a text is left out.
    """
    seeds = [Sampling(temperature=1.0, top_p=1.0, seed=rows * seed + row) for row in range(rows)]
    samplings = SamplingBatch.of(seeds, model.device)
    ids, slots, drawn = torch.full((rows, 1), end), Slots.new(model, rows, length), []
    ids, number = ids.to(model.device), torch.zeros(rows, dtype=torch.int64, device=model.device)
    for _ in range(length):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model.step_(ids, slots)[:, -1]
        drawn.append(sample(logits[:, end + 1 :], samplings, number))
        ids, number = drawn[-1][:, None] + end + 1, number + 1
    return torch.stack(drawn, 1).to("cpu", torch.uint8).numpy()


def drawings(
    model: LanguageModel, run: Run, test: TokenData, seq_len: int
) -> dict[str, np.ndarray]:
    """What the model draws and, where every document fills a row, as many real documents: uint8
    [rows, length]."""
    rows, length = known("datasets", run.dataset)["draw"]
    found = {"drawn": draw(model, rows, length, test.end_of_text, run.seed)}
    if length + 1 == seq_len:
        found["real"] = (
            test.window(1, rows * seq_len).reshape(rows, seq_len)[:, :length] - test.end_of_text - 1
        )
    return {name: levels.astype(np.uint8) for name, levels in found.items()}


def by_layer(model: LanguageModel, data: TokenData, seq_len: int) -> dict[str, list[float]]:
    """Over the first SCORED_TOKENS of a split: each layer's largest absolute output, and its
    weights' gradient norm.

    Longer rows are cut, because the passes are neither compiled nor recomputed and would not fit
    into a GPU's memory."""
    length = min(seq_len, SCORED_TOKENS, data.tokens - 1)
    rows = max(1, min(SCORED_TOKENS // length, (data.tokens - 1) // length))
    ids = torch.from_numpy(data.window(0, rows * length + 1)).to(model.device)
    largest: list[float] = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, output: largest.append(float(output[0].detach().abs().max()))
        )
        for block in model.blocks()
    ]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        loss = model.loss(ids[:-1].view(rows, length), ids[1:].view(rows, length))
    loss.backward()
    for hook in hooks:
        hook.remove()
    norms = [
        math.sqrt(
            sum(
                float(p.grad.double().square().sum())
                for p in block.parameters()
                if p.grad is not None
            )
        )
        for block in model.blocks()
    ]
    model.zero_grad()
    return {"largest_activation": largest, "gradient_norm": norms}


def state_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes that one row's state takes after so many tokens."""
    with torch.inference_mode():
        _, state = model.hidden(torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    return state.nbytes - state.seen.nbytes


def splits_to_score(run: Run, corpus: Path) -> dict[str, TokenData]:
    """The data that a run is scored on. What explores must not see the test."""
    names = ["wikitext-valid"]
    if run.seed >= CONFIRMING_SEED:
        names += ["test", "wikitext-test"]
    there = [name for name in names if (corpus / name).exists()]
    return {
        "valid": TokenData(corpus / "train", "valid"),
        **{name: TokenData(corpus / name, "train") for name in there},
    }


def mean_loss(lines: list[dict[str, Any]]) -> float:
    """Of some steps of metrics.jsonl; NaN where one had none."""
    return statistics.fmean(line["loss"] or math.nan for line in lines)


def of_training(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.jsonl says of a run: speed, losses, gradient norms, and two curves."""
    speeds = sorted(line["tokens_per_second"] for line in lines)
    norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] is not None]
    every = max(1, len(lines) // 200)
    return {
        "tokens_per_second": speeds[len(speeds) // 2],
        "train_loss": mean_loss(lines[-max(1, len(lines) // 20) :]),
        "gradient_norm": {
            "mean": statistics.fmean(norms),
            "largest": max(norms),
            "last": norms[-1],
        },
        "valid_curve": [
            [line["tokens"], line["valid_loss"]]
            for line in lines
            if line.get("valid_loss") is not None
        ],
        "curve": [
            {"tokens": lines[n]["tokens"], "loss": mean_loss(lines[max(0, n - every + 1) : n + 1])}
            for n in range(every - 1, len(lines), every)
        ],
    }


def measure(
    run: Run, corpus: Path, work: Path, side_by_side: int, commit: str | None, command: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train (or finish, or find finished) the run and score it. Returns the record of its JSON, and
    what was drawn.

    Samples are drawn only from data that are not text, by the first confirming run of each arm. A
    run that diverged is a result too, where rates are compared: its record says so and has no
    scores."""
    cuda, text = torch.cuda.is_available(), run.dataset == "text"
    corpus = corpus / folder_of(run.dataset)
    data = TokenData(corpus / "train", "train")
    wanted = recipe(run, corpus / "train", data.vocab_size, cuda=cuda)
    where = provenance("cuda" if cuda else "cpu", of=commit, command=command)
    of_run = {
        **dataclasses.asdict(run),
        "tokens": wanted.train.steps * wanted.train.batch_tokens,
        "dtype": wanted.train.dtype,
        "family": run.family,
        "side_by_side": side_by_side,
    }
    try:
        summary = train(wanted, runs=work)
    except ValueError as error:
        if "the run diverged" not in str(error):
            raise
        return {**of_run, "seconds": 0.0, "valid_loss": None, "diverged": str(error), **where}, {}
    model = load(summary.folder, device="cuda" if cuda else "cpu")
    length = wanted.train.seq_len
    splits = splits_to_score(run, corpus)
    scores = {name: score(model, split, length, text=text) for name, split in splits.items()}
    began = time.monotonic()
    draws = run.seed == CONFIRMING_SEED and "draw" in known("datasets", run.dataset)
    drawn = drawings(model, run, splits["test"], length) if draws else {}
    draw_seconds = {"draw_seconds": round(time.monotonic() - began, 2)} if draws else {}
    unit = "bits_per_byte" if text else "bits_per_sample"
    seen = of_training(read_metrics(summary.folder / "metrics.jsonl"))
    embeddings = sum(p.numel() for name, p in model.named_parameters() if name.startswith("embed"))
    record = {
        **of_run,
        "parameters": model.parameter_count(),
        "parameters_without_embeddings": model.parameter_count() - embeddings,
        "flops": model.flops_per_token(length) * summary.tokens,
        "state_bytes": state_bytes(model, length),
        "seconds": round(summary.seconds, 2),
        **draw_seconds,
        "peak_memory_bytes": summary.peak_memory_bytes,
        "tokens_per_second": seen["tokens_per_second"],
        "train_loss": seen["train_loss"],
        "valid_loss": scores["valid"]["loss"],
        unit: scores["valid"][unit],
        "test_loss": scores["test"]["loss"] if "test" in scores else None,
        "scores": scores,
        "refused": summary.refused,
        "gradient_norm": seen["gradient_norm"],
        "valid_curve": seen["valid_curve"],
        "by_layer": by_layer(model, splits["valid"], length),
        "curve": seen["curve"],
        "model": model.config.to_dict(),
        "recipe": wanted.to_toml(),
        "data": data.fingerprint,
        **where,
    }
    return record, drawn


def main() -> None:
    given = json.loads(sys.argv[1])
    run = Run(**given.pop("run"))
    folders = {name: Path(given.pop(name)) for name in ("corpus", "work", "out")}
    try:
        record, drawn = measure(run, folders["corpus"], folders["work"], **given)
    except Interrupted as error:
        sys.exit(128 + error.signal_number)
    folders["out"].mkdir(parents=True, exist_ok=True)
    if drawn:
        np.savez_compressed(folders["out"] / f"{run.name}.npz", **drawn)  # type: ignore[arg-type]
    # lists on one line
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    write_text(folders["out"] / f"{run.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
