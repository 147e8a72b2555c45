"""What one layer of a model is: the choices that each setting has, and the settings of a layer.

`ModelConfig` in `config.py` resolves its settings to one `LayerConfig` a layer. Importing this
takes the standard library alone."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MixerFacts:
    """What a mixer is to the rest of the package.

    fixed_state: what it remembers of a text has one size, [B, H, K, V] a layer, however long the
        text is; else it remembers the keys and values of every token.
    norm: it has a norm over the output of all heads.
    parameters: learned numbers of its own for each channel of the heads, beside its projections.
    """

    fixed_state: bool
    norm: bool
    parameters: int = 0


@dataclass(frozen=True)
class PositionFacts:
    """What a position does to q and k in the mixer.

    width: the factor by which it widens them.
    parameters: learned numbers for each channel."""

    width: int = 1
    parameters: int = 0


# The choices of each setting, and what must be known of one without torch. `model/layers.py` and
# `model/mixers.py` hold one class or function for each.
MIXERS = {
    "gla": MixerFacts(fixed_state=True, norm=True),
    "softmax": MixerFacts(fixed_state=False, norm=False),
}
POSITIONS = {
    "lrpe": PositionFacts(width=2, parameters=1),
    "rope": PositionFacts(),
    "ape": None,
    "none": None,
}
# The decays that each token sets for itself, in linear layers alone, and how many numbers it sets
# for each head: its decay, and with "delta" how much of what its key recalls is replaced.
BY_TOKEN = {"gated": 1, "delta": 2}
DECAYS = ("alibi", "paper", "none", *BY_TOKEN)
# What a short causal convolution reads: what the mixer is given, or each head's q, k, v and gate
# (not that of gate_rank).
CONVOLUTIONS = ("none", "input", "heads")
TAPS = 4  # tokens that it reads, the token itself included
NORMS = {"srmsnorm": 0, "rmsnorm": 1, "layernorm": 2}  # learned parameters a channel
GLUS = {"sglu": 2, "swiglu": 2, "mlp": 1}  # matrices that widen D to F
ACTIVATIONS = (
    "swish",
    "none",
    "1+elu",
    "2+elu",
    "elu",
    "relu",
    "leaky_relu",
    "gelu",
    "sigmoid",
    "sine",
    "exp",
)
# The settings of a model that are one of several words.
CHOICES: dict[str, Collection[str]] = {
    "mixer": MIXERS,
    "position": POSITIONS,
    "decay": DECAYS,
    "activation": ACTIVATIONS,
    "convolution": CONVOLUTIONS,
    "glu": GLUS,
    "norm": NORMS,
}
# Hugging Face's names for kinds of layers, and whether what such a layer remembers of a text stops
# growing. Linear layers use `ModelConfig.mixer`, whose state has one size.
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
LAYER_TYPES = {LINEAR: True, FULL: False, SLIDING: True}
WINDOW = 1_024  # of sliding_attention, where the model does not say another
LARGEST_WINDOW = 2**31  # more would not fit the integers that positions are counted with


@dataclass(frozen=True, kw_only=True)
class SoftmaxSettings:
    """What the softmax layers of a model have instead of the model's own settings.

    A setting that is None is, in a stack with linear layers, that of the softmax Transformer
    (`config.TRANSFORMER`); in a stack without them it is the model's own.

    Raises ValueError for a value that no layer can have."""

    position: str | None = None  # in every softmax layer
    activation: str | None = None  # on q and k
    decay: str | None = None  # weakened from layer to layer as the model says
    gate: bool | None = None
    # The heads of a softmax layer are as wide together as the model's. None: as many as those.
    num_attention_heads: int | None = None
    # Groups of query heads that share their keys and values. None: a group for each query head.
    num_key_value_heads: int | None = None
    # The tokens that a query of a sliding_attention layer sees, its own included. None: WINDOW.
    window: int | None = None

    def __post_init__(self) -> None:
        positions = [choice for choice in POSITIONS if choice != "ape"]  # added to the embeddings
        for name, choices in (
            ("position", positions),
            ("activation", ACTIVATIONS),
            ("decay", [choice for choice in DECAYS if choice not in BY_TOKEN]),
        ):
            if getattr(self, name) is not None:
                require_choice(f"softmax.{name}", getattr(self, name), choices)
        fits = self.gate is None or isinstance(self.gate, bool)
        require(fits, "softmax.gate", self.gate, "true or false")
        for name in ("num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            fits = value is None or (is_int(value) and value > 0)
            require(fits, f"softmax.{name}", value, "null or a positive integer")
        # A query whose window is one token would see nothing but itself.
        fits = self.window is None or (is_int(self.window) and 1 < self.window <= LARGEST_WINDOW)
        require(fits, "softmax.window", self.window, f"null or from 2 to {LARGEST_WINDOW:,}")

    @classmethod
    def from_dict(cls, values: object) -> SoftmaxSettings:
        """From a table of some settings. Raises ValueError for an unknown key."""
        require(isinstance(values, dict), "softmax", values, "a table of settings")
        assert isinstance(values, dict)
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                close = nearest(key, known, "softmax.")
                raise ValueError(f"unknown model config key 'softmax.{key}'{close}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one layer's mixer is, with every setting resolved. Layers of equal records have
    parameters of equal shapes.

    position: "none" where q and k of this layer are not turned. window: the tokens that a query
    sees, itself included; None stands for all before it.
    """

    type: str
    mixer: str
    position: str
    activation: str
    decay: str
    gate: bool
    gate_rank: int | None
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None = None
    convolved: int = 0  # channels that a short convolution reads

    @property
    def inner_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def group(self) -> int:
        """How many query heads share one head of keys and values."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def key_dim(self) -> int:
        """Width of a query and of a key, after the position has turned it."""
        facts = POSITIONS[self.position]
        return self.head_dim * (facts.width if facts else 1)

    @property
    def position_parameters(self) -> int:
        """Learned numbers of the position for each channel of the heads."""
        facts = POSITIONS[self.position]
        return facts.parameters if facts else 0

    @property
    def set_by_token(self) -> int:
        """How many numbers of its recurrence each token sets for each head."""
        return BY_TOKEN.get(self.decay, 0)

    @property
    def parts(self) -> int:
        """How many vectors of head_dim the first projection gives for each head of keys and values:
        its queries, a key, a value, and its gates unless gate_rank gives them a projection."""
        gates = self.group if self.gate and self.gate_rank is None else 0
        return self.group + 2 + gates

    @property
    def linear(self) -> bool:
        """Whether the state is [B, H, K, V], not keys and values."""
        return self.type == LINEAR

    @property
    def bounded(self) -> bool:
        """Whether what the layer remembers of a text stops growing, however long the text is."""
        return LAYER_TYPES[self.type]

    def kept(self, tokens: int) -> int:
        """Of how many of so many tokens a softmax layer keeps keys and values."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def state_bytes(self, tokens: int, itemsize: int = 4) -> int:
        """Bytes that the layer remembers of a text of so many tokens.

        itemsize: bytes of one number of the keys, the values and the tokens that a convolution
            remembers; the [B, H, K, V] of a linear layer is float32 in any case.
        """
        before = itemsize * (TAPS - 1) * self.convolved
        if self.linear:
            return 4 * self.num_attention_heads * self.key_dim * self.head_dim + before
        width = self.num_key_value_heads * (self.key_dim + self.head_dim)
        return self.kept(tokens) * itemsize * width + before


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"model config: {name} = {value!r}, but must be {wanted}")


def require_choice(name: str, value: Any, choices: Collection[str]) -> None:
    fits = isinstance(value, str) and value in choices
    require(fits, name, value, f"one of {', '.join(choices)}{nearest(value, choices)}")


def nearest(word: object, words: Collection[str], prefix: str = "") -> str:
    """The end of an error message: the known word closest to an unknown one, or with a prefix all
    of them."""
    close = difflib.get_close_matches(str(word).lower(), words, n=1)
    return (
        f"; did you mean {prefix}{close[0]}?"
        if close
        else f"; there are {', '.join(words)}"
        if prefix
        else ""
    )


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 (h + 1) / H) for a power of two; otherwise those of the power of two below it, followed
    by every second one of the power of two above it (ALiBi's rule, and the published
    checkpoints')."""

    def geometric(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    below = 2 ** (heads.bit_length() - 1)
    return geometric(below) + geometric(2 * below)[0::2][: heads - below]
