"""TransNormerLLM: linear attention at the cost of a recurrence, trained like a Transformer (arXiv 2307.14995)."""

from __future__ import annotations

from typing import Any

from .config import SIZES, TRANSFORMER, ModelConfig
from .model.language_model import LanguageModel
from .model.state import State
from .ops import lightning_attention, linear_cross_entropy, simple_rms_norm

__version__ = "0.1.0"
__all__ = [
    "SIZES", "TRANSFORMER", "LanguageModel", "ModelConfig", "State", "generate", "lightning_attention",
    "linear_cross_entropy", "load", "simple_rms_norm",
]  # fmt: skip


def load(path: str, **options: Any) -> LanguageModel:
    """A model from any folder: a run, an exported model, a published checkpoint. See `hub.folders.load`."""
    from .hub.folders import load

    return load(path, **options)


def generate(model: LanguageModel, prompt: str, **options: Any) -> Any:
    """Text that continues a prompt, piece by piece. See `inference.engine.generate_text`."""
    from .inference.engine import generate_text

    return generate_text(model, prompt, **options)
