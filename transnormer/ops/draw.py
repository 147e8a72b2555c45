"""Drawing a token of each row by temperature, top-k, top-p and min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import check_devices, choose, triton_refusal

# Whether the kernel is taken where nobody names it. Off until it has been measured on a GPU.
BY_DEFAULT = False
COLDEST = 1e-30  # a temperature below it counts as it


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The token at which the sum of the probabilities, the largest first, passes `uniform` times
    their whole sum; tokens of equal probability come in the order of their ids. [S] int64.

    Only the top_k likeliest count; of these the fewest whose probabilities sum to at least top_p of
    their sum; of these those at least min_p times as likely as the likeliest. The likeliest always
    counts.
    logits: [S, vocab]; not finite ones are allowed where they are -inf. temperature, top_p, min_p,
    uniform: [S, 1] float64. top_k: [S, 1] int64, at least 1.
    backend: "auto", which is "torch" as yet; "torch", which sorts every row and computes in
    float64; or "triton", which does not sort, and takes each probability in float32. Where
    `uniform` is within rounding of the border between two tokens, they may differ. Raises
    ValueError where the tensors are not on one device, RuntimeError where the named backend cannot
    run the call."""
    settings = (temperature, top_k, top_p, min_p, uniform)
    check_devices("draw", logits=logits, temperature=temperature, uniform=uniform)
    named = backend == "triton"
    refusal = triton_refusal(logits, named=named)
    if not (named or BY_DEFAULT):
        refusal = "it has not been measured on a GPU yet"
    refusals = {"triton": refusal, "torch": None}
    if choose("draw", backend, refusals) == "triton":
        from . import draw_triton

        return draw_triton.draw(logits, *settings)
    return _sorted(logits, *settings)


def _sorted(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    # in float64, because a vocabulary has many small probabilities
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=COLDEST)
    logits, token = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    probabilities = logits.softmax(-1).masked_fill(rank >= top_k, 0)
    sums = probabilities.cumsum(-1)
    # The likeliest is always kept. 1 cuts nothing, whatever rounding makes of the sums.
    cut = (sums - probabilities >= top_p * sums[:, -1:]) & (top_p < 1)
    cut |= probabilities < min_p * probabilities[:, :1]
    sums = probabilities.masked_fill(cut, 0).cumsum(-1)
    place = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    return token.gather(-1, place.clamp(max=logits.shape[-1] - 1))[:, 0]
