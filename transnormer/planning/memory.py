"""The memory of one process in a training run with a given layout, in closed form.

`least_memory` is what any implementation needs; a run is refused by it alone. The planner uses
`expected_memory`, which is what this implementation takes on a GPU, run as the recipes have it:
`train.dtype = bfloat16`, `train.compile = true`, AdamW in float32."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..config import ModelConfig
from ..layer_config import GLUS, NORMS, LayerConfig
from ..model.language_model import LanguageModel
from ..ops.loss import CUDA_SLICE_BYTES
from .mesh_sizes import MeshSizes

GATHERED_BYTES = 2**27  # of several blocks' weights at once, at most
# cuBLAS's workspaces on an H100: 32 MiB for the forward pass's thread and for the backward pass's
WORKSPACE_BYTES = 2**26

# Assumed, not measured.
CONTEXT_BYTES = 2**30  # CUDA's context and the kernels
GROUP_BYTES = 2**28  # buffers of NCCL, for every group of processes that a rank is in


@dataclass(frozen=True, kw_only=True)
class Layout(MeshSizes):
    """How one step is spread: the mesh, its microbatches, and whether blocks are computed again."""

    accumulate: int = 1
    recompute: bool = False

    @property
    def mesh(self) -> MeshSizes:
        """The mesh alone."""
        return MeshSizes(**self.sizes)


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most, at the moment when it needs most.

    gradients: few where that moment lies before the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    state: int
    buffers: int  # gathered weights, logits, gradients on their way, cuBLAS's own
    reserve: int  # outside of PyTorch's allocator

    @property
    def allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        return sum(vars(self).values())


# Weights, exactly.


@dataclass(frozen=True)
class ParameterShapes:
    """A model's parameters by shape: what a block holds, how tensor parallelism cuts it, and how
    often it is there."""

    config: ModelConfig
    flops_per_token: float
    # (shape, dimension that is cut) -> how many
    parameters: dict[tuple[tuple[int, ...], int | None], int]
    block: int  # numbers in the largest block
    blocks: int  # in all blocks

    def share(self, layout: Layout, rank: int = 0) -> tuple[int, int]:
        """(numbers, tensors) that shard rank `rank` of shard x context holds; the first holds the
        most."""
        return _share(
            tuple(self.parameters.items()), layout.tensor, layout.shard * layout.context, rank
        )


@cache
def _share(
    parameters: tuple[tuple[tuple[tuple[int, ...], int | None], int], ...],
    tensor: int,
    ranks: int,
    rank: int,
) -> tuple[int, int]:
    numbers = tensors = 0
    for (shape, cut), count in parameters:
        mine = [size // tensor if at == cut else size for at, size in enumerate(shape)]
        # FSDP cuts rows like torch.chunk: the last ranks may have fewer, or none
        rows = -(-mine[0] // ranks)
        mine[0] = max(0, min(rows, mine[0] - rank * rows))
        numbers, tensors = numbers + count * math.prod(mine), tensors + count
    return numbers, tensors


def parameter_shapes(config: ModelConfig, seq_len: int) -> ParameterShapes:
    """Count the parameters of a model that takes no memory, in which one block of each kind stands
    for all alike."""
    kinds = block_kinds(config)
    with torch.device("meta"):
        model = LanguageModel(one_of_each(config, [*kinds]))
        flops = model.flops_per_token(seq_len)
        for kind, count in kinds.items():
            longer = LanguageModel(one_of_each(config, [*kinds, kind]))
            flops += (count - 1) * (
                longer.flops_per_token(seq_len) - model.flops_per_token(seq_len)
            )
    blocks, counts = model.blocks(), [*kinds.values()]
    parameters: Counter[tuple[tuple[int, ...], int | None]] = Counter()
    for name, p in model.named_parameters():
        where, _, leaf = name.rpartition(".")
        if name.startswith("layers."):
            _, number, part, *path = where.split(".")
            shards = getattr(blocks[int(number)], part).SHARDS if part in ("mixer", "glu") else {}
            how, count = shards[".".join(path)] if shards else "", counts[int(number)]
        else:
            how, count = "vocabulary" if name.startswith(("embed_tokens", "lm_head")) else "", 1
        rows = None if leaf == "bias" else 1
        cut = {"columns": 0, "heads": 0, "norm": 0, "vocabulary": 0, "rows": rows}.get(how)
        parameters[tuple(p.shape), cut] += count
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    whole = sum(size * count for size, count in zip(sizes, counts, strict=True))
    return ParameterShapes(config, flops, dict(parameters), max(sizes), whole)


def block_kinds(config: ModelConfig) -> Counter[LayerConfig]:
    """How many blocks there are of each kind. Blocks differ in their parameters only by what their
    layers are."""
    return Counter(config.layers)


def one_of_each(config: ModelConfig, kinds: Sequence[LayerConfig]) -> ModelConfig:
    """The model with one block of each of these kinds, in this order, and otherwise as it is."""
    types = None if config.layer_types is None else [kind.type for kind in kinds]
    linear = any(kind.linear for kind in kinds)  # then position_layers counts those alone
    turned = [n for n, kind in enumerate(kinds) if kind.position != "none"]
    return config.replace(
        num_hidden_layers=len(kinds),
        layer_types=types,
        position_layers=tuple(n for n in turned if kinds[n].linear or not linear),
    )


# Memory.


def saved_bytes(
    config: ModelConfig, layer: LayerConfig, tensor: int = 1, *, one_op: bool = False
) -> float:
    """Bytes that a compiled block keeps of each token for the backward pass, under bf16 autocast.

    Every tensor is bfloat16 except the residual stream, which is float32. A tensor rank keeps its
    own heads and columns, and between the products its own part of the tokens. It keeps the input
    of each projection whole, because it gathers that input. The masks of windows are not counted.
    A convolution keeps what it read, beside what it gave.
    one_op: the mixer is `ops.gla.gated_linear_attention`, as it is on one GPU and under FSDP in
    layers without positions, `qk_norm`, `head_norm` or a token's own decay."""
    d, inner, f = config.hidden_size, layer.inner_size, config.intermediate_size
    keys = layer.num_key_value_heads * layer.head_dim
    rank = layer.gate_rank or 0
    whole = 2 * (2 * d) + 2 * rank  # what the mixer's and the GLU's projections read
    # the block's input in float32, the mixer's output: their sum is computed again
    stream = 4 * d + 2 * d
    # projected q, k, v, u; what the last projection reads; what a convolution reads
    mixer = 2 * keys * layer.parts + 2 * inner + 2 * layer.convolved
    if layer.linear:
        # q and k through the activation and the position, what the norm reads
        mixer += 2 * inner * (2 * (layer.key_dim // layer.head_dim) + 1)
        apart = tensor < layer.num_attention_heads and not config.head_norm
        if layer.parts == 4 and not one_op and apart:
            mixer += 2 * inner  # the gate, apart from q, k and v; of one head it is not copied
        if tensor > 1:  # ranks exchange the norm's sums: what comes of them is not computed again
            wider = 2 * NORMS[config.norm]  # with gains it is kept in float32
            mixer += (2 * layer.gate + wider) * inner
    else:
        # q and k, where they are not just parts of the projection; the softmax's sums
        copied = (layer.position, layer.activation) != ("none", "none")
        wider = layer.key_dim // layer.head_dim
        mixer += 4 * layer.num_attention_heads
        if layer.group == 1:
            mixer += 2 * (inner + keys) * wider * copied
        else:
            # keys and values repeated; with copied queries nothing is kept of the projection
            mixer += 4 * inner + (2 * inner - 2 * keys * layer.parts) * copied
        if layer.gate:
            # what is gated; the gates of a group are put together in a copy
            mixer += 2 * inner * (2 if layer.group > 1 and not rank else 1)
    if rank:
        mixer += 2 * inner
    # before and after GELU; or both branches and their product
    glu = (GLUS[config.glu] + 1) * 2 * f
    return whole + (stream + mixer + glu) / tensor


def gathered_at_once(sizes: Sequence[int], kinds: Sequence[object]) -> list[range]:
    """Group neighbouring blocks, by number, whose weights are gathered at once.

    The blocks of a group are of one kind, and several have at most `GATHERED_BYTES` together. They
    are grouped because each gathering costs the host about a millisecond (`benchmarks/host.py`),
    and a GPU computes a small block in less.
    sizes: of each block's gathered weights, in bytes.
    """
    found: list[range] = []
    for n, size in enumerate(sizes):
        before = found[-1] if found else range(0)
        if (
            before
            and kinds[before[0]] == kinds[n]
            and sum(sizes[m] for m in before) + size <= GATHERED_BYTES
        ):
            found[-1] = range(before[0], n + 1)
        else:
            found.append(range(n, n + 1))
    return found


def gather_groups(shapes: ParameterShapes, tensor: int) -> tuple[list[int], list[range]]:
    """(bytes of one gathered weight of each block, the groups of blocks that are gathered at once),
    as `sharding.shard` has FSDP do it. Every block counts as the largest."""
    config = shapes.config
    float32 = config.norm == "layernorm"
    sizes = [4 if float32 or layer.position_parameters else 2 for layer in config.layers]
    return sizes, gathered_at_once([size * shapes.block // tensor for size in sizes], sizes)


@dataclass(frozen=True)
class LeastMemory:
    """Bytes that one process needs in any case; activations: those of them that are activations."""

    total: int
    activations: int


def least_memory(
    config: ModelConfig,
    layout: Layout,
    tokens: int,
    *,
    trained: int,
    itemsize: int,
    copied: bool,
    loaded: bool,
) -> LeastMemory:
    """What a run needs at least.

    It counts float32 weights, and for trained numbers also the gradient and AdamW's two moments. Of
    the activations it counts only those that every implementation needs: what the projections read
    and wrote.
    tokens: the tokens of a microbatch that one data rank holds at a time, over its context and
        tensor ranks together. trained: how many numbers are trained, all weights or those of
        adapters. itemsize: bytes of an activation. copied: a checkpoint copies weights and moments.
        loaded: the weights are in memory already."""
    weights = config.parameter_count()
    rest = 2 * config.intermediate_size + 2 * config.hidden_size
    each = [
        2 * layer.inner_size + 2 * layer.num_key_value_heads * layer.head_dim + rest
        for layer in config.layers
    ]
    floats = max(each) if layout.recompute else sum(each)
    activations = tokens * floats * itemsize // (layout.context * layout.tensor)
    copies = 4 * weights + 8 * trained if copied else 0
    held = (0 if loaded else 4 * weights) + 12 * trained + copies
    return LeastMemory(held // (layout.world // layout.replicate) + activations, activations)


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a rank keeps of the tokens of one microbatch."""

    stream: float  # a residual stream: a block's input, or the gradient of its output
    blocks: list[float]  # what each block keeps for its backward pass
    held: float  # what all blocks keep between the passes
    inside: float  # gradients inside one block's backward pass
    normed: int  # what the head reads
    logits: float  # a slice of them
    states_at_loss: int
    states_in_backward: int


def kept_bytes(config: ModelConfig, layout: Layout, rows: int, seq_len: int) -> KeptBytes:
    """What one rank keeps of `rows` rows of `seq_len` tokens each, arguments of
    `expected_memory`."""
    d, tensor, again = config.hidden_size, layout.tensor, layout.recompute
    tokens = rows * seq_len // layout.context
    names = (config.norm, config.activation)
    plain = tensor * layout.context == 1 and names == ("srmsnorm", "swish")
    plain &= not (config.qk_norm or config.head_norm)
    saved = {
        layer: tokens
        * saved_bytes(
            config,
            layer,
            tensor,
            one_op=plain and (layer.position, layer.set_by_token) == ("none", 0),
        )
        for layer in {*config.layers}
    }
    blocks = [saved[layer] for layer in config.layers]
    stream = tokens * 4 * d / tensor
    # The last state of every block lives until the loss is computed. Under `context` the state with
    # which a slice of the row begins is kept as well, because the backward pass reads it.
    # Keys and values without a window are not kept beyond their block.
    each = [
        rows * layer.state_bytes(seq_len, itemsize=2) // tensor if layer.bounded else 0
        for layer in config.layers
    ]
    begun = sum(each) if layout.context > 1 and not again else 0
    return KeptBytes(
        stream=stream,
        blocks=blocks,
        held=config.num_hidden_layers * stream if again else sum(blocks),
        inside=tokens * (6 * config.intermediate_size / tensor + 2 * d) + stream,
        normed=2 * tokens * d,
        logits=min(CUDA_SLICE_BYTES, 2 * tokens * config.vocab_size / tensor),
        states_at_loss=sum(each) + begun,
        states_in_backward=max(each) + begun,
    )


def expected_memory(shapes: ParameterShapes, layout: Layout, rows: int, seq_len: int) -> Memory:
    """The memory of the GPU that needs most.

    rows: those of one microbatch on one data rank. seq_len: the tokens of a row on all context
    ranks together."""
    numbers, tensors = shapes.share(layout)
    moments = _moments(shapes, layout, kept_bytes(shapes.config, layout, rows, seq_len))
    gradients, activations, state, buffers = map(int, max(moments.values(), key=sum))
    ranks = layout.shard * layout.context
    groups = sum(size > 1 for size in (layout.replicate, ranks, layout.context, layout.tensor))
    return Memory(
        weights=4 * numbers,
        gradients=gradients,
        optimizer=8 * numbers + 4 * tensors,
        activations=activations,
        state=state,
        buffers=buffers + WORKSPACE_BYTES,
        reserve=CONTEXT_BYTES + groups * GROUP_BYTES,
    )


def _moments(
    shapes: ParameterShapes, layout: Layout, kept: KeptBytes
) -> dict[str, tuple[float, ...]]:
    """Bytes of (gradients, activations, states, buffers) at each moment of a step that may need the
    most memory."""
    config, tensor, again = shapes.config, layout.tensor, layout.recompute
    alone, ranks = layout.world == 1, layout.shard * layout.context
    stream, tied = kept.stream, config.tie_word_embeddings
    # `gathered_bytes` is how many bytes one weight of each block takes while it is gathered. `cast`
    # is how many bytes autocast's bfloat16 copy of it takes, where there is one; the copy is kept
    # because the backward pass reads it. `embedding` counts the weights of the embedding.
    block, embedding = shapes.block / tensor, config.vocab_size * config.hidden_size / tensor
    gathered_bytes, groups = gather_groups(shapes, tensor)
    cast = [2 if alone or size == 4 else 0 for size in gathered_bytes]
    if alone:
        gathered_bytes = [0] * len(gathered_bytes)
        groups = [range(n, n + 1) for n in range(len(gathered_bytes))]
    at_once = [len(group) * gathered_bytes[group[0]] for group in groups]
    # after the forward pass only the last group stays gathered
    end, earlier = groups[-1], at_once[-2] if len(groups) > 1 else 0
    kept_casts, before = (0, 0) if again else (sum(cast), sum(cast[: end[0]]))
    # Blocks' gradients on their way to their sum, while those of the blocks before them are made.
    moving = [0 if alone else 4 * len(group) for group in groups]
    root = 0.0 if alone else 4 * embedding * (1 if tied else 2)
    # every gradient at the end of the backward pass; the head's alone
    late, own = 4 * shapes.share(layout)[0], 4 * embedding
    first = late if layout.accumulate > 1 else 0
    summed = max(first, moving[-1] * block / ranks)  # sharded gradients after the last group
    own_root = 0 if alone else own + root  # one GPU's are among all gradients
    # the last block's activations, while all others are still kept
    backward = kept.held + kept.inside + (kept.blocks[-1] - stream if again else 0)
    done = len(end) * stream if again else sum(kept.blocks[n] for n in end)
    return {
        "head": (
            first,
            # the head's input and its gradient, and under `tensor` a reordered copy
            kept.held + stream + kept.normed * (3 if tensor > 1 else 2),
            kept.states_at_loss,
            (2 * at_once[-1] + kept_casts) * block + root + kept.logits + 2 * embedding + own,
        ),
        "last block": (
            first,
            backward,
            kept.states_in_backward,
            (at_once[-1] + earlier + (kept_casts or cast[-1])) * block + root + own,
        ),
        "sum of the last": (
            summed,
            kept.held + stream - done,
            kept.states_in_backward,
            (before + at_once[-1] + moving[-1] + earlier) * block + root + own,
        ),
        "blocks before": (
            summed,
            backward - done,
            kept.states_in_backward,
            (before + moving[-1] + 2 * earlier + gathered_bytes[max(0, end[0] - 1)]) * block
            + root
            + own,
        ),
        "first block": (
            late,
            kept.blocks[0] + kept.inside,
            kept.states_in_backward,
            (sum(moving[1:2]) + 2 * at_once[0]) * block + own_root,
        ),
        # The gradients of the head and of the embedding, and where they are one matrix their sum.
        # What `late` counts of them already is subtracted.
        "embedding": (late, stream, 0, embedding * (8 * tied if alone else 16) - root / ranks),
    }
