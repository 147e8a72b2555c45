"""The sizes of a mesh of processes, and which of them fit a model and a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import ModelConfig
from ..layer_config import NORMS


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """How the processes of a run share the work; the product of the four is their number."""

    replicate: int = 1  # copies of the sharded model, each reading other rows
    shard: int = 1  # processes that share one copy, each reading other rows
    context: int = 1  # processes that share the tokens of a row
    tensor: int = 1  # processes that share heads, columns and vocabulary entries

    @property
    def sizes(self) -> dict[str, int]:
        """The four by their names, in this order."""
        return {name: getattr(self, name) for name in ("replicate", "shard", "context", "tensor")}

    @property
    def world(self) -> int:
        """The number of processes."""
        return math.prod(self.sizes.values())

    @property
    def data_ranks(self) -> int:
        """How many share the rows of a step."""
        return self.replicate * self.shard


@dataclass(frozen=True, kw_only=True)
class Parallel(MeshSizes):
    """The sizes as a recipe says them, where shard = 0 stands for all processes left over."""

    shard: int = 0


def resolve(parallel: MeshSizes, world: int) -> MeshSizes:
    """The sizes for so many processes, shard = 0 taking what is left.

    Raises ValueError naming the factor that does not divide them, and what would fit.
    """
    left = world
    for name in ("tensor", "context", "replicate"):
        size = getattr(parallel, name)
        if world == 1 < size:
            raise ValueError(
                f"parallel.{name} = {size} needs that many processes, and there is one; "
                "launch/torchrun.sh starts several"
            )
        if left % size:
            there = (
                f"what is left of {world} processes, {left}"
                if left < world
                else f"the {world} processes"
            )
            raise ValueError(
                f"parallel.{name} = {size} does not divide {there}; {divisors_text(left)} would"
            )
        left //= size
    if parallel.shard not in (0, left):
        raise ValueError(
            f"parallel.shard = {parallel.shard}, but of {world} processes {left} are left for it; "
            f"write {left}, or 0 for all"
        )
    return MeshSizes(**parallel.sizes | {"shard": left})


def check_mesh(
    config: ModelConfig, parallel: MeshSizes, world: int, *, seq_len: int, rows: int
) -> None:
    """Refuse a mesh that the model or the batch does not fit. rows: of one microbatch over all
    data ranks.

    Raises ValueError naming the factor, what it does not divide, and what would fit.
    """
    mesh = resolve(parallel, world)
    context, tensor = mesh.context, mesh.tensor
    parts = divided_by_tensor(config)
    if tensor > 1 and (refusal := tensor_refusal(config)):
        raise ValueError(f"parallel.tensor = {tensor}: {refusal}")
    for name, size in parts.items():
        if size % tensor:
            fits = divisors_text(math.gcd(*parts.values()))
            raise ValueError(
                f"parallel.tensor = {tensor} does not divide model.{name} = {size}; {fits} would "
                "fit the model"
            )
    if context > 1 and decays_by_token(config):
        raise ValueError(
            f"parallel.context = {context} needs a decay that is the same for all tokens; with "
            f"model.decay = {config.decay} it must be 1"
        )
    if seq_len % (context * tensor):
        most = divisors_text(seq_len // tensor) if seq_len % tensor == 0 else "none"
        raise ValueError(
            f"parallel.context x tensor = {context * tensor} does not divide train.seq_len = "
            f"{seq_len}; with tensor = "
            f"{tensor}, context may be {most}"
        )
    if rows % mesh.data_ranks:
        raise ValueError(
            f"parallel.replicate x shard = {mesh.data_ranks} does not divide the {rows} rows of "
            "a microbatch "
            f"(train.batch_tokens / seq_len / accumulate); {divisors_text(rows)} would"
        )


def decays_by_token(config: ModelConfig) -> bool:
    """Whether tokens set the decay of any layer."""
    return any(layer.set_by_token for layer in config.layers)


def tensor_refusal(config: ModelConfig) -> str | None:
    """Why tensor ranks cannot share this model, or None."""
    if config.convolution == "input":
        return "model.convolution = input is not cut among tensor ranks; heads is"
    if config.head_norm and NORMS[config.norm]:
        return f"model.head_norm with norm = {config.norm} is not cut among tensor ranks"
    return None


def divided_by_tensor(config: ModelConfig) -> dict[str, int]:
    """What `parallel.tensor` must divide, by the names of the model's settings."""
    names = ("num_attention_heads", "intermediate_size", "vocab_size")
    parts = {name: getattr(config, name) for name in names}
    for layer in config.layers:
        if not layer.linear and config.softmax is not None:
            parts["softmax.num_attention_heads"] = layer.num_attention_heads
            parts["softmax.num_key_value_heads"] = layer.num_key_value_heads
    return parts


def divisors_text(number: int) -> str:
    """The divisors of `number` up to 1,024, as text."""
    divisors = [str(n) for n in range(1, min(number, 1024) + 1) if number % n == 0]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]] if len(divisors) > 1 else divisors)
