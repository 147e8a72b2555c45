"""Our configuration as transformers' own: the fields of `ModelConfig` beside transformers' keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..config import SHAPE, ModelConfig
from ..layer_config import SoftmaxSettings, nearest
from .cache_hf import number_of_states

FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
# Keys that transformers adds beside its own fields.
THEIRS = {
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}
# The keys of transformers that our config.json keeps.
KEPT = ("architectures", "dtype", "quantization_config", "transformers_version")


class TransNormerConfig(PreTrainedConfig):
    """`ModelConfig` for transformers: the same fields, defaults and checks, and transformers' own
    keys beside them.

    Raises ValueError for an unknown key and for a published checkpoint's configuration, which is
    another format."""

    model_type = "transnormer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    use_cache: ClassVar[bool] = True
    auto_map: ClassVar[dict[str, str]] = {}  # no remote code; TRL asks for it

    def __init__(self, **values: Any):
        if "decoder_embed_dim" in values:
            raise ValueError(
                "this is a published TransNormerLLM checkpoint; make a folder that transformers "
                "reads of it: "
                "transnormer convert"
            )
        own = {name: values.pop(name) for name in FIELDS if name in values}
        unknown = values.keys() - THEIRS - PreTrainedConfig.__dataclass_fields__.keys()
        if unknown:
            key = min(unknown)
            raise ValueError(f"unknown model config key {key!r}{nearest(key, FIELDS)}")
        checked = ModelConfig(**own)
        super().__init__(**values)
        for name in FIELDS:
            value = getattr(checked, name)
            if isinstance(value, SoftmaxSettings):  # which other libraries could not write as JSON
                value = dataclasses.asdict(value)
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """What a config.json holds. Raises ValueError where it does not say the model's shape."""
        missing = [name for name in SHAPE if name not in config_dict]
        # __init__ says more of a published checkpoint
        if missing and "decoder_embed_dim" not in config_dict:
            raise ValueError(
                f"config.json: no {', '.join(missing)}, so the model's shape is not known"
            )
        return super().from_dict(config_dict, **kwargs)

    def own(self) -> ModelConfig:
        """Our record. Raises ValueError where a field was set to what no model can have."""
        values = {name: getattr(self, name) for name in FIELDS if name != "layer_types"}
        return ModelConfig(**values, layer_types=self._layer_types)

    @property
    def bounded(self) -> bool:
        """As in `ModelConfig`."""
        return self.own().bounded

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, from which transformers makes its cache; also for a uniform
        stack, where `ModelConfig.layer_types` is None."""
        return [layer.type for layer in self.own().layers]

    @layer_types.setter
    def layer_types(self, types: Sequence[str] | None) -> None:
        self._layer_types = None if types is None else tuple(types)

    @property
    def sliding_window(self) -> int | None:
        """The window of the sliding_attention layers, under transformers' name."""
        return next((layer.window for layer in self.own().layers if layer.window), None)

    @property
    def number_of_conv_states(self) -> int:
        """How many states a linear layer's cache has room for: the recurrent state, the tokens
        read, and what short convolutions remember."""
        return number_of_states(self.own().layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it, under the names that `__init__` reads."""
        values = super().to_dict()
        values["layer_types"] = values.pop("_layer_types", None)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: our record whole, which `transnormer.load` reads, and
        transformers' bookkeeping."""
        theirs = super().to_diff_dict()
        return self.own().to_dict() | {
            key: theirs[key] for key in KEPT if theirs.get(key) is not None
        }
