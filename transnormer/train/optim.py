"""Optimizers, which parameters they decay, and learning-rate schedules."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ..model.language_model import LanguageModel
from ..model.mixer import Mixer
from .muon import Muon
from .recipe import Optim

Group = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam remembers of a parameter


def new_optimizer(model: LanguageModel, recipe: Optim) -> torch.optim.Optimizer:
    """The recipe's optimizer of what is trained.

    Weight decay is on the weights of linear maps and embeddings alone: not on norms' gains, biases,
    LRPE's angles, short convolutions. Parameters may be DTensors, if all are. Raises ValueError
    where 8 bits cannot be had."""
    maps = [each for each in model.modules() if isinstance(each, (nn.Linear, nn.Embedding))]
    decayed = {id(each.weight) for each in maps}
    inner = _inner_matrices(model) if recipe.name == "muon" else {}
    groups: list[Group] = [
        {"params": [], "weight_decay": decay} for decay in (recipe.weight_decay, 0.0)
    ]
    for p in model.parameters():
        if p.requires_grad and p not in inner:
            groups[id(p) not in decayed]["params"].append(p)
    groups = [group | {"state_names": MOMENTS} for group in groups if group["params"]]
    settings: Group = {
        "lr": recipe.lr,
        "betas": (recipe.betas[0], recipe.betas[1]),
        "eps": recipe.eps,
    }
    if recipe.bits == 8:
        return _in_8_bits(groups, recipe.name, settings)
    adam = (torch.optim.Adam if recipe.name == "adam" else torch.optim.AdamW)(
        groups, **settings, fused=True
    )
    if not inner:
        return adam
    blocks = [
        {"params": [p for p in inner if inner[p] == shape], "blocks": shape}
        for shape in dict.fromkeys(inner.values())
    ]
    return OptimizerGroup(Muon(blocks, lr=recipe.lr, weight_decay=recipe.weight_decay), adam)


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Step where the scalar `bad` is 0 and change nothing where it is 1, which nobody has read yet;
    False if it cannot."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return False
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # what torch's own gradient scaler tells the fused kernels
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    return True


def _in_8_bits(groups: list[Group], name: str, settings: Group) -> torch.optim.Optimizer:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError(
            "optim.bits = 8 needs bitsandbytes: pip install 'transnormer[bits]'"
        ) from error
    if any(hasattr(p, "placements") for group in groups for p in group["params"]):
        raise ValueError(
            "optim.bits = 8 is for one process; several share the optimizer state already: write "
            "optim.bits = 32"
        )
    kind = bnb.optim.Adam8bit if name == "adam" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        [group | {"state_names": ("state1", "state2", "step")} for group in groups], **settings
    )
    return optimizer


# Muon.


def _inner_matrices(model: LanguageModel) -> dict[Tensor, tuple[int, int]]:
    """How each trained matrix of the blocks interleaves the rows of several maps: (maps, rows that
    stand together)."""
    found: dict[Tensor, tuple[int, int]] = {}
    for block in model.layers:
        maps = [module for module in block.modules() if isinstance(module, nn.Linear)]
        found |= {module.weight: (1, 0) for module in maps if module.weight.requires_grad}
        for mixer in (module for module in block.modules() if isinstance(module, Mixer)):
            if mixer.qkvu_proj.weight in found:
                found[mixer.qkvu_proj.weight] = (mixer.parts, mixer.head_dim)
    return found


class OptimizerGroup(torch.optim.Optimizer):
    """Several optimizers that act as one. Each has its own parameters."""

    def __init__(self, *parts: torch.optim.Optimizer):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


# Learning rates.


def learning_rate(recipe: Optim, step: int, steps: int) -> float:
    """The rate of a step (from 1): linear warm-up, then cosine, constant, or constant and a linear
    end (wsd)."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    start = (
        recipe.warmup_steps
        if recipe.schedule == "cosine"
        else steps - int(recipe.decay_share * steps)
    )
    done = max(0.0, (step - start) / max(1, steps - start))  # 0 ... 1 over the falling part
    share = (1 + math.cos(math.pi * done)) / 2 if recipe.schedule == "cosine" else 1 - done
    return recipe.lr * (recipe.min_lr + (1 - recipe.min_lr) * share)


# The optimizer state as named tensors.


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer remembers, by name, e.g. "exp_avg/layers.0.glu.up_proj.weight"; whole
    numbers as int64.

    KeyError where FSDP has gathered the model, whose parameters then are others: `state_dict` cuts
    it again."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{kind}/{names[p]}": value if isinstance(value, Tensor) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_tensors(
    model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; every trained parameter must have its state. Raises
    ValueError naming one without."""
    wanted = {
        p: set(group["state_names"]) for group in optimizer.param_groups for p in group["params"]
    }
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        found[name][kind] = value
    for name, p in model.named_parameters():
        if p not in wanted:
            continue
        if not wanted[p] <= found[name].keys():
            raise ValueError(f"the optimizer state of {name} is missing")
        optimizer.state[p] = {
            kind: int(value) if value.dtype == torch.int64 else value.to(p.device)
            for kind, value in found[name].items()
        }
