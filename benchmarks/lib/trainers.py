"""What `benchmarks/train.py` trains on a GPU: ours, our softmax baseline, a LLaMA from outside,
fla's RetNet.

Each is a function of a size that gives a `Trainer`: `loss(ids)` is the mean loss of ids [B, T + 1],
whose forward runs under bf16 autocast over float32 weights (RetNet: pure bf16 weights, as its
authors train it)."""

# mypy: allow-untyped-defs

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.model.cuda_graph import Graph
from transnormer.train.mesh import Mesh
from transnormer.train.optim import new_optimizer
from transnormer.train.parallelize import parallelize
from transnormer.train.recipe import Optim


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@dataclasses.dataclass
class Trainer:
    """A model and its loss; flops: of a token at a length, None where unknown; note: what sets it
    apart; graph: whether forward and backward are one CUDA graph."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    flops: Callable[[int], float | None]
    note: str = ""
    new_optimizer: Callable[[Any], torch.optim.Optimizer] = _adamw
    graph: bool = False

    def step(self, ids: Tensor) -> Tensor:
        """Loss, backward, clip, optimizer."""
        loss = self.passes(ids)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def __post_init__(self) -> None:
        self.optimizer = self.new_optimizer(self.model)
        self.passes = Graph(self.model, self._passes, adds=False) if self.graph else self._passes

    def _passes(self, ids: Tensor) -> Tensor:
        loss = self.loss(ids)
        loss.backward()
        return loss.detach()


def _ours(
    config: ModelConfig,
    compile: bool,
    note: str = "",
    optimizer: Any = _adamw,
    graph: bool = False,
    **how: Any,
) -> Trainer:
    with torch.device("cuda"):
        model = LanguageModel(config)
    parallelize(model, Mesh(torch.device("cuda")), compile=compile, dtype="bfloat16", **how)

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model.loss(ids[:, :-1], ids[:, 1:])

    return Trainer(model, loss, model.flops_per_token, note, optimizer, graph)


def _matched(size: str) -> ModelConfig:
    """The softmax Transformer with as many parameters as ours of this size, by the width of its
    GLU."""
    wanted, thin = (
        ModelConfig.named(size).parameter_count(),
        ModelConfig.named(size, **TRANSFORMER, intermediate_size=1),
    )
    each = 3 * thin.hidden_size * thin.num_hidden_layers
    return thin.replace(intermediate_size=1 + round((wanted - thin.parameter_count()) / each))


def _llama(size: str) -> Trainer:
    """transformers' LlamaModel, its layers compiled, SDPA's cuDNN kernels, Liger's head and loss in
    slices."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from transformers import LlamaConfig, LlamaModel

    config = _matched(size)
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=2**17,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device("cuda"):
        model = LlamaModel(theirs)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    for layer in model.layers:
        layer.compile()

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            x = model(input_ids=ids[:, :-1]).last_hidden_state
        weight, targets = model.embed_tokens.weight.to(torch.bfloat16), ids[:, 1:].reshape(-1)
        return LigerFusedLinearCrossEntropyFunction.apply(
            x.flatten(0, 1).to(torch.bfloat16), weight, targets
        )[0]

    with torch.device("meta"):
        flops = LanguageModel(config).flops_per_token
    return Trainer(
        model,
        loss,
        flops,
        f"intermediate_size {config.intermediate_size}, so that parameters match",
    )


def _retnet(size: str) -> Trainer:
    """fla's RetNet; its GLU is as wide as makes the parameters match ours."""
    from fla.models import RetNetConfig, RetNetForCausalLM

    config = ModelConfig.named(size)

    def build(width: int) -> Any:
        return RetNetForCausalLM(
            RetNetConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                intermediate_size=width,
                tie_word_embeddings=True,
                use_cache=False,
                max_position_embeddings=2**17,
            )
        )

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    with torch.device("meta"):
        thin = count(build(64))
        each = count(build(65)) - thin
    width = 64 + 64 * round((config.parameter_count() - thin) / each / 64)
    with torch.device("cuda"):
        model = build(width).to(torch.bfloat16)
    return Trainer(
        model,
        lambda ids: model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss,
        lambda length: None,
        (
            f"not compiled, pure bf16 weights and optimizer, intermediate_size {width}, "
            f"{count(model):,} parameters"
        ),
    )


CONTENDERS: dict[str, Callable[[str], Trainer]] = {
    "transnormer": lambda size: _ours(ModelConfig.named(size), True, note="blocks compiled"),
    "llama": _llama,
    "softmax": lambda size: _ours(
        ModelConfig.named(size, **TRANSFORMER),
        True,
        note="our LanguageModel in other words, blocks compiled, cuDNN",
    ),
    "retnet": _retnet,
    "transnormer, one graph": lambda size: _ours(
        ModelConfig.named(size),
        True,
        graph=True,
        note="blocks compiled, both passes as one CUDA graph",
    ),
    "softmax, one graph": lambda size: _ours(
        ModelConfig.named(size, **TRANSFORMER),
        True,
        graph=True,
        note="blocks compiled, both passes as one CUDA graph",
    ),
    "transnormer, eager": lambda size: _ours(ModelConfig.named(size), False, note="not compiled"),
    "transnormer, recomputed": lambda size: _ours(
        ModelConfig.named(size),
        True,
        recompute=True,
        note="blocks compiled and recomputed in the backward pass",
    ),
    "transnormer, muon": lambda size: _ours(
        ModelConfig.named(size),
        True,
        optimizer=partial(new_optimizer, recipe=Optim(name="muon", lr=1e-4)),
        note="blocks compiled, Muon for their matrices",
    ),
    "transnormer, 8 bits": lambda size: _ours(
        ModelConfig.named(size),
        True,
        optimizer=partial(new_optimizer, recipe=Optim(bits=8, lr=1e-4)),
        note="blocks compiled, AdamW's memory in 8 bits (bitsandbytes)",
    ),
    "transnormer, float8": lambda size: _ours(
        ModelConfig.named(size),
        True,
        float8="tensorwise",
        note="blocks compiled, float8 tensorwise (torchao)",
    ),
    "transnormer, float8 by rows": lambda size: _ours(
        ModelConfig.named(size),
        True,
        float8="rowwise",
        note="blocks compiled, float8 rowwise (torchao)",
    ),
}
