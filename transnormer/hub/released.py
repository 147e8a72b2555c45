"""The published TransNormerLLM checkpoints: their configuration, tensor names and semantics, both ways.

Where the published code and the mathematics differ (its defects are listed in docs/math.md), the mathematics is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..files import read_tensors
from ..model.language_model import LanguageModel

_ACTIVATIONS = {
    "silu": "swish", "swish": "swish", "relu": "relu", "elu": "elu", "1+elu": "1+elu", "2+elu": "2+elu", "gelu": "gelu",
    "sigmoid": "sigmoid", "leak": "leaky_relu", "sine": "sine", "exp": "exp",
}  # fmt: skip
_NORM_EPS = {"srmsnorm": 1e-6, "layernorm": 1e-5}  # constants of the published code, not in its configuration

# Ours -> published, inside a layer; q, k, v, u and theta change their shape as well (`published_tensors`).
_IN_LAYER = {
    "mixer_norm": "token_norm",
    "mixer.qkvu_proj": "token_mixer.qkvu_proj",
    "mixer.norm": "token_mixer.norm",
    "mixer.out_proj": "token_mixer.out_proj",
    "mixer.position": "token_mixer.lrpe",
    "glu_norm": "channel_norm",
    "glu.gate_proj": "channel_mixer.l1",
    "glu.up_proj": "channel_mixer.l2",
    "glu.down_proj": "channel_mixer.l3",
}
_OUTSIDE = {"embed_tokens": "model.embed_tokens", "norm": "model.final_norm", "lm_head": "lm_head"}


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a config.json's content is a published checkpoint's."""
    return "decoder_embed_dim" in values


def config_from_published(values: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a published config.json. Raises ValueError for one that cannot be read faithfully."""
    try:
        return _config(values)
    except (TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"a value in the published config is of the wrong kind: {error}") from error


def _config(values: Mapping[str, Any]) -> ModelConfig:
    if "gate_dim" in values:
        raise ValueError("TransNormerLLM3 (config key 'gate_dim'): its modelling code was never published")
    layers, width = values.get("decoder_layers", 24), values.get("decoder_embed_dim", 1024)
    heads, inner = values.get("decoder_attention_heads", 8), values.get("hidden_dim", 1024)
    if inner % heads:
        raise ValueError(f"hidden_dim {inner} is not divisible by decoder_attention_heads {heads}")
    flags = values.get("linear_use_lrpe_list") or [values.get("linear_use_lrpe", 0)] * layers
    if len(flags) < layers:
        raise ValueError(f"linear_use_lrpe_list has {len(flags)} flags for {layers} layers")
    turned = tuple(layer for layer, flag in enumerate(flags[:layers]) if flag)
    norm = "srmsnorm" if values.get("norm_type", "simplermsnorm") == "simplermsnorm" else "layernorm"
    glu, vocab = values.get("glu_dim", 2816), values.get("vocab_size", 64_000)
    pad = values.get("pad_token_id", 0)
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        head_dim=inner // heads,
        intermediate_size=width if glu == -1 else glu,
        position="lrpe" if turned else "none",
        position_layers="all" if len(turned) == layers > 1 else "first" if turned in ((0,), ()) else turned,
        activation=_ACTIVATIONS.get(values.get("linear_act_fun", "silu"), "none"),
        norm=norm,
        norm_eps=_NORM_EPS[norm],
        embed_scale=not values.get("no_scale_embedding", False),
        bias=values.get("bias", False),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        initializer_range=values.get("init_std", 0.02),
        pad_token_id=pad + vocab if isinstance(pad, int) and pad < 0 else pad,  # torch counts from the end, too
        bos_token_id=_token(values.get("bos_token_id", 1), vocab),
        eos_token_id=_token(values.get("eos_token_id", 2), vocab),
    )


def _token(value: Any, vocab: int) -> int | None:
    """A special token: the first of several, None for one that the vocabulary does not have."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < vocab else None


def published_config(config: ModelConfig) -> dict[str, Any]:
    """A published config.json's content for our configuration. Raises ValueError where the published code has no word."""
    fixed = {"mixer": "gla", "decay": "alibi", "decay_temperature": True, "decay_scale": 1.0, "gate": True, "gate_rank": None,
             "glu": "sglu"}  # fmt: skip
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"the published format knows no {name} = {getattr(config, name)!r}, only {value!r}")
    if config.norm in _NORM_EPS and config.norm_eps != _NORM_EPS[config.norm]:
        raise ValueError(f"the published format knows no norm_eps = {config.norm_eps}, only {_NORM_EPS[config.norm]}")
    if config.position not in ("lrpe", "none") or config.norm not in _NORM_EPS:
        raise ValueError(f"the published format knows no position {config.position!r} with norm {config.norm!r}")
    words = {ours: theirs for theirs, ours in _ACTIVATIONS.items() if theirs != "swish"}
    return {
        "architectures": ["TransnormerForCausalLM"],
        "model_type": "transnormer",
        "vocab_size": config.vocab_size,
        "decoder_embed_dim": config.hidden_size,
        "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "hidden_dim": config.inner_size,
        "glu_dim": config.intermediate_size,
        "linear_act_fun": words.get(config.activation, "none"),
        "linear_use_lrpe_list": [int(config.has_position(layer)) for layer in range(config.num_hidden_layers)],
        "norm_type": "simplermsnorm" if config.norm == "srmsnorm" else "layernorm",
        "no_scale_embedding": not config.embed_scale,
        "bias": config.bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        "add_bos_token": False,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def published_tensors(named_tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Tensors under our names (weights or gradients) under the published names, in the published shapes.

    q, k, v, u: ours lie head by head, theirs one after another, [H, 4, head_dim] -> [4, H, head_dim];
    theta [H, head_dim] -> [H, 1, head_dim]. Raises ValueError for a name the published format does not have.
    """
    heads, published = config.num_attention_heads, {}
    for name, tensor in named_tensors.items():
        theirs = _rename(name, _IN_LAYER, _OUTSIDE, "layers.", "model.layers.")
        if ".qkvu_proj." in name:
            tensor = tensor.unflatten(0, (heads, 4, -1)).transpose(0, 1).flatten(0, 2)
        elif name.endswith(".theta"):
            tensor = tensor.unsqueeze(1)
        published[theirs] = tensor
    return published


def own_tensors(published: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `published_tensors`; a stored copy of a tied head is checked and left out."""
    in_layer = {theirs: ours for ours, theirs in _IN_LAYER.items()}
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    own = {}
    for name, tensor in published.items():
        ours = _rename(name, in_layer, outside, "model.layers.", "layers.")
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            if not torch.equal(tensor, published.get("model.embed_tokens.weight", tensor)):
                raise ValueError("lm_head.weight differs from the embedding, though the config ties them")
            continue
        if ".qkvu_proj." in name:
            if tensor.shape[0] != 4 * config.inner_size:
                raise ValueError(f"{name} has {tensor.shape[0]} rows, the config needs {4 * config.inner_size}")
            tensor = tensor.unflatten(0, (4, config.num_attention_heads, -1)).transpose(0, 1).flatten(0, 2)
        elif name.endswith(".theta"):
            tensor = tensor.squeeze(1)
        own[ours] = tensor
    return own


def load_published(folder: str | Path, **options: Any) -> LanguageModel:
    """The model of a published checkpoint folder, computed as published. Options: as `LanguageModel.from_pretrained`.

    Weights are read from safetensors or, unpickling tensors only, from pytorch_model.bin, in one file or in shards.
    Raises ValueError or OSError naming the file and what is wrong.
    """
    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        config = config_from_published(values)
        tensors: dict[str, Tensor] = {}
        for path in _weight_files(folder):
            tensors.update(read_tensors(path)[0] if path.suffix == ".safetensors" else _read_pickled_tensors(path))
        return LanguageModel.from_tensors(config, own_tensors(tensors, config), "its weights", **options)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index.name}: damaged, or not an index of shards") from error
            return [folder / Path(shard).name for shard in sorted(set(shards))]
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there, whole or in shards")


def _read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file can raise anything in there
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path.name} is truncated, damaged or holds more than tensors ({first})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path.name} holds something else than named tensors")
    return tensors


def _rename(name: str, in_layer: Mapping[str, str], outside: Mapping[str, str], old: str, new: str) -> str:
    """A tensor's name in the other format, its last part (weight, bias, theta) kept."""
    module, _, leaf = name.rpartition(".")
    if module in outside:
        return f"{outside[module]}.{leaf}"
    if name.startswith(old):
        number, _, inside = module[len(old) :].partition(".")
        if number.isdigit() and inside in in_layer:
            return f"{new}{number}.{in_layer[inside]}.{leaf}"
    raise ValueError(f"unknown tensor {name}")
