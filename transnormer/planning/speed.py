"""The time of a step of a training run with a given layout, in closed form."""

from __future__ import annotations

from functools import cache

import numpy as np

from ..config import ModelConfig
from .hardware import (
    COPY_SHARE,
    EXPOSED,
    FSDP_COPIES,
    LINK_SHARE,
    MATMUL_SHARE,
    NETWORK_SHARE,
    PASSES_SHARE,
    Gpu,
)
from .memory import Layout, ParameterShapes, gather_groups

UPDATE_BYTES = 40  # read and written of each number: by AdamW 28, for the norm 4, to clip 8


def passes_share(config: ModelConfig) -> float:
    """The share of the rate of matrix products that forward and backward reach at this width. For a
    stack of several mixers it is the mean over the layers, which is an assumption.

    Raises ValueError where a layer's mixer was not measured."""
    total = 0.0
    for layer in config.layers:
        if layer.window is not None:
            raise ValueError(f"no run with {layer.type} layers was measured: plans know no windows")
        if layer.set_by_token:
            raise ValueError(
                f"no run with model.decay = {layer.decay} was measured: plans know none"
            )
        if layer.mixer not in PASSES_SHARE:
            raise ValueError(
                f"no run with model.mixer = {layer.mixer} was measured: plans know "
                f"{', '.join(PASSES_SHARE)}"
            )
        total += _share(layer.mixer, config.hidden_size)
    return total / config.num_hidden_layers


@cache
def _share(mixer: str, width: int) -> float:
    shares = PASSES_SHARE[mixer]
    return float(np.interp(width, list(shares), list(shares.values())))


def copied_bytes(shapes: ParameterShapes, layout: Layout, rows: int, seq_len: int) -> float:
    """Bytes that one GPU copies (read and written) in a step because of sharding. rows: as in
    `expected_memory`.

    In each pass FSDP casts the GPU's own weights from 4 bytes to 2, and copies every gathered
    weight to where it is multiplied. It casts every gradient from 2 bytes to 4. Under `tensor` all
    tokens are copied four times a block."""
    if layout.world == 1:
        return 0.0
    own, _ = shapes.share(layout)
    weights = 2 * (6 * own + 4 * shapes.blocks / layout.tensor) + 6 * shapes.blocks / layout.tensor
    tokens = rows * seq_len // layout.context * (layout.tensor > 1)
    return layout.accumulate * (
        FSDP_COPIES * weights
        + 16 * shapes.config.num_hidden_layers * tokens * shapes.config.hidden_size
    )


def sent_bytes(shapes: ParameterShapes, layout: Layout, rows: int, seq_len: int) -> dict[str, int]:
    """Bytes that one GPU sends in a step, by factor of the mesh. rows: as in `expected_memory`."""
    config, tensor, ranks = shapes.config, layout.tensor, layout.shard * layout.context
    rest = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    tokens = rows * seq_len // layout.context
    # FSDP gathers a block once for each pass, and the last blocks only once because they stay
    # gathered. Recomputation gathers nothing, because it runs while the block is gathered for the
    # backward pass.
    sizes, groups = gather_groups(shapes, tensor)
    twice = 2 * sum(sizes) - sum(sizes[n] for n in groups[-1])
    gather = shapes.blocks * twice / len(sizes) + 4 * rest  # the rest once, in float32
    whole = (shapes.blocks + rest) * 4 / tensor  # gradients in float32
    # exchanges: 4 of a block forward, 4 backward, and 3 in recomputation, which skips the last
    blocks = (11 if layout.recompute else 8) * config.num_hidden_layers
    passes = 3 if layout.recompute else 2
    state = 4 * rows * config.num_attention_heads // tensor * config.head_dim**2
    exact = {
        "shard": layout.accumulate * (gather / tensor + whole) * (ranks - 1) / ranks,
        "replicate": layout.accumulate
        * 2
        * whole
        / ranks
        * (layout.replicate - 1)
        / layout.replicate,
        # The embedding's two exchanges in float32, the head's two in bfloat16.
        "tensor": layout.accumulate
        * (blocks + 6)
        * tokens
        * 2
        * config.hidden_size
        * (tensor - 1)
        / tensor,
        "context": layout.accumulate
        * passes
        * config.num_hidden_layers
        * state
        * (layout.context - 1),
    }
    return {factor: int(sent) for factor, sent in exact.items()}


def find_speed(
    shapes: ParameterShapes, layout: Layout, gpu: Gpu, rows: int, seq_len: int
) -> tuple[float, dict[str, int]]:
    """(tokens a second of all GPUs, `sent_bytes`).

    Weights travel while blocks are computed (`EXPOSED`); for everything else that is sent the GPUs
    wait. It is assumed that no GPU waits for its host. Small models, `tensor` and `context` reach
    that only with `train.graph = true`."""
    config = shapes.config
    flops = shapes.flops_per_token
    if layout.recompute:
        flops += (flops - 6 * config.vocab_size * config.hidden_size) / 3
    tokens = rows * layout.accumulate * layout.replicate * layout.shard * seq_len
    memory = gpu.tbps * 1e12 * COPY_SHARE
    passes = (
        tokens * flops / (layout.world * gpu.tflops * 1e12 * MATMUL_SHARE * passes_share(config))
    )
    passes += copied_bytes(shapes, layout, rows, seq_len) / memory
    update = shapes.share(layout)[0] * UPDATE_BYTES / memory
    sent = sent_bytes(shapes, layout, rows, seq_len)
    spans = {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context,
        "shard": layout.tensor * layout.context * layout.shard,
        "replicate": layout.world,
    }
    link, network = gpu.link * LINK_SHARE, gpu.network * NETWORK_SHARE
    wait = {
        factor: sent[factor] / ((link if span <= gpu.node else network) * 1e9)
        for factor, span in spans.items()
    }
    passes = max(passes + EXPOSED * wait["shard"], wait["shard"])
    return tokens / (passes + update + wait["tensor"] + wait["context"] + wait["replicate"]), sent
