"""LoRA with `peft`: low-rank adapters on the linear maps of a model's blocks, trained in their
place.

An adapter is kept in peft's own format, which `peft.PeftModel.from_pretrained` reads on the same
model in transformers. The embedding and the head, which may be one matrix, are not adapted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import read_tensors, write_tensors
from ..layer_config import nearest
from ..model.language_model import LanguageModel
from ..model.layers import fill
from .recipe import Lora

if TYPE_CHECKING:
    from peft import LoraConfig

FOLDER = "adapter"  # in a checkpoint
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in peft's files
NAME = "default"  # of the one adapter, in the model's names


def targets(model: LanguageModel, recipe: Lora) -> dict[str, nn.Linear]:
    """The linear maps that get an adapter, by name. ValueError for a target that ends the name of
    none in the blocks."""
    blocks = {
        name: module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    # the same in every block, e.g. mixer.qkvu_proj
    ends = {name.partition(".")[2] for name in blocks}
    for target in recipe.targets:
        if not any(_fits(end, target) for end in ends):
            known = sorted(ends | {end.rpartition(".")[2] for end in ends})
            raise ValueError(
                "lora.targets: no linear map of the blocks is called "
                f"{target!r}{nearest(target, known)}"
            )
    wanted = recipe.targets or ends
    return {
        f"layers.{name}": module
        for name, module in blocks.items()
        if any(_fits(name, end) for end in wanted)
    }


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def inject(model: LanguageModel, recipe: Lora, base: Path) -> LoraConfig:
    """Put adapters into the model, in place, drawn from torch's generator; all else is no longer
    trained.

    base: the folder of the model, which the adapter's files name. Raises ValueError where peft is
    not installed or a target is unknown."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora needs peft: pip install 'transnormer[peft]'") from None
    names = {name.split(".", 2)[2] for name in targets(model, recipe)}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]
        lora_dropout=recipe.dropout,
        target_modules=sorted(names),  # type: ignore[arg-type]
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model, NAME)
    config.target_modules, config.inference_mode = sorted(names), True  # type: ignore[assignment]  # as files have it
    return config


@torch.no_grad()
def merged(model: LanguageModel, tensors: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and weights with the adapters in them, W + alpha / rank * B A, sharded as W is.
    tensors: the state_dict.

    One after another: the caller that keeps none of them needs room for one. All processes must
    read all."""
    from peft.tuners.lora import Linear

    maps = {
        f"{name}.base_layer.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    }
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        if name in maps:
            delta: Any = maps[name].get_delta_weight(NAME)
            if hasattr(tensor, "placements"):
                delta = delta.redistribute(placements=tensor.placements)
            tensor = tensor + delta
        yield name.replace(".base_layer.", "."), tensor


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Write adapter_config.json and adapter_model.safetensors. tensors: `adapter_tensors`,
    whole."""
    folder.mkdir()
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config.save_pretrained(str(folder))


@torch.no_grad()
def load_adapter(folder: Path, model: LanguageModel) -> None:
    """The inverse. ValueError where the folder holds another adapter."""
    stored, _ = read_tensors(folder / WEIGHTS)
    wanted = adapter_tensors(model)
    if {name: t.shape for name, t in stored.items()} != {
        name: p.shape for name, p in wanted.items()
    }:
        raise ValueError(f"{folder / WEIGHTS}: not the adapter that the recipe describes")
    for name, p in wanted.items():
        fill(p, stored[name].to(p.device))


def adapter_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The adapters' weights by their names in peft's files."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): p
        for name, p in model.named_parameters()
        if f".{NAME}." in name
    }


def fingerprint(model: LanguageModel) -> str:
    """A SHA-256 over a model's weights, from which one knows later that an adapter stands on the
    same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
