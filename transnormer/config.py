"""What a model is: its configuration, the named sizes, and how many parameters they have.

Importing this takes the standard library alone; only reading a file takes `files`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .layer_config import (
    CHOICES,
    FULL,
    GLUS,
    LAYER_TYPES,
    LINEAR,
    MIXERS,
    NORMS,
    POSITIONS,
    SLIDING,
    TAPS,
    WINDOW,
    LayerConfig,
    SoftmaxSettings,
    alibi_slopes,
    is_int,
    nearest,
    require,
    require_choice,
)

MODEL_TYPE = "transnormer"  # in every config.json of ours
# What a config.json must say, because no default is right for weights that somebody else wrote.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# The largest that a file is believed: more would fill the memory before anything could be compared
# with the weights.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "intermediate_size": 2**20,
    "head_dim": 2**20,
    "gate_rank": 2**20,
    "max_position_embeddings": 2**31,
}

# Keys that other libraries write into a config.json and that carry nothing we need.
FOREIGN_KEYS = ("architectures", "dtype", "model_type", "torch_dtype", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A language model in one record; the names are Hugging Face's where they have one (paper
    section 3).

    The defaults are TransNormerLLM as published. The softmax Transformer is the same record with
    other words: `ModelConfig.named("385m", **TRANSFORMER)`.

    Raises ValueError for a word or number that no model can have, naming the field and what would
    fit."""

    vocab_size: int = 64_000
    hidden_size: int = 1_024  # D
    num_hidden_layers: int = 24  # L
    num_attention_heads: int = 8  # H
    head_dim: int = 0  # V, and K before LRPE doubles it; 0 means hidden_size / num_attention_heads
    intermediate_size: int = 2_816  # F
    mixer: str = "gla"  # of every layer or, where layer_types has linear ones, of those
    # One of LAYER_TYPES for each layer. None: every layer has `mixer`.
    layer_types: tuple[str, ...] | None = None
    # What softmax layers have instead of mixer, position, decay, gate, activation and heads below.
    softmax: SoftmaxSettings | None = None
    position: str = "lrpe"
    # "first", "all" or numbers from 0, of the layers that read `position`
    position_layers: str | tuple[int, ...] = "first"
    rope_theta: float = 10_000.0
    # rows of the learned position table; read by position "ape" alone
    max_position_embeddings: int = 2_048
    # "alibi": the published checkpoints' slopes; "paper": equation 10; "gated": each token sets its
    # own, which begins as that of "alibi"; "delta": each token also replaces what its key recalls
    decay: str = "alibi"
    # the factor that weakens the decay from the first layer to the last
    decay_temperature: bool = True
    decay_scale: float = 1.0  # multiplies every log_decay
    gate: bool = True
    gate_rank: int | None = None  # None: a full gate projection; r: two thin ones, D -> r -> heads
    activation: str = "swish"  # on q and k
    qk_norm: bool = False  # SimpleRMSNorm over each head of q and k
    # in linear layers: the norm over the heads' output takes each head by itself
    head_norm: bool = False
    # A short causal convolution of each channel, in every layer, which starts as the identity.
    # "heads": of each head's q, k, v and, without gate_rank, gate. "input": of what the mixer is
    # given, which is then also what gate_rank and a token's own decay read.
    convolution: str = "none"
    # "mlp": no gate, two matrices with GELU between them, as in a plain Transformer
    glu: str = "sglu"
    norm: str = "srmsnorm"  # in the blocks, over the heads' output, and before the head
    norm_eps: float = 1e-6
    embed_scale: bool = False  # multiply embeddings by sqrt(hidden_size)
    bias: bool = False  # on every linear map but the head and a token's own decay
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            require(
                is_int(value := getattr(self, name)) and value > 0,
                name,
                value,
                "a positive integer",
            )
        require(
            is_int(self.head_dim) and self.head_dim >= 0,
            "head_dim",
            self.head_dim,
            "an integer, 0 or more",
        )
        for name, choices in CHOICES.items():
            require_choice(name, getattr(self, name), choices)
        for name in _SWITCHES:
            require(isinstance(value := getattr(self, name), bool), name, value, "true or false")
        for name in ("rope_theta", "norm_eps", "initializer_range", "decay_scale"):
            value = getattr(self, name)
            fits = (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and math.isfinite(value)
                and value >= 0
            )
            require(fits, name, value, "a finite number, 0 or more")
        if not self.head_dim:
            whole = self.hidden_size % self.num_attention_heads == 0
            require(
                whole,
                "num_attention_heads",
                self.num_attention_heads,
                f"a divisor of hidden_size {self.hidden_size}",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.gate_rank is not None:
            require(
                is_int(self.gate_rank) and self.gate_rank > 0,
                "gate_rank",
                self.gate_rank,
                "null or a positive integer",
            )
            require(self.gate, "gate_rank", self.gate_rank, "null while gate is false")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            fits = value is None or (is_int(value) and 0 <= value < self.vocab_size)
            require(fits, name, value, f"null or an id below vocab_size {self.vocab_size}")
        self._check_layer_types()
        self._check_position_layers()
        normed = any(MIXERS[layer.mixer].norm for layer in self.layers)
        wanted = "false where no layer has a norm over its heads"
        require(normed or not self.head_norm, "head_norm", self.head_norm, wanted)
        for layer in {*self.layers}:
            self._check_layer(layer)

    def _check_layer_types(self) -> None:
        """Check layer_types and softmax, and give them their types."""
        fixed = [name for name, facts in MIXERS.items() if facts.fixed_state]
        types, softmax = self.layer_types, self.softmax
        if types is not None:
            fits = isinstance(types, (list, tuple)) and len(types) == self.num_hidden_layers
            require(fits, "layer_types", types, f"a list of {self.num_hidden_layers} layer types")
            for n, name in enumerate(types):
                require_choice(f"layer_types[{n}]", name, LAYER_TYPES)
            if LINEAR in types:
                wanted = f"{' or '.join(fixed)} for the linear layers"
                require(self.mixer in fixed, "mixer", self.mixer, wanted)
            else:
                wanted = "softmax where layer_types has no linear_attention"
                require(self.mixer == "softmax", "mixer", self.mixer, wanted)
            types = None if set(types) == {LINEAR} else tuple(types)  # which None means, too
            object.__setattr__(self, "layer_types", types)
        if softmax is None:
            return
        if not isinstance(softmax, SoftmaxSettings):
            softmax = SoftmaxSettings.from_dict(softmax)
            object.__setattr__(self, "softmax", softmax)
        if types is None and self.mixer in fixed:
            raise ValueError("model config: softmax is set, but no layer is a softmax layer")
        fits = softmax.window is None or SLIDING in (types or ())
        require(fits, "softmax.window", softmax.window, f"null where no layer is {SLIDING}")

    def _check_layer(self, layer: LayerConfig) -> None:
        fits = layer.linear or not layer.set_by_token
        require(fits, "decay", layer.decay, "alibi, paper or none where no layer is linear")
        heads, groups = layer.num_attention_heads, layer.num_key_value_heads
        wanted = f"a divisor of the width of all heads, {self.inner_size}"
        require(self.inner_size % heads == 0, "softmax.num_attention_heads", heads, wanted)
        if layer.position == "rope":
            own = layer.head_dim == self.head_dim
            name, value = ("head_dim", self.head_dim) if own else ("num_attention_heads", heads)
            wanted = f"{'even' if own else f'such that {self.inner_size} / heads is even'} with"
            name = name if own else f"softmax.{name}"
            require(layer.head_dim % 2 == 0, name, value, f"{wanted} position rope")
        name = "softmax.num_key_value_heads"
        require(heads % groups == 0, name, groups, f"a divisor of {heads}")
        wanted = f"null with position {layer.position}, which each head learns for itself"
        require(groups == heads or not layer.position_parameters, name, groups, wanted)

    def _check_position_layers(self) -> None:
        """Check position_layers, and sort them."""
        layers, types = self.position_layers, self.layer_types
        if isinstance(layers, str):
            fits = layers in ("first", "all")
            require(fits, "position_layers", layers, "first, all or a list")
            return
        fits = isinstance(layers, (list, tuple)) and all(
            is_int(layer) and 0 <= layer < self.num_hidden_layers for layer in layers
        )
        most = self.num_hidden_layers - 1
        require(fits, "position_layers", layers, f"layer numbers from 0 to {most}")
        fits = types is None or LINEAR not in types or all(types[n] == LINEAR for n in layers)
        require(fits, "position_layers", layers, "numbers of linear layers; see softmax.position")
        object.__setattr__(self, "position_layers", tuple(sorted(set(layers))))

    @property
    def inner_size(self) -> int:
        """Width of all heads together, H * head_dim."""
        return self.num_attention_heads * self.head_dim

    @cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """What each layer's mixer is, from the first layer to the last."""
        uniform = LINEAR if MIXERS[self.mixer].fixed_state else FULL
        types = self.layer_types or (uniform,) * self.num_hidden_layers
        linear = LINEAR in types
        # In a stack with linear layers `position` is theirs alone.
        reading = [n for n, name in enumerate(types) if name == LINEAR or not linear]
        turned = self.position_layers
        if isinstance(turned, str):
            turned = tuple(reading[:1] if turned == "first" else reading)
        if POSITIONS[self.position] is None:
            turned = ()
        places = set(turned)
        kinds = [(name, n in places) for n, name in enumerate(types)]
        records = {kind: self._layer(*kind, linear) for kind in set(kinds)}
        return tuple(records[kind] for kind in kinds)

    def _layer(self, name: str, turned: bool, linear: bool) -> LayerConfig:
        """name: its type. turned: whether it has `position`. linear: whether any layer is."""
        settings = {key: getattr(self, key) for key in ("activation", "decay", "gate")}
        settings["position"] = self.position if turned else "none"
        heads, groups, window, rank = self.num_attention_heads, None, None, self.gate_rank
        if name != LINEAR:
            own = self.softmax or SoftmaxSettings()
            if linear:
                settings, rank = {key: TRANSFORMER[key] for key in settings}, None
            for key in settings:
                if getattr(own, key) is not None:
                    settings[key] = getattr(own, key)
            heads, groups = own.num_attention_heads or heads, own.num_key_value_heads
            window = (own.window or WINDOW) if name == SLIDING else None
        layer = LayerConfig(
            type=name,
            mixer="softmax" if linear and name != LINEAR else self.mixer,
            **settings,
            gate_rank=rank if settings["gate"] else None,
            num_attention_heads=heads,
            num_key_value_heads=groups or heads,
            head_dim=self.inner_size // heads,
            window=window,
        )
        if self.convolution == "none":
            return layer
        fused = layer.parts * layer.num_key_value_heads * layer.head_dim
        read = fused if self.convolution == "heads" else self.hidden_size
        return dataclasses.replace(layer, convolved=read)

    @property
    def bounded(self) -> bool:
        """Whether what the model remembers of a text stops growing, however long the text is."""
        return all(layer.bounded for layer in self.layers)

    @property
    def linear(self) -> bool:
        """Whether every layer is linear: the state is [B, H, K, V] a layer, and what convolutions
        remember."""
        return all(layer.linear for layer in self.layers)

    def state_bytes(self, tokens: int, itemsize: int = 4) -> int:
        """Bytes that the model remembers of a text of so many tokens; itemsize: of a number of
        keys and values."""
        return sum(layer.state_bytes(tokens, itemsize) for layer in self.layers)

    def growth_bytes(self, itemsize: int = 4) -> int:
        """Bytes by which what the model remembers grows with every token, once the windows are
        full."""
        growing = [layer for layer in self.layers if not layer.bounded]
        return sum(
            layer.state_bytes(1, itemsize) - layer.state_bytes(0, itemsize) for layer in growing
        )

    def has_position(self, layer: int) -> bool:
        """Whether the mixer of this layer (from 0) turns q and k by position, as LRPE and RoPE
        do."""
        return self.layers[layer].position != "none"

    def log_decay(self, layer: int) -> list[float]:
        """Natural logarithm of each head's decay per token in this layer (from 0): H numbers, all
        <= 0.

        "alibi" is what the published checkpoints compute, and what "gated" and "delta" begin with;
        "paper" is equation 10 with h and l from 0."""
        own, layers = self.layers[layer], self.num_hidden_layers
        heads = own.num_attention_heads
        if own.decay == "none":
            return [0.0] * heads
        if own.decay == "paper":
            slopes = [8 * h / heads for h in range(heads)]
            temperature = 1 - layer / layers
        else:
            slopes = alibi_slopes(heads)
            temperature = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1.0
        factor = self.decay_scale * (temperature if self.decay_temperature else 1.0)
        return [-slope * factor for slope in slopes]

    def parameter_count(self) -> int:
        """Exact number of learned parameters, by formula; `model.parameter_count()` counts the real
        ones."""
        d, f, per_norm = self.hidden_size, self.intermediate_size, NORMS[self.norm]
        total = per_norm * d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        if self.position == "ape":
            total += self.max_position_embeddings * d
        for layer in self.layers:
            inner = layer.inner_size
            fused = layer.parts * layer.num_key_value_heads * layer.head_dim
            linears = [(d, fused), (inner, d), *[(d, f)] * GLUS[self.glu], (f, d)]
            if layer.gate_rank is not None:
                linears += [(d, layer.gate_rank), (layer.gate_rank, inner)]
            total += sum(i * o + (o if self.bias else 0) for i, o in linears)
            mixer = MIXERS[layer.mixer]
            normed = layer.head_dim if self.head_norm else inner
            total += per_norm * (2 * d + (normed if mixer.norm else 0))
            total += TAPS * layer.convolved
            total += d * layer.num_attention_heads * layer.set_by_token
            total += (mixer.parameters + layer.position_parameters) * inner
        return total

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; a changed width or head count gives head_dim its default
        again."""
        if {"hidden_size", "num_attention_heads"} & changes.keys() and "head_dim" not in changes:
            changes["head_dim"] = 0
        return ModelConfig.from_dict({**dataclasses.asdict(self), **changes})

    @classmethod
    def named(cls, size: str, **changes: Any) -> ModelConfig:
        """The configuration of a named size (`SIZES`), with some fields changed.

        Raises ValueError where the mixer alone is changed to softmax: that is no Transformer yet.
        """
        if size not in SIZES:
            raise ValueError(f"no model size {size!r}; there are {', '.join(SIZES)}")
        if (
            changes.get("mixer") == "softmax"
            and not {"position", "decay", "activation"} & changes.keys()
        ):
            raise ValueError(
                "mixer = softmax alone keeps TransNormerLLM's positions (lrpe), decay (alibi), "
                "activation (swish), gate, "
                'GLU and norm. For the Transformer say kind = "transformer" (in Python '
                "**TRANSFORMER); for a mixture, "
                "name the position, decay and activation that you want"
            )
        return cls(**SIZES[size]).replace(**changes)

    @classmethod
    def published(cls, size: str, **changes: Any) -> ModelConfig:
        """`named`, with embeddings scaled as in the checkpoint that the authors released at that
        size, or as in their 385M where they released none. Raises ValueError as `named` does."""
        return cls.named(size, **{"embed_scale": size not in UNSCALED, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """From a record with exactly our keys (Hugging Face's bookkeeping keys are passed over)."""
        _check_keys(values)
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read a config.json of our format. OSError or ValueError names the file and what is wrong
        in it."""
        from .files import read_json

        values = read_json(path)
        try:
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            if (kind := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
                raise ValueError(f"a model of the type {kind!r}, not {MODEL_TYPE!r}")
            _check_keys(values)
            if missing := [name for name in SHAPE if name not in values]:
                raise ValueError(f"no {', '.join(missing)}, so the model's shape is not known")
            for name, most in LARGEST.items():
                if is_int(values.get(name)) and values[name] > most:
                    raise ValueError(f"{name} is {values[name]:,}, more than {most:,}")
            return cls.from_dict(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The record as config.json holds it."""
        values = dataclasses.asdict(self)
        for name in _NEWER:  # files of models without them do not name them
            if values[name] == getattr(ModelConfig, name):
                del values[name]
        for name in ("position_layers", "layer_types"):
            if isinstance(values.get(name), tuple):
                values[name] = list(values[name])
        return {"architectures": ["TransNormerForCausalLM"], "model_type": MODEL_TYPE, **values}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


_NEWER = ("layer_types", "softmax", "qk_norm", "head_norm", "convolution")
_SWITCHES = (
    "decay_temperature",
    "gate",
    "qk_norm",
    "head_norm",
    "embed_scale",
    "bias",
    "tie_word_embeddings",
)
# The softmax baseline (LLaMA style): the same model in other words.
TRANSFORMER: dict[str, Any] = {
    "mixer": "softmax",
    "position": "rope",
    "position_layers": "all",
    "decay": "none",
    "gate": False,
    "activation": "none",
    "glu": "swiglu",
    "norm": "rmsnorm",
}


def _size(layers: int, width: int, heads: int, glu: int, vocab: int = 64_000) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": glu,
        "vocab_size": vocab,
    }


# Rows 385m to 65b are the paper's (their parameter counts agree with it at vocabulary 50,272). No
# integer F gives the paper's count for 175b: F = 32,768 is our choice. Rows 5m to 160m are ours,
# for experiments.
UNSCALED = ("3b", "7b")  # sizes whose released checkpoints do not scale the embedding
SIZES: dict[str, dict[str, Any]] = {
    "5m": _size(5, 256, 4, 704, 4_096),
    "10m": _size(6, 320, 5, 880, 4_096),
    "20m": _size(8, 384, 6, 1_056, 8_192),
    "45m": _size(10, 512, 8, 1_408, 16_384),
    "160m": _size(16, 768, 12, 2_304, 32_768),
    "385m": _size(24, 1_024, 8, 2_816),
    "1b": _size(16, 2_048, 16, 5_632),
    "3b": _size(32, 2_560, 20, 6_912),
    "7b": _size(30, 4_096, 32, 11_008),
    "13b": _size(36, 5_120, 40, 13_824),
    "65b": _size(72, 8_192, 64, 22_016),
    "175b": _size(88, 12_288, 96, 32_768),
}


def _check_keys(values: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in values:
        if key not in known and key not in FOREIGN_KEYS:
            raise ValueError(f"unknown model config key {key!r}{nearest(key, known)}")
