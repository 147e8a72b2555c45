"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off.

    top_k: among the k likeliest; top_p: among the fewest whose probabilities sum to at least p.
    seed: None draws one. Raises ValueError for a number that makes no sense.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}, but must be 0 or more")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed = {self.seed}, but must be from 0 to 2^63 - 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}, but must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}, but must be above 0 and at most 1")

    def generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token for every row: logits [B, vocab] -> [B] int64.

    Raises ValueError where the logits are not finite, however tokens are drawn, because the largest
    of them is then no choice of the model's."""
    if not logits.isfinite().all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or its dtype is too narrow"
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # of all likelier tokens; the first is always kept
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill(
            (before >= sampling.top_p).scatter(-1, index, before >= sampling.top_p), -torch.inf
        )
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
