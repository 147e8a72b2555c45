"""What one layer of a model is: the words that each setting knows, and the settings of a layer.

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
    """What a mixer is to the rest of the house.

    fixed_state: what it remembers of a text has one size, [B, H, K, V] a layer, however long the
        text is.
    norm: it has a norm over the output of all heads.
    """

    fixed_state: bool
    norm: bool


@dataclass(frozen=True)
class PositionFacts:
    """What a position does to q and k in the mixer. width: theirs afterwards, times head_dim;
    parameters: a channel."""

    width: int = 1
    parameters: int = 0


# The words each switch knows, and what must be known of one without torch. `model/layers.py` and
# `model/mixers.py` hold one class or function per word.
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
DECAYS = ("alibi", "paper", "none")
NORMS = {"srmsnorm": 0, "rmsnorm": 1, "layernorm": 2}  # learned parameters a channel
GLUS = ("sglu", "swiglu", "mlp")
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
# Hugging Face's words for layers. A linear layer is of the model's mixer, whose state has one size.
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
LAYER_TYPES = (LINEAR, FULL, SLIDING)


@dataclass(frozen=True, kw_only=True)
class SoftmaxSettings:
    """What the softmax layers of a stack are, whatever the model's other layers are. The defaults
    are those of the softmax baseline.

    Raises ValueError for a word or number that no layer can have."""

    position: str = "rope"  # in every softmax layer
    activation: str = "none"  # on q and k
    decay: str = "none"
    gate: bool = False
    # They share the model's inner width, H * head_dim; None: as many as num_attention_heads.
    num_attention_heads: int | None = None
    # groups of query heads that share their keys and values; None: a group for each query head
    num_key_value_heads: int | None = None
    # the last tokens that a query of a sliding_attention layer sees, itself included
    window: int = 1_024

    def __post_init__(self) -> None:
        positions = [word for word in POSITIONS if word != "ape"]  # which the model's input has
        for name, words in (
            ("position", positions),
            ("activation", ACTIVATIONS),
            ("decay", DECAYS),
        ):
            require_word(f"softmax.{name}", getattr(self, name), words)
        require(isinstance(self.gate, bool), "softmax.gate", self.gate, "true or false")
        for name in ("num_attention_heads", "num_key_value_heads"):
            value = getattr(self, name)
            require(
                value is None or (is_int(value) and value > 0),
                f"softmax.{name}",
                value,
                "null or a positive integer",
            )
        # a window of one token would leave nothing to attend to
        require(is_int(self.window) and self.window > 1, "softmax.window", self.window, "2 or more")

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
    def parts(self) -> int:
        """How many vectors of head_dim the first projection gives a head of keys and values: its
        queries, a key, a value, and the gates that are not a projection of their own."""
        gates = self.group if self.gate and self.gate_rank is None else 0
        return self.group + 2 + gates

    @property
    def linear(self) -> bool:
        """Whether the state is [B, H, K, V], not keys and values."""
        return self.type == LINEAR

    @property
    def bounded(self) -> bool:
        """Whether what the layer remembers of a text stops growing, however long the text is."""
        return self.type != FULL

    def state_bytes(self, tokens: int, itemsize: int = 4) -> int:
        """Bytes that the layer remembers of a text of so many tokens.

        itemsize: bytes of a number of the keys and values; linear layers keep float32.
        """
        if self.linear:
            return 4 * self.num_attention_heads * self.key_dim * self.head_dim
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return kept * itemsize * self.num_key_value_heads * (self.key_dim + self.head_dim)


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require(fits: bool, name: str, value: object, wanted: str) -> None:
    if not fits:
        raise ValueError(f"model config: {name} = {value!r}, but must be {wanted}")


def require_word(name: str, value: Any, words: Collection[str]) -> None:
    fits = isinstance(value, str) and value in words
    require(fits, name, value, f"one of {', '.join(words)}{nearest(value, words)}")


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
