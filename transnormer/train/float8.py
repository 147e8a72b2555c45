"""Products of the blocks in float8, by torchao: rounded on the way into a product, kept and learned
as before."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from ..model.language_model import LanguageModel
from ..model.layers import Linear


def load(device: torch.device) -> Any:
    """torchao's module. Raises ValueError where it is missing or the GPU has no such products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "train.float8 needs an Ada, Hopper or newer GPU, not "
            f"{torch.cuda.get_device_name(device)}"
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries in it that other machines need
    try:
        import torchao.float8
    except ImportError as error:
        raise ValueError("train.float8 needs torchao: pip install 'transnormer[float8]'") from error
    finally:
        logging.disable(before)
    return torchao.float8


def convert(model: LanguageModel, scaling: str, device: torch.device) -> None:
    """Make the maps of the blocks multiply in float8 (e4m3, gradients in e5m2 where torchao does
    so), in place.

    scaling: one factor for a whole tensor ("tensorwise"), the fastest, or for each of its rows
    ("rowwise"), the more exact; both are found anew at every product, from what this process
    multiplies. Weights stay what they are, under the same names. Maps whose width is no multiple of
    16, which the hardware asks for, stay in bfloat16, and so do embedding, head and loss. Raises
    ValueError as `load`."""
    float8 = load(device)
    config = dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name(scaling),
        pad_inner_dim=True,  # tokens need be no multiple of 16
        # whose own products know one factor a tensor alone before torch 2.13
        emulate=device.type == "cpu",
    )
    for block in model.blocks():
        float8.convert_to_float8_training(block, config=config, module_filter_fn=_fits)


def _fits(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, Linear) and module.in_features % 16 == module.out_features % 16 == 0
