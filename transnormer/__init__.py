"""TransNormerLLM: linear attention at the cost of a recurrence, trained like a Transformer (arXiv
2307.14995)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import SIZES, TRANSFORMER, ModelConfig
    from .inference.engine import Engine
    from .inference.scheduler import RequestSettings
    from .model.language_model import LanguageModel
    from .model.state import State
    from .ops import lightning_attention, linear_cross_entropy, simple_rms_norm

__version__ = "0.1.0"
__all__ = [
    "SIZES",
    "TRANSFORMER",
    "Engine",
    "LanguageModel",
    "ModelConfig",
    "RequestSettings",
    "State",
    "generate",
    "lightning_attention",
    "linear_cross_entropy",
    "load",
    "simple_rms_norm",
]

# Where the names are that are imported when they are first used: torch takes seconds, and nothing
# here needs it before.
_HOMES = {
    "SIZES": "config",
    "TRANSFORMER": "config",
    "Engine": "inference.engine",
    "ModelConfig": "config",
    "RequestSettings": "inference.scheduler",
    "LanguageModel": "model.language_model",
    "State": "model.state",
    "lightning_attention": "ops",
    "linear_cross_entropy": "ops",
    "simple_rms_norm": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def load(path: str, **options: Any) -> LanguageModel:
    """A model from any folder: a run, an exported model, a published checkpoint. See
    `formats.folders.load`."""
    from .formats.folders import load

    return load(path, **options)


def generate(
    model: LanguageModel,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The text that continues a prompt, piece by piece. See `inference.session` for texts that
    go on, and `Engine` for many at a time."""
    from .inference.sampling import Sampling
    from .inference.session import generate_text

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return generate_text(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
