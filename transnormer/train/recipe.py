"""A run in one file: TOML, dotted overrides, and an error for every key that is not known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import SIZES, ModelConfig, nearest
from ..data.chat import FORMATS

OPTIMIZERS = ("adamw", "adam", "muon")
# what is learned does not depend on these
MOVABLE = re.compile(r"(parallel|checkpoint)\..*|train\.(accumulate|recompute|compile|graph|device)")
SCHEDULES = ("cosine", "constant", "wsd")
DTYPES = ("float32", "bfloat16")
SCALINGS = ("", "tensorwise", "rowwise")


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str = ""  # a prepared folder; made from `text` on the first run if it is not there
    text: tuple[str, ...] = ()
    text_field: str = "text"  # of jsonl and parquet files
    format: str = "text"  # or how the records of `text` hold conversations: messages, prompt, alpaca
    chat_template: str = ""  # a file with theirs; by default the model's own, or else ours
    vocab_size: int = 0  # of the tokenizer trained on `text`
    tokenizer: str = ""  # or a tokenizer to take instead; by default that of model.from
    split: float = 0.01  # share of the documents held out for validation
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 1_000
    batch_tokens: int = 65_536  # a step
    seq_len: int = 2_048
    accumulate: int = 1  # micro-batches a step
    dtype: str = "float32"  # of the matrix products; weights and optimizer stay in float32
    float8: str = ""  # of the blocks' products, by torchao: how they are scaled, tensorwise or rowwise
    recompute: bool = False  # activations in the backward pass instead of storing them
    segment: int = 0  # tokens of a row held at a time, the others read twice: rows of any length; 0: whole rows
    compile: bool = False  # the blocks, by torch.compile
    graph: bool = False  # a micro-batch's passes as one CUDA graph: for models too small to keep a GPU waiting
    reset_state: bool | None = None  # at the borders of documents; by default for conversations alone
    patience: int = 3  # refused steps in a row after which the run goes back to its last checkpoint
    spike: float = 0.0  # refuse a step whose loss is so many standard deviations above the last ones; 0: none for that
    device: str = "auto"
    seed: int = 0
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes of torchrun share the work; the product of the four is their number."""

    replicate: int = 1  # copies of the sharded model, each reading other rows
    shard: int = 0  # processes that share one copy, each reading other rows; 0: all that are left over
    context: int = 1  # processes that share the tokens of a row
    tensor: int = 1  # processes that share heads, columns and words


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: str = "adamw"  # muon: for the blocks' matrices, AdamW for all else
    bits: int = 32  # of its memory; 8: by bitsandbytes, of adamw and adam on one process
    lr: float = 3e-4
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # of the gradient norm; 0 for none
    schedule: str = "cosine"  # wsd: warm up, stay, decay
    warmup_steps: int = 100
    decay_share: float = 0.2  # wsd: the last part of the steps, in which the rate falls
    min_lr: float = 0.1  # where the schedule ends, as a share of lr


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every: int = 250  # steps; 0: only at the end
    tokens: int = 262_144  # of the validation split at most


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: int = 250  # optimizer steps; 0: only at the end
    keep: int = 2  # the newest so many
    keep_every: int = 0  # and those of every so many steps; 0: no others


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters to train instead of the weights: W + alpha / rank * B A, with A [rank, in] and B [out, rank]."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what A reads
    targets: tuple[str, ...] = ()  # ends of the names of linear maps in the blocks, e.g. qkvu_proj; by default all


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on. `model` holds `size` and any field of ModelConfig, or `from` alone."""

    run: str
    model: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    lora: Lora | None = None
    optim: Optim = field(default_factory=Optim)
    eval: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a TOML file and apply `key=value` overrides, e.g. `optim.lr=1e-3`; `run` defaults to the file's name.

        Raises ValueError or OSError with one line that names the key, the value and what would fit.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: not TOML ({error})") from error
        values.setdefault("run", path.stem)
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise ValueError(f"{override!r} is not an override; write key=value, e.g. optim.lr=1e-3")
            _set(values, key.strip(), _parse(text.strip()))
        named = {override.partition("=")[0].strip() for override in overrides}
        if "model.size" in named:  # a size asked for is that size, whatever shape the file describes
            shape = [*next(iter(SIZES.values())), "head_dim"]
            values["model"] = {k: v for k, v in values["model"].items() if k not in shape or f"model.{k}" in named}
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From nested tables, every key and type checked."""
        recipe = _build(cls, values, "")
        if not re.fullmatch(r"[\w][\w.-]*", recipe.run):
            raise ValueError(f"run = {recipe.run!r}, but must be a name of letters, digits, '.', '_' and '-'")
        recipe._check()
        return recipe

    def _check(self) -> None:
        train, optim, lora = self.train, self.optim, self.lora or Lora()
        fields = ["from", "size", *(f.name for f in dataclasses.fields(ModelConfig))]
        for key in self.model:
            if key not in fields:
                raise ValueError(f"unknown key model.{key}{nearest(key, fields, 'model.')}")
        if "from" in self.model:
            if not isinstance(self.model["from"], str) or not self.model["from"]:
                raise ValueError(f"model.from = {self.model['from']!r}, but must be a model's folder")
            if more := [f"model.{key}" for key in self.model if key != "from"]:
                raise ValueError(f"model.from says what the model is; remove {', '.join(more)}")
        elif self.lora is not None:
            raise ValueError("lora needs model.from, the folder of the model to adapt")
        for key, word, words in (
            ("train.dtype", train.dtype, DTYPES), ("optim.schedule", optim.schedule, SCHEDULES),
            ("train.float8", train.float8, SCALINGS),
            ("optim.name", optim.name, OPTIMIZERS),
            ("data.format", self.data.format, ("text", *FORMATS)),
            ("model.size", self.model.get("size", "10m"), tuple(SIZES)),
        ):  # fmt: skip
            if word not in words:
                choices = ", ".join(word or "''" for word in words)
                raise ValueError(f"{key} = {word!r}, but must be one of {choices}{nearest(word, words)}")
        for key, number in (
            ("train.steps", train.steps), ("train.seq_len", train.seq_len), ("train.accumulate", train.accumulate),
            ("train.batch_tokens", train.batch_tokens), ("checkpoint.keep", self.checkpoint.keep),
            ("train.patience", train.patience),
            ("optim.lr", optim.lr), ("eval.tokens", self.eval.tokens), ("lora.rank", lora.rank),
            ("lora.alpha", lora.alpha), ("parallel.replicate", self.parallel.replicate),
            ("parallel.context", self.parallel.context), ("parallel.tensor", self.parallel.tensor),
        ):  # fmt: skip
            if number <= 0:
                raise ValueError(f"{key} = {number}, but must be positive")
        for key, number, least, most in (
            ("optim.min_lr", optim.min_lr, 0, 1), ("optim.decay_share", optim.decay_share, 0, 1),
            ("train.seed", train.seed, 0, 2**31 - 1), ("data.seed", self.data.seed, 0, 2**63 - 1),
            ("optim.eps", optim.eps, 0, 1), ("data.vocab_size", self.data.vocab_size, 0, 2**24),
            ("lora.dropout", lora.dropout, 0, 1),
        ):  # fmt: skip
            if not least <= number <= most:
                raise ValueError(f"{key} = {number}, but must be from {least} to {most}")
        for key, number in (
            ("checkpoint.every", self.checkpoint.every), ("eval.every", self.eval.every), ("optim.clip", optim.clip),
            ("optim.warmup_steps", optim.warmup_steps), ("optim.weight_decay", optim.weight_decay),
            ("parallel.shard", self.parallel.shard), ("train.segment", train.segment), ("train.spike", train.spike),
            ("checkpoint.keep_every", self.checkpoint.keep_every),
        ):  # fmt: skip
            if number < 0:
                raise ValueError(f"{key} = {number}, but must be 0 or more")
        if train.batch_tokens % (train.seq_len * train.accumulate):
            raise ValueError(
                f"train.batch_tokens = {train.batch_tokens} is not a multiple of train.seq_len x train.accumulate = "
                f"{train.seq_len * train.accumulate}"
            )
        if train.float8 and (train.dtype != "bfloat16" or self.parallel.tensor > 1 or self.lora is not None):
            raise ValueError("train.float8 needs train.dtype = bfloat16, parallel.tensor = 1 and no lora")
        if train.segment and lora.dropout:
            raise ValueError(
                "train.segment reads rows twice, and lora.dropout would drop out something else; set it to 0"
            )
        if train.graph and train.recompute and lora.dropout:
            raise ValueError(
                "train.graph cannot recompute what lora.dropout dropped out; set one of the three to 0 or false"
            )
        if optim.bits not in ((32,) if optim.name == "muon" else (32, 8)):
            raise ValueError(f"optim.bits = {optim.bits}, but must be 32, or 8 with optim.name = adamw or adam")
        if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
            raise ValueError(f"optim.betas = {list(optim.betas)}, but must be two numbers from 0 to below 1")
        if not self.data.path:
            raise ValueError("data.path is missing: the prepared folder, or where to put what is made from data.text")

    @property
    def base(self) -> Path | None:
        """The folder of the model to start from."""
        return Path(self.model["from"]) if "from" in self.model else None

    @property
    def rows(self) -> int:
        """Sequences in one micro-batch."""
        return self.train.batch_tokens // (self.train.seq_len * self.train.accumulate)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's configuration; its vocabulary is the data's where the recipe names none."""
        fields = {key: value for key, value in self.model.items() if key != "size"}
        fields.setdefault("vocab_size", vocab_size)
        if fields["vocab_size"] < vocab_size:
            raise ValueError(
                f"model.vocab_size = {fields['vocab_size']}, but the tokenizer of {self.data.path} has {vocab_size} words"
            )
        return ModelConfig.named(self.model.get("size", "10m"), **fields)

    def to_toml(self) -> str:
        """The resolved recipe: a file that `load` reads back to an equal one."""
        values = dataclasses.asdict(self)
        lines = [f"run = {_toml(values.pop('run'))}"]
        for table, content in values.items():
            if content is None:
                continue
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in content.items() if value is not None]
        return "\n".join(lines) + "\n"

    def difference(self, other: Recipe) -> str | None:
        """The first setting in which two recipes differ, as text; None where they are equal but for MOVABLE ones."""
        mine, theirs = _flat(dataclasses.asdict(self)), _flat(dataclasses.asdict(other))
        for key in [*mine, *theirs]:
            if not MOVABLE.fullmatch(key) and mine.get(key) != theirs.get(key):
                return f"{key} was {json.dumps(mine.get(key))} and is now {json.dumps(theirs.get(key))}"
        return None


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(kind: type, values: object, prefix: str) -> Any:
    """A dataclass from a table, refusing unknown keys and wrong types; ints are taken for floats."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} must be a table of settings, not {values!r}")
    hints = typing.get_type_hints(kind)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}{nearest(key, list(hints), prefix)}")
        wanted = hints[key]
        if isinstance(wanted, types.UnionType):  # of something and None, which is its absence
            wanted = typing.get_args(wanted)[0]
        if dataclasses.is_dataclass(wanted):
            built[key] = _build(typing.cast(type, wanted), value, f"{prefix}{key}.")
            continue
        if wanted is float and type(value) is int:
            value = float(value)
        if wanted is str and type(value) is int:  # run=2024 needs no quotes
            value = str(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{key} = {value}, but must be a finite number")
        if typing.get_origin(wanted) is tuple:
            item = typing.get_args(wanted)[0]
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,) if value != "" else ()
            fits = all(type(part) is item or (item is float and type(part) is int) for part in value)
        else:
            fits = type(value) is (typing.get_origin(wanted) or wanted)
        if not fits:
            word = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
                wanted, "a list or table"
            )
            raise ValueError(f"{prefix}{key} = {value!r}, but must be {word}")
        built[key] = value
    return kind(**built)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {table} is a setting, not a table")
    values[last] = value


def _parse(text: str) -> Any:
    """A TOML value, or else the text itself: `run=second` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return {"True": True, "False": False, "null": None, "None": None}.get(text, text)


def model_overrides(size: str, overrides: Sequence[str]) -> ModelConfig:
    """A named size with `model.key=value` overrides, as a recipe takes them. Raises ValueError for any other."""
    fields: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        table, _, name = key.strip().partition(".")
        if not equals or table != "model" or not name:
            raise ValueError(f"{override!r} is no field of the model; write e.g. model.hidden_size=4096")
        fields[name] = _parse(text.strip())
    return ModelConfig.named(size.lower(), **fields)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}
