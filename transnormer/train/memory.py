"""What a training step holds in the memory of one GPU, in closed form: bf16 autocast over float32 weights, AdamW.

Bytes of weights, gradients and AdamW's memory are exact, for every rank. What autograd saves is counted tensor by
tensor (`saved_bytes`). The rest (`moments`) follows a step through the moments at which most is held at once.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config import ModelConfig
from ..model.language_model import LanguageModel
from ..ops.loss import CUDA_SLICE_BYTES
from .recipe import Parallel

PARTS = ("weights", "gradients", "optimizer", "activations", "state", "buffers", "reserve")
WIDE, NARROW = 4, 2  # bytes of a float32 and of a bfloat16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a run's numbers lie: the mesh as in `Parallel`, and how a step is cut. Defaults: one GPU."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    rows: int = 1  # of one micro-batch and data rank
    seq_len: int = 2_048
    accumulate: int = 1
    recompute: bool = False
    compile: bool = True

    @property
    def world(self) -> int:
        return self.replicate * self.sharers * self.tensor

    @property
    def sharers(self) -> int:
        """Among how many FSDP cuts a weight."""
        return self.shard * self.context

    @property
    def tokens(self) -> int:
        """That a rank reads in a micro-batch, together with the others of its tensor group."""
        return self.rows * self.seq_len // self.context

    @property
    def batch_tokens(self) -> int:
        return self.rows * self.seq_len * self.replicate * self.shard * self.accumulate

    @property
    def parallel(self) -> Parallel:
        return Parallel(replicate=self.replicate, shard=self.shard, context=self.context, tensor=self.tensor)


class Weight(NamedTuple):
    """rows, columns: of a matrix; columns 1 of a vector. cut: which of them (0, 1) tensor ranks share, None: neither."""

    rows: int
    columns: int
    cut: int | None

    def numel(self, layout: Layout, rank: int = 0) -> int:
        """Of the part that one of the sharers of FSDP has, which splits rows as torch.chunk does."""
        rows, columns = self._of_tensor_rank(layout)
        each = -(-rows // layout.sharers)
        return max(0, min(each, rows - rank * each)) * columns

    def gathered(self, layout: Layout) -> int:
        """What a tensor rank multiplies with."""
        return math.prod(self._of_tensor_rank(layout))

    def _of_tensor_rank(self, layout: Layout) -> tuple[int, int]:
        parts = layout.tensor
        return self.rows // (parts if self.cut == 0 else 1), self.columns // (parts if self.cut == 1 else 1)


class BlockKind(NamedTuple):
    """Blocks that cost the same. positioned: by LRPE or RoPE. wide: gathered in float32, as train/sharding.py has it."""

    weights: tuple[Weight, ...]
    positioned: bool
    wide: bool


@dataclass(frozen=True)
class Model:
    """What a configuration is made of."""

    config: ModelConfig
    rest: tuple[Weight, ...]  # embedding, head, last norm: FSDP's root
    first: BlockKind
    last: BlockKind
    kinds: Counter[BlockKind]

    @classmethod
    def of(cls, config: ModelConfig) -> Model:
        with torch.device("meta"):
            model = LanguageModel(config)
        rest: list[Weight] = []
        blocks: list[list[Weight]] = [[] for _ in model.layers]
        for name, p in model.named_parameters():
            rows, columns = p.shape if p.dim() == 2 else (p.numel(), 1)
            into = blocks[int(name.split(".")[1])] if name.startswith("layers.") else rest
            into.append(Weight(rows, columns, _cut(model, name)))
        found = [
            BlockKind(tuple(weights), config.has_position(layer), _is_wide(config, layer))
            for layer, weights in enumerate(blocks)
        ]
        return cls(config, tuple(rest), found[0], found[-1], Counter(found))

    def numel(self, layout: Layout, rank: int = 0) -> int:
        """Weights that a rank holds; `rank` counts FSDP's sharers, of which the first has most."""
        return sum(weight.numel(layout, rank) for weight in self.rest) + sum(
            count * weight.numel(layout, rank) for kind, count in self.kinds.items() for weight in kind.weights
        )

    def tensors(self) -> int:
        return len(self.rest) + sum(count * len(kind.weights) for kind, count in self.kinds.items())


def _cut(model: LanguageModel, name: str) -> int | None:
    """Which dimension of a weight `sharding.cut` shares among tensor ranks."""
    if not name.startswith("layers."):
        return 0 if name in ("embed_tokens.weight", "lm_head.weight") else None
    number, part, path = name.split(".", 3)[1:]
    shards = getattr(getattr(model.layers[int(number)], part), "SHARDS", {})
    word = next((word for module, word in shards.items() if path.startswith(f"{module}.")), "whole")
    if word == "rows":
        return 1 if path.endswith(".weight") else None
    return None if word == "whole" else 0


def _is_wide(config: ModelConfig, layer: int) -> bool:
    return config.norm == "layernorm" or (config.position == "lrpe" and config.has_position(layer))


def held_bytes(model: Model, layout: Layout, rank: int = 0) -> dict[str, int]:
    """Exactly what a rank holds between its steps, and of gradients within one. rank: among FSDP's sharers."""
    numel = model.numel(layout, rank)
    # a step counter a tensor, on every rank
    optimizer = 2 * WIDE * numel + WIDE * model.tensors()
    return {"weights": WIDE * numel, "gradients": WIDE * numel, "optimizer": optimizer}


def saved_bytes(config: ModelConfig, positioned: bool, layout: Layout) -> int:
    """What autograd saves of one block's forward, its weights not counted.

    A token of D numbers, all heads together of I, a GLU of F; N tensor ranks share heads and columns and, between the
    products, tokens. Compiled blocks save less: what the compiler can compute again from what is saved anyway.
    """
    N, n, compiled = layout.tensor, layout.tokens, layout.compile
    D, I, F = config.hidden_size, config.inner_size, config.intermediate_size  # noqa: E741
    linear = config.mixer == "gla"
    turned = 2 if positioned and config.position == "lrpe" else 1

    tokens = WIDE * D  # the residual stream where the first norm reads it,
    tokens += NARROW * D if compiled else WIDE * D  # and the second: compiled, the mixer's result, to be added again
    tokens += WIDE * (2 if config.norm != "srmsnorm" else 0)  # and what these norms divided by

    gathered = 2 * NARROW * D  # what both norms gave to products, of all tokens
    if config.norm != "srmsnorm" and not compiled:  # in float32, and rounded for both of the GLU's
        gathered += NARROW * D

    heads = NARROW * (4 if config.gate and config.gate_rank is None else 3) * I  # the projection: q, k, v, gate
    heads += NARROW * 2 * turned * I if linear or positioned else 0  # q and k as attention reads them
    heads += NARROW * I  # what attention gave
    if linear:
        heads += NARROW * I  # its norm times the gate, which the last product reads
        if (
            N > 1 and not compiled
        ):  # the norm over the heads of all ranks is made of torch's ops: in float32, and rounded
            heads += WIDE * I
    else:
        heads += WIDE * config.num_attention_heads  # a sum of exponentials for each head

    columns = NARROW * 3 * F  # both branches and their product
    if config.glu == "swiglu" and not compiled:
        columns += NARROW * F  # swish of one
    saved = n * (gathered + (tokens + heads + columns) // N)
    if linear and layout.context > 1:
        saved += _state_bytes(config, positioned, layout)  # that its segment began with
    return saved


def _state_bytes(config: ModelConfig, positioned: bool, layout: Layout) -> int:
    """Of one layer's state, of the heads of one tensor rank."""
    if config.mixer != "gla":
        return 0
    keys = config.head_dim * (2 if positioned and config.position == "lrpe" else 1)
    return WIDE * layout.rows * config.num_attention_heads * keys * config.head_dim // layout.tensor


def moments(model: Model, layout: Layout) -> dict[str, dict[str, int]]:
    """Bytes held at the moments of a step that may hold most, by part; none is the allocator's.

    With gradient accumulation the moments are those of the last micro-batch, when gradients are there throughout.
    """
    config, held = model.config, held_bytes(model, layout)
    N, n, D = layout.tensor, layout.tokens, config.hidden_size
    kinds, shares = model.kinds, layout.world > 1
    saved = {kind: saved_bytes(config, kind.positioned, layout) for kind in kinds}
    states = {kind: _state_bytes(config, kind.positioned, layout) for kind in kinds}
    all_states = sum(count * states[kind] for kind, count in kinds.items())
    whole = {kind: sum(weight.gathered(layout) for weight in kind.weights) for kind in kinds}

    stream = n * WIDE * D // N  # the residual stream between two blocks
    kept = sum(kinds.values()) * stream if layout.recompute else sum(c * saved[kind] for kind, c in kinds.items())

    # FSDP: the rest stays gathered in float32; a block comes while another is used, and leaves after it.
    rest = sum(weight.gathered(layout) for weight in model.rest) * WIDE if shares else 0
    block = {kind: whole[kind] * (WIDE if kind.wide else NARROW) if shares else 0 for kind in kinds}
    stays = sum(c * block[kind] for kind, c in kinds.items()) if layout.sharers == 1 else 0
    coming = max(block.values()) if layout.sharers > 1 else 0
    reduced = max(whole.values()) * WIDE if shares else 0  # gradients on their way, in float32

    # bf16 copies of float32 weights are saved for the backward; those of autocast, not of a compiled block, live in any
    # case as long as the forward.
    casts = {kind: whole[kind] * NARROW if kind.wide or not shares else 0 for kind in kinds}
    saved_casts = 0 if layout.recompute else sum(c * casts[kind] for kind, c in kinds.items())
    cached = saved_casts if layout.compile else sum(c * casts[kind] for kind, c in kinds.items())

    # The head: logits of a slice, the weight in bf16, what it read, and gradients computed in the forward.
    words = config.vocab_size // N
    slices = -(-n * words * NARROW // CUDA_SLICE_BYTES)
    d_x, d_w = n * NARROW * D, words * WIDE * D
    logits = -(-n // slices) * words * NARROW + words * NARROW * D
    # A block's gradients begin with the GLU's: those of the stream, of the tokens gathered, of its columns.
    work = n * (WIDE * D + NARROW * 2 * config.intermediate_size) // N + n * NARROW * D
    grown = held["gradients"] if layout.accumulate > 1 else 0  # before the last backward

    def moment(activations: int, state: int, buffers: int, gradients: int) -> dict[str, int]:
        return {
            "weights": held["weights"], "gradients": gradients, "optimizer": held["optimizer"],
            "activations": activations, "state": state, "buffers": buffers,
        }  # fmt: skip

    last, first = model.last, model.first
    carried = 0 if layout.recompute or layout.context == 1 else all_states  # which segments began with
    kept -= carried  # told as state
    down = config.intermediate_size * D // N * (NARROW if shares else WIDE)  # the first gradient of a block's weights
    inside = saved[last] - stream if layout.recompute else 0  # of a block whose forward is run again
    gone = stream if layout.recompute else saved[last]  # of a block that is through
    working = rest + (stays or block[last] + coming) + (saved_casts or casts[last]) + d_w + work + down
    return {
        "loss": moment(
            kept + stream, all_states + carried,
            rest + (stays or 2 * block[last]) + cached + logits + 2 * d_x + d_w, grown,
        ),
        "gradient of the head": moment(
            kept + stream, carried, rest + (stays or block[last]) + saved_casts + 2 * (d_x + d_w), grown
        ),
        "gradient of the last block": moment(kept + inside, carried, working, grown),
        "gradient of the block before": moment(kept + inside - gone, carried, working + reduced, grown),
        "gradient of the first block": moment(
            saved[first], 0, rest + (stays or block[first]) + casts[first] + d_w + work + down + reduced, held["gradients"]
        ),
        "gradient of its weights": moment(
            0, 0, rest + (stays or block[first]) + d_w + 2 * reduced + stream, held["gradients"]
        ),
        "gradient of the embedding": moment(0, 0, rest + 2 * d_w + stays + reduced + stream, held["gradients"]),
        "optimizer": moment(0, 0, 0, held["gradients"]),
    }  # fmt: skip
