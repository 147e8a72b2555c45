"""One run: train it, score it, write its JSON. experiments/run.py starts this, a process a run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from arms import CONFIRMING_SEED, Run, recipe

from transnormer.data.loader import TokenData
from transnormer.files import write_text
from transnormer.formats.folders import load
from transnormer.model.language_model import LanguageModel
from transnormer.ops.loss import linear_cross_entropy
from transnormer.provenance import provenance
from transnormer.train.loop import Interrupted, train
from transnormer.train.metrics import read_metrics

POSITIONS = 64  # that losses by position are averaged over, at most


@torch.inference_mode()
def score(model: LanguageModel, data: TokenData, seq_len: int, rows: int = 32) -> dict[str, Any]:
    """The loss of all tokens of a split, in windows of `seq_len` tokens that are each read from a fresh state.

    Every token is predicted once, the first one from the end-of-text token. Returns loss (nats a token), bits_per_byte,
    nats, tokens and loss_by_position, the mean loss at each 1/POSITIONS of a window.
    """
    windows = -(-data.tokens // seq_len)
    ids = torch.zeros(windows * seq_len + 1, dtype=torch.int64)
    ids[0], ids[1 : data.tokens + 1] = data.end_of_text, torch.from_numpy(data.window(0, data.tokens))
    ids = ids.to(model.device)
    targets = ids[1:].clone()
    targets[data.tokens :] = -100
    sums = torch.zeros(seq_len, dtype=torch.float64, device=model.device)
    for inputs, wanted in zip(
        ids[:-1].view(-1, seq_len).split(rows), targets.view(-1, seq_len).split(rows), strict=True
    ):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden, _ = model.hidden(inputs)
            loss = linear_cross_entropy(hidden, model.head_weight, wanted, reduction="none")
        sums += loss.double().sum(0)
    counts = (targets.view(-1, seq_len) != -100).sum(0)
    assert int(counts.sum()) == data.tokens
    nats = float(sums.sum())
    bins = min(POSITIONS, seq_len)
    by_position = (sums.view(bins, -1).sum(1) / counts.view(bins, -1).sum(1)).tolist()
    return {
        "loss": nats / data.tokens, "bits_per_byte": nats / math.log(2) / data.bytes, "nats": nats,
        "tokens": data.tokens, "loss_by_position": by_position,
    }  # fmt: skip


def state_bytes(model: LanguageModel, tokens: int) -> int:
    """Bytes that one row's state takes after so many tokens."""
    with torch.inference_mode():
        _, state = model.hidden(torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    return sum(part.numel() * part.element_size() for layer in state.layers for part in layer)


def measure(run: Run, corpus: Path, work: Path, side_by_side: int, commit: str | None, command: str) -> dict[str, Any]:
    """Train (or finish, or find finished) the run and score it. Returns the record of its JSON."""
    cuda = torch.cuda.is_available()
    data = TokenData(corpus / "train", "train")
    wanted = recipe(run, corpus / "train", data.vocab_size, cuda=cuda)
    summary = train(wanted, runs=work)
    model = load(summary.folder, device="cuda" if cuda else "cpu")
    length = wanted.train.seq_len
    splits = {"valid": TokenData(corpus / "train", "valid")}
    splits |= {name: TokenData(corpus / name, "train") for name in ("wikitext-valid",) if (corpus / name).exists()}
    if run.seed >= CONFIRMING_SEED:  # what explores must not see the test
        names = ("test", "wikitext-test")
        splits |= {name: TokenData(corpus / name, "train") for name in names if (corpus / name).exists()}
    scores = {name: score(model, split, length) for name, split in splits.items()}
    lines = read_metrics(summary.folder / "metrics.jsonl")
    speeds = sorted(line["tokens_per_second"] for line in lines)
    norms = [line["gradient_norm"] for line in lines if line["gradient_norm"] is not None]
    every = max(1, len(lines) // 200)
    curve = [
        {"tokens": lines[n]["tokens"], "loss": statistics.fmean(x["loss"] or math.nan for x in lines[max(0, n - every + 1) : n + 1])}
        for n in range(every - 1, len(lines), every)
    ]  # fmt: skip
    embeddings = sum(p.numel() for name, p in model.named_parameters() if name.startswith("embed"))
    return {
        **dataclasses.asdict(run), "tokens": summary.tokens, "family": run.family,
        "parameters": model.parameter_count(), "parameters_without_embeddings": model.parameter_count() - embeddings,
        "flops": model.flops_per_token(length) * summary.tokens, "state_bytes": state_bytes(model, length),
        "seconds": round(summary.seconds, 2), "peak_memory_bytes": summary.peak_memory_bytes,
        "tokens_per_second": speeds[len(speeds) // 2], "side_by_side": side_by_side,
        "train_loss": statistics.fmean(line["loss"] or math.nan for line in lines[-max(1, len(lines) // 20) :]),
        "valid_loss": scores["valid"]["loss"], "bits_per_byte": scores["valid"]["bits_per_byte"],
        "test_loss": scores["test"]["loss"] if "test" in scores else None,
        "scores": scores, "refused": summary.refused,
        "gradient_norm": {"mean": statistics.fmean(norms), "largest": max(norms), "last": norms[-1]},
        "valid_curve": [[line["tokens"], line["valid_loss"]] for line in lines if line.get("valid_loss") is not None],
        "curve": curve, "model": model.config.to_dict(), "recipe": wanted.to_toml(),
        "data": data.fingerprint, **provenance("cuda" if cuda else "cpu", of=commit, command=command),
    }  # fmt: skip


def main() -> None:
    given = json.loads(sys.argv[1])
    run = Run(**given.pop("run"))
    folders = {name: Path(given.pop(name)) for name in ("corpus", "work", "out")}
    try:
        record = measure(run, folders["corpus"], folders["work"], **given)
    except Interrupted as error:
        sys.exit(128 + error.signal_number)
    folders["out"].mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]  # lists on one line
    write_text(folders["out"] / f"{run.name}.json", "{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
