"""The mathematics, on tensors: no configuration, no modules. Usable alone in any model."""

from .lightning import lightning_attention, lightning_step_
from .loss import linear_cross_entropy
from .norm import add_rms_norm, simple_rms_norm

__all__ = [
    "add_rms_norm",
    "lightning_attention",
    "lightning_step_",
    "linear_cross_entropy",
    "simple_rms_norm",
]
