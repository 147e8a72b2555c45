"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder that `transnormer.load` reads (config.json, model.safetensors, tokenizer.json) with what
training needs beside it. It is written under a hidden name, sealed (every file flushed and hashed, the seal last) and
renamed: under its own name it is whole. Of a model with adapters the weights are written merged, for use; training
goes on from the adapters, which lie in a sealed folder of their own inside.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import chat
from ..files import damage, flush, read_tensors, seal, step_folders, write_tensors, write_text
from ..model.language_model import LanguageModel
from . import lora
from .optim import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run stands on. data: the fingerprint of what it reads; base: of the weights under the adapter, if any."""

    data: str
    chat_template: str | None = None
    adapter: lora.LoraConfig | None = None
    base: str | None = None


def save(
    parent: Path,
    step: int,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    position: int,
    origin: Origin,
    keep: int,
) -> Path:
    """Write `parent`/step-N and remove all but the newest `keep`. OSError (a full disk) leaves the others untouched.

    position: samples the loader has given, the whole of its state.
    """
    folder = parent / f"step-{step:07d}"
    if folder.exists() and not damaged(folder, origin.adapter is not None):
        return folder
    partial = parent / f".{folder.name}.partial"
    try:
        clear_partial(parent)
        (model if origin.adapter is None else lora.merged(model)).save_pretrained(partial)
        if origin.chat_template is not None:
            write_text(partial / chat.FILE, origin.chat_template)
        random = {"torch_rng": torch.get_rng_state()}
        if model.device.type == "cuda":
            random["cuda_rng"] = torch.cuda.get_rng_state()
        write_tensors(partial / "optimizer.safetensors", optimizer_tensors(model, optimizer) | random)
        record = {"step": step, "position": position, "data": origin.data, "base": origin.base}
        write_text(partial / "training.json", json.dumps(record) + "\n")
        seal(partial)
        if origin.adapter is not None:
            lora.save_adapter(partial / lora.FOLDER, model, origin.adapter)
            seal(partial / lora.FOLDER)
            flush(partial)
        partial.rename(folder)
        flush(parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in step_folders(parent)[keep:]:
        doomed = old.rename(parent / f".{old.name}.partial")  # so that a kill leaves no half-removed checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def resume(parent: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, origin: Origin) -> tuple[int, int]:
    """Load the newest checkpoint of `parent` into model and optimizer; returns (step, position), (0, 0) without one.

    Raises ValueError where the newest is damaged, naming what is wrong and the newest good one, and where the data,
    or the weights under the adapter, are not those it was trained on.
    """
    checkpoints = step_folders(parent)
    if not checkpoints:
        return 0, 0
    newest, adapter = checkpoints[0], origin.adapter is not None
    if wrong := damaged(newest, adapter):
        good = next((folder for folder in checkpoints[1:] if not damaged(folder, adapter)), None)
        offer = f"to go on from the newest good one, {good.name}," if good else "to start again, as none is good,"
        raise ValueError(f"{newest}: {wrong}; {offer} move {newest.name} away and run the same command again")
    record = json.loads((newest / "training.json").read_text(encoding="utf-8"))
    if record["data"] != origin.data:
        raise ValueError(f"{newest} was trained on other data than data.path holds now; give another run=NAME")
    if record.get("base") != origin.base:
        raise ValueError(f"{newest} was trained on other weights than model.from holds now; give another run=NAME")
    if origin.adapter is None:
        weights, _ = read_tensors(newest / "model.safetensors")
        model.load_state_dict(weights)
    else:
        lora.load_adapter(newest / lora.FOLDER, model)
    memory, _ = read_tensors(newest / "optimizer.safetensors")
    torch.set_rng_state(memory.pop("torch_rng"))
    if "cuda_rng" in memory and model.device.type == "cuda":
        torch.cuda.set_rng_state(memory.pop("cuda_rng"))
    load_optimizer_tensors(model, optimizer, memory)
    return record["step"], record["position"]


def damaged(folder: Path, adapter: bool) -> str | None:
    """What is wrong with a checkpoint, with an adapter or without; None where all is as it was written."""
    wrong = damage(folder)
    if wrong is None and adapter and (inside := damage(folder / lora.FOLDER)):
        wrong = f"{lora.FOLDER}/{inside}"
    return wrong


def clear_partial(parent: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for leftover in parent.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
