"""AdamW, which parameters it decays, and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.language_model import LanguageModel
from ..model.layers import LRPE
from .recipe import Optim


def adamw(model: LanguageModel, recipe: Optim) -> torch.optim.AdamW:
    """Of what is trained. Weight decay on matrices and embeddings alone: not on norms' gains, biases, LRPE's angles."""
    spared = {id(p) for module in model.modules() if isinstance(module, LRPE) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in spared]
    others = [p for p in trained if p.dim() <= 1 or id(p) in spared]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (recipe.betas[0], recipe.betas[1])
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)


def learning_rate(recipe: Optim, step: int, steps: int) -> float:
    """The rate of a step (from 1): linear warm-up, then cosine, constant, or constant and a linear end (wsd)."""
    if step <= recipe.warmup_steps:
        return recipe.lr * step / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    start = recipe.warmup_steps if recipe.schedule == "cosine" else steps - int(recipe.decay_share * steps)
    done = max(0.0, (step - start) / max(1, steps - start))  # 0 ... 1 over the falling part
    share = (1 + math.cos(math.pi * done)) / 2 if recipe.schedule == "cosine" else 1 - done
    return recipe.lr * (recipe.min_lr + (1 - recipe.min_lr) * share)


def optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory by name, e.g. "exp_avg/layers.0.glu.up_proj.weight"."""
    return {
        f"{kind}/{name}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def load_optimizer_tensors(model: LanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; all that is trained must have its memory. Raises ValueError naming one without."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = {key.partition("/")[0]: value for key, value in tensors.items() if key.partition("/")[2] == name}
        if not {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
            raise ValueError(f"the optimizer's memory of {name} is missing")
        optimizer.state[p] = {kind: value.to(p.device) for kind, value in state.items()}
