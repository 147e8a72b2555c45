"""A few times of the ops and of decoding on one GPU, to be compared between two commits.

    PYTHONPATH=CHECKOUT python benchmarks/commits.py    once for each commit, on one machine

It prints JSON. Times are medians in milliseconds of single calls between CUDA events; graph:
a call's share of a CUDA graph of 20. Shapes are rows x heads x tokens, with heads of 128, in
bfloat16."""

from __future__ import annotations

import json
import statistics

import torch
from lib.gpu import graph_ms, median_ms
from lib.record import time_ms

from transnormer import LanguageModel, ModelConfig
from transnormer.inference.engine import Session
from transnormer.inference.sampling import Sampling
from transnormer.ops import lightning_attention
from transnormer.ops.gla import gated_linear_attention


def lightning(rows: int, heads: int, tokens: int) -> dict[str, float]:
    log_decay = -torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)
    q, k, v, gradient = (
        torch.randn(rows, tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    output = lightning_attention(q, k, v, log_decay)
    assert isinstance(output, torch.Tensor)

    def forward() -> object:
        return lightning_attention(q.detach(), k.detach(), v.detach(), log_decay)

    return {
        "forward_ms": median_ms(forward),
        "backward_ms": median_ms(
            lambda: torch.autograd.grad(output, (q, k, v), gradient, retain_graph=True)
        ),
        "forward_graph_ms": graph_ms([forward]),
    }


def gated(rows: int, heads: int, tokens: int) -> dict[str, float]:
    log_decay = -torch.exp2(-8 * torch.arange(1, heads + 1, device="cuda") / heads)
    qkvu = torch.randn(
        rows, tokens, heads, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    output, _ = gated_linear_attention(qkvu, log_decay)
    gradient = torch.randn_like(output)
    return {
        "forward_ms": median_ms(lambda: gated_linear_attention(qkvu.detach(), log_decay)),
        "backward_ms": median_ms(
            lambda: torch.autograd.grad(output, qkvu, gradient, retain_graph=True)
        ),
    }


def decoding(size: str, context: int = 128, tokens: int = 190) -> dict[str, float]:
    """Greedy decoding of one text, a token at a time."""
    model = LanguageModel(ModelConfig.named(size)).to("cuda", torch.bfloat16).eval()
    session = Session(model)
    session.read(torch.randint(1_000, (context,)).tolist())
    writer = session.write(tokens + 30, Sampling(temperature=0))
    for _ in range(20):
        next(writer)
    return {
        "token_ms": statistics.median(time_ms(lambda: next(writer), "cuda") for _ in range(tokens))
    }


def main() -> None:
    torch.manual_seed(0)
    rows = {
        f"lightning {'x'.join(map(str, shape))}": lightning(*shape)
        for shape in ((16, 8, 2_048), (4, 32, 8_192))
    }
    print(
        json.dumps(rows | {"gla 16x8x2048": gated(16, 8, 2_048), "decode 385m": decoding("385m")})
    )


if __name__ == "__main__":
    main()
