"""The published TransNormerLLM checkpoints: their configuration, tensor names and semantics, both
ways.

Where the published code and the mathematics differ (its defects are listed in docs/math.md), the
mathematics is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import LARGEST, ModelConfig
from ..files import read_json
from ..layer_config import nearest
from ..model.language_model import LanguageModel
from .weight_files import check_index, read_file, weight_files

_ACTIVATIONS = {
    "silu": "swish",
    "swish": "swish",
    "relu": "relu",
    "elu": "elu",
    "1+elu": "1+elu",
    "2+elu": "2+elu",
    "gelu": "gelu",
    "sigmoid": "sigmoid",
    "leak": "leaky_relu",
    "sine": "sine",
    "exp": "exp",
}
# constants of the published code, not in its configuration
_NORM_EPS = {"srmsnorm": 1e-6, "layernorm": 1e-5}

# Ours -> published, inside a layer; q, k, v, u and theta change their shape as well
# (`published_tensors`).
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

# What the published code reads from its config.json (use_cache and add_bos_token change no logit).
_KEYS = (
    "add_bos_token",
    "bias",
    "bos_token_id",
    "decoder_attention_heads",
    "decoder_embed_dim",
    "decoder_layers",
    "eos_token_id",
    "glu_dim",
    "hidden_dim",
    "init_std",
    "linear_act_fun",
    "linear_use_lrpe",
    "linear_use_lrpe_list",
    "no_scale_embedding",
    "norm_type",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
# What transformers, 4.32 to 5, writes into every config.json beside that; the published code reads
# none of it.
_BOOKKEEPING = (
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "model_max_length",
    "model_type",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
)
# The largest that is believed of each; hidden_dim is the width of all heads together.
_MOST = {
    "decoder_layers": LARGEST["num_hidden_layers"],
    "decoder_attention_heads": LARGEST["num_attention_heads"],
    "decoder_embed_dim": LARGEST["hidden_size"],
    "hidden_dim": LARGEST["hidden_size"],
    "glu_dim": LARGEST["intermediate_size"],
    "vocab_size": LARGEST["vocab_size"],
}


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds. Raises OSError or ValueError that names the file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so not a model's folder")
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise ValueError(f"{folder / 'config.json'}: not a JSON object")
    return values


def is_published(values: Mapping[str, Any]) -> bool:
    """Whether a config.json's content is a published checkpoint's."""
    return "decoder_embed_dim" in values


def config_from_published(values: Mapping[str, Any]) -> ModelConfig:
    """Our configuration of a published config.json. Raises ValueError for one that cannot be read
    faithfully."""
    try:
        return _config(values)
    except (TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"a value in the published config is of the wrong kind: {error}"
        ) from error


def _config(values: Mapping[str, Any]) -> ModelConfig:
    if "gate_dim" in values:
        raise ValueError(
            "TransNormerLLM3 (config key 'gate_dim'): its modelling code is not at hand"
        )
    for key in values:
        if key not in _KEYS and key not in _BOOKKEEPING:
            raise ValueError(f"unknown published config key {key!r}{nearest(key, _KEYS)}")
    for key, most in _MOST.items():
        if values.get(key, 1) > most:
            raise ValueError(f"{key} is {values[key]:,}, more than {most:,}")
    layers, width = values.get("decoder_layers", 24), values.get("decoder_embed_dim", 1024)
    heads, inner = values.get("decoder_attention_heads", 8), values.get("hidden_dim", 1024)
    if inner % heads:
        raise ValueError(f"hidden_dim {inner} is not divisible by decoder_attention_heads {heads}")
    flags = values.get("linear_use_lrpe_list") or [values.get("linear_use_lrpe", 0)] * layers
    if len(flags) < layers:
        raise ValueError(f"linear_use_lrpe_list has {len(flags)} flags for {layers} layers")
    turned = tuple(layer for layer, flag in enumerate(flags[:layers]) if flag)
    norm = (
        "srmsnorm" if values.get("norm_type", "simplermsnorm") == "simplermsnorm" else "layernorm"
    )
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
        position_layers="all"
        if len(turned) == layers > 1
        else "first"
        if turned in ((0,), ())
        else turned,
        activation=_ACTIVATIONS.get(values.get("linear_act_fun", "silu"), "none"),
        norm=norm,
        norm_eps=_NORM_EPS[norm],
        embed_scale=not values.get("no_scale_embedding", False),
        bias=values.get("bias", False),
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        initializer_range=values.get("init_std", 0.02),
        # torch counts from the end, too
        pad_token_id=pad + vocab if isinstance(pad, int) and pad < 0 else pad,
        bos_token_id=_token(values.get("bos_token_id", 1), vocab),
        eos_token_id=_token(values.get("eos_token_id", 2), vocab),
    )


def _token(value: Any, vocab: int) -> int | None:
    """A special token: the first of several, None for one that the vocabulary does not have."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) and 0 <= value < vocab else None


def published_config(config: ModelConfig) -> dict[str, Any]:
    """A published config.json's content for our configuration. Raises ValueError where the
    published code has no word."""
    fixed = {
        "layer_types": None,
        "mixer": "gla",
        "decay": "alibi",
        "decay_temperature": True,
        "decay_scale": 1.0,
        "gate": True,
        "gate_rank": None,
        "qk_norm": False,
        "head_norm": False,
        "convolution": "none",
        "glu": "sglu",
    }
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"the published format knows no {name} = {getattr(config, name)!r}, only {value!r}"
            )
    if config.norm in _NORM_EPS and config.norm_eps != _NORM_EPS[config.norm]:
        raise ValueError(
            f"the published format knows no norm_eps = {config.norm_eps}, only "
            f"{_NORM_EPS[config.norm]}"
        )
    if config.position not in ("lrpe", "none") or config.norm not in _NORM_EPS:
        raise ValueError(
            f"the published format knows no position {config.position!r} with norm {config.norm!r}"
        )
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
        "linear_use_lrpe_list": [
            int(config.has_position(layer)) for layer in range(config.num_hidden_layers)
        ],
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


def published_tensors(
    named_tensors: Mapping[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """Tensors under our names (weights or gradients) under the published names, in the published
    shapes.

    q, k, v, u: ours lie head by head, theirs one after another, [H, 4, head_dim] -> [4, H,
    head_dim]; theta [H, head_dim] -> [H, 1, head_dim]. Raises ValueError for a name the published
    format does not have."""
    heads, published = config.num_attention_heads, {}
    for name, tensor in named_tensors.items():
        if ".qkvu_proj." in name:
            tensor = tensor.unflatten(0, (heads, 4, -1)).transpose(0, 1).flatten(0, 2)
        elif name.endswith(".theta"):
            tensor = tensor.unsqueeze(1)
        published[published_name(name)] = tensor
    return published


def own_tensors(published: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `published_tensors`; a stored copy of a tied head is checked and left out.

    Raises ValueError naming what is missing, unknown or of another shape.
    """
    check_shapes({name: tensor.shape for name, tensor in published.items()}, config)
    own = {}
    for name, tensor in published.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            if not torch.equal(tensor, published["model.embed_tokens.weight"]):
                raise ValueError(HEAD_DIFFERS)
            continue
        if ".qkvu_proj." in name:
            tensor = torch.cat(
                [tensor[start:stop] for start, stop in own_rows(name, tensor.shape[0], config)]
            )
        own[own_name(name)] = tensor.squeeze(1) if name.endswith(".theta") else tensor
    return own


HEAD_DIFFERS = "lm_head.weight differs from model.embed_tokens.weight, though the config ties them"


def published_name(name: str) -> str:
    """The published name of a tensor of ours. Raises ValueError for one that the published format
    does not have."""
    return _rename(name, _IN_LAYER, _OUTSIDE, "layers.", "model.layers.")


def own_name(name: str) -> str:
    """Our name of a published tensor. Raises ValueError for one that the format does not have."""
    in_layer = {theirs: ours for ours, theirs in _IN_LAYER.items()}
    return _rename(
        name,
        in_layer,
        {theirs: ours for ours, theirs in _OUTSIDE.items()},
        "model.layers.",
        "layers.",
    )


def own_rows(name: str, rows: int, config: ModelConfig) -> Iterator[tuple[int, int]]:
    """The order in which a published tensor's rows make ours, as (start, stop): q, k, v, u of one
    head after another."""
    if ".qkvu_proj." not in name:
        yield 0, rows
        return
    for head in range(config.num_attention_heads):
        for part in range(4):
            start = (part * config.num_attention_heads + head) * config.head_dim
            yield start, start + config.head_dim


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published checkpoint, in the order of the modules. Building them costs 150
    MB, even on "meta"."""
    d, inner, f = config.hidden_size, config.inner_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if config.bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name: str, width: int) -> None:
        if config.norm == "layernorm":
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        norm(f"{at}.token_norm", d)
        linear(f"{at}.token_mixer.qkvu_proj", 4 * inner, d)
        linear(f"{at}.token_mixer.out_proj", d, inner)
        if config.has_position(layer):
            shapes[f"{at}.token_mixer.lrpe.theta"] = (
                config.num_attention_heads,
                1,
                config.head_dim,
            )
        norm(f"{at}.token_mixer.norm", inner)
        norm(f"{at}.channel_norm", d)
        linear(f"{at}.channel_mixer.l1", f, d)
        linear(f"{at}.channel_mixer.l2", f, d)
        linear(f"{at}.channel_mixer.l3", d, f)
    norm("model.final_norm", d)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    return shapes


def check_shapes(shapes: Mapping[str, Sequence[int]], config: ModelConfig) -> None:
    """Raise ValueError where published tensors of these names and shapes are not all that the
    configuration needs."""
    wanted = published_shapes(config)
    # a tied head may be stored as a copy
    allowed = {**wanted, "lm_head.weight": wanted["model.embed_tokens.weight"]}
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in allowed]
    problems += [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in allowed.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the weights do not fit config.json: {'; '.join(problems[:4])}{more}")


def load_published(folder: str | Path, **options: Any) -> LanguageModel:
    """The model of a published checkpoint folder, computed as published. Options: as
    `LanguageModel.from_pretrained`.

    Weights are read from safetensors or, unpickling tensors only, from pytorch_model.bin, in one
    file or in shards. Raises ValueError or OSError naming the file and what is wrong."""
    folder = Path(folder)
    values = read_config(folder)
    try:
        config = config_from_published(values)
        tensors: dict[str, Tensor] = {}
        for path, listed in weight_files(folder).items():
            found = read_file(path)
            check_index(path, found, listed)
            tensors.update(found)
        return LanguageModel.from_tensors(
            config, own_tensors(tensors, config), "its weights", **options
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _rename(
    name: str, in_layer: Mapping[str, str], outside: Mapping[str, str], old: str, new: str
) -> str:
    """A tensor's name in the other format, its last part (weight, bias, theta) kept."""
    module, _, leaf = name.rpartition(".")
    if module in outside:
        return f"{outside[module]}.{leaf}"
    if name.startswith(old):
        number, _, inside = module[len(old) :].partition(".")
        if number.isdigit() and inside in in_layer:
            return f"{new}{number}.{in_layer[inside]}.{leaf}"
    raise ValueError(f"unknown tensor {name}")
