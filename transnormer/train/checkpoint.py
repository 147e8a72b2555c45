"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder that `transnormer.load` reads (config.json, model.safetensors, tokenizer.json) with what
training needs beside it. It is written under a hidden name, sealed (every file flushed and hashed, the seal last) and
renamed: under its own name it is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from ..files import damage, flush, read_tensors, seal, step_folders, write_tensors, write_text
from ..model.language_model import LanguageModel
from .optim import load_optimizer_tensors, optimizer_tensors


def save(
    parent: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    position: int,
    fingerprint: str,
    keep: int,
) -> Path:
    """Write `parent`/step-N and remove all but the newest `keep`. OSError (a full disk) leaves the others untouched.

    position: samples the loader has given, the whole of its state. fingerprint: of the data it reads.
    """
    folder = parent / f"step-{step:07d}"
    if folder.exists() and not damage(folder):
        return folder
    partial = parent / f".{folder.name}.partial"
    try:
        clear_partial(parent)
        model.save_pretrained(partial)
        random = {"torch_rng": torch.get_rng_state()}
        if model.device.type == "cuda":
            random["cuda_rng"] = torch.cuda.get_rng_state()
        write_tensors(partial / "optimizer.safetensors", optimizer_tensors(model, optimizer) | random)
        write_text(
            partial / "training.json", json.dumps({"step": step, "position": position, "data": fingerprint}) + "\n"
        )
        seal(partial)
        partial.rename(folder)
        flush(parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in step_folders(parent)[keep:]:
        doomed = old.rename(parent / f".{old.name}.partial")  # so that a kill leaves no half-removed checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def resume(parent: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, fingerprint: str) -> tuple[int, int]:
    """Load the newest checkpoint of `parent` into model and optimizer; returns (step, position), (0, 0) without one.

    Raises ValueError where the newest is damaged, naming what is wrong and the newest good one, and where the data
    are not those it was trained on.
    """
    checkpoints = step_folders(parent)
    if not checkpoints:
        return 0, 0
    newest = checkpoints[0]
    if wrong := damage(newest):
        good = next((folder for folder in checkpoints[1:] if not damage(folder)), None)
        offer = f"to go on from the newest good one, {good.name}," if good else "to start again, as none is good,"
        raise ValueError(f"{newest}: {wrong}; {offer} move {newest.name} away and run the same command again")
    record = json.loads((newest / "training.json").read_text(encoding="utf-8"))
    if record["data"] != fingerprint:
        raise ValueError(f"{newest} was trained on other data than data.path holds now; give another run=NAME")
    weights, _ = read_tensors(newest / "model.safetensors")
    model.load_state_dict(weights)
    memory, _ = read_tensors(newest / "optimizer.safetensors")
    torch.set_rng_state(memory.pop("torch_rng"))
    if "cuda_rng" in memory and model.device.type == "cuda":
        torch.cuda.set_rng_state(memory.pop("cuda_rng"))
    load_optimizer_tensors(model, optimizer, memory)
    return record["step"], record["position"]


def clear_partial(parent: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for leftover in parent.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
