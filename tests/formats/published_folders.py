"""Folders in the published format, with drawn weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from transnormer import LanguageModel
from transnormer.formats.published import config_from_published, published_tensors

VALUES = {
    "architectures": ["TransnormerForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_transnormer.TransnormerConfig"},
    "decoder_embed_dim": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "hidden_dim": 32,
    "glu_dim": 48,
    "vocab_size": 41, "linear_act_fun": "silu", "linear_use_lrpe_list": [1, 0, 0],
    "no_scale_embedding": True,
    "norm_type": "simplermsnorm", "model_type": "transnormer", "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def tensors_of(
    values: dict, dtype: torch.dtype = torch.float32, std: float = 0.2
) -> dict[str, torch.Tensor]:
    """Random weights of a published configuration, by their published names."""
    config = config_from_published(values)
    model = LanguageModel(config.replace(initializer_range=std))
    # gains, biases and theta away from their special initial values
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return {
        name: t.to(dtype).contiguous()
        for name, t in published_tensors(model.state_dict(), config).items()
    }


def publish(
    folder: Path, tensors: dict[str, torch.Tensor], values: dict = VALUES, kind: str = "bin"
) -> Path:
    """Write a published folder. kind: bin, old (before torch 1.6) or safetensors; "2 bin" is two
    shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    *count, ending = kind.split()
    stem, suffix = ("model", "safetensors") if ending == "safetensors" else ("pytorch_model", "bin")
    names, number = list(tensors), int(count[0]) if count else 1
    parts = [names[part::number] for part in range(number)] if count else [names]
    files = [
        f"{stem}-{n + 1:05d}-of-{number:05d}.{suffix}" if count else f"{stem}.{suffix}"
        for n in range(number)
    ]
    for file, part in zip(files, parts, strict=True):
        chosen = {name: tensors[name] for name in part}
        if ending == "safetensors":
            save_file(chosen, folder / file, {"format": "pt"})
        else:
            torch.save(chosen, folder / file, _use_new_zipfile_serialization=ending != "old")
    if count:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
