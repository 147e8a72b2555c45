"""A run in one file: TOML, dotted overrides, and an error for every key that is not known."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import SIZES, TRANSFORMER, ModelConfig
from ..data.chat import FORMATS
from ..layer_config import SoftmaxSettings, nearest
from ..planning.mesh_sizes import Parallel
from .tables import build, flatten, set_value, split_overrides, toml_value

# in the model's words
KINDS: dict[str, dict[str, Any]] = {"published": {}, "transformer": TRANSFORMER}
OPTIMIZERS = ("adamw", "adam", "muon")
# What may change when a run goes on. Nothing of it decides what a step learns but train.steps,
# which decides the length of the schedule (`optim.learning_rate`): a run may be made longer.
MOVABLE = re.compile(
    r"(parallel|checkpoint|eval)\..*"
    r"|train\.(steps|accumulate|recompute|segment|compile|graph|device|patience|tensorboard)"
)
SCHEDULES = ("cosine", "constant", "wsd")
DTYPES = ("float32", "bfloat16")
SCALINGS = ("", "tensorwise", "rowwise")


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str = ""  # a prepared folder; made from `text` on the first run if it is not there
    text: tuple[str, ...] = ()
    text_field: str = "text"  # of jsonl and parquet files
    # or how the records of `text` hold conversations: messages, prompt, alpaca
    format: str = "text"
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
    accumulate: int = 1  # microbatches a step
    dtype: str = "float32"  # of the matrix products; weights and optimizer stay in float32
    # of the blocks' products, by torchao: how they are scaled, tensorwise or rowwise
    float8: str = ""
    recompute: bool = False  # activations in the backward pass instead of storing them
    # tokens of a row held at a time, the others read twice: rows of any length; 0: whole rows
    segment: int = 0
    compile: bool = False  # the blocks, by torch.compile
    # a microbatch's passes as one CUDA graph: for models too small to keep a GPU waiting
    graph: bool = False
    # at the borders of documents; by default for conversations alone
    reset_state: bool | None = None
    patience: int = 3  # refused steps in a row after which the run goes back to its last checkpoint
    # refuse a step whose loss is so many standard deviations above the last ones; 0: none for that
    spike: float = 0.0
    device: str = "auto"
    seed: int = 0
    tensorboard: bool = False


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
    """Adapters to train instead of the weights: W + alpha / rank * B A, with A [rank, in] and B
    [out, rank]."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what A reads
    # ends of the names of linear maps in the blocks, e.g. qkvu_proj; by default all
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run depends on. `model` holds `size`, `kind` and any field of ModelConfig, or
    `from` alone."""

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
        """Read a TOML file and apply `key=value` overrides, e.g. `optim.lr=1e-3`; `run` defaults to
        the file's name.

        Files and folders that the TOML file names are looked for in the working directory, then
        beside the TOML file. Raises ValueError or OSError with one line that names the key, the
        value and what would fit."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{path}: not TOML ({error})") from error
        _look_beside(path.parent, values)
        values.setdefault("run", path.stem)
        named = split_overrides(overrides)
        for key, text in named.items():
            set_value(values, key, _parse(key, text))
        # a size or kind asked for is that one, whatever model the file describes
        replaced: set[str] = set()
        if "model.size" in named:
            replaced |= {*next(iter(SIZES.values())), "head_dim"}
        if "model.kind" in named:
            replaced |= set(TRANSFORMER)
        if replaced:
            dropped = {k for k in replaced if f"model.{k}" not in named}
            values["model"] = {k: v for k, v in values["model"].items() if k not in dropped}
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From nested tables, every key and type checked."""
        recipe: Recipe = build(cls, values, "")
        if not re.fullmatch(r"[\w][\w.-]*", recipe.run):
            raise ValueError(
                f"run = {recipe.run!r}, but must be a name of letters, digits, '.', '_' and '-'"
            )
        recipe._check_model()
        recipe._check_choices()
        recipe._check_ranges()
        recipe._check_combinations()
        data = recipe.data
        # they are made already: what else the table says of making them is true of no data
        if not data.text:
            data = Data(path=data.path, format=data.format, chat_template=data.chat_template)
        return dataclasses.replace(recipe, data=data)

    def _check_model(self) -> None:
        fields = ["from", "size", "kind", *(f.name for f in dataclasses.fields(ModelConfig))]
        for key in self.model:
            if key not in fields:
                raise ValueError(f"unknown key model.{key}{nearest(key, fields, 'model.')}")
        if "from" in self.model:
            if not isinstance(self.model["from"], str) or not self.model["from"]:
                raise ValueError(
                    f"model.from = {self.model['from']!r}, but must be a model's folder"
                )
            if more := [f"model.{key}" for key in self.model if key != "from"]:
                raise ValueError(f"model.from says what the model is; remove {', '.join(more)}")
        elif self.lora is not None:
            raise ValueError("lora needs model.from, the folder of the model to adapt")

    def _check_choices(self) -> None:
        for key, word, words in (
            ("train.dtype", self.train.dtype, DTYPES),
            ("optim.schedule", self.optim.schedule, SCHEDULES),
            ("train.float8", self.train.float8, SCALINGS),
            ("optim.name", self.optim.name, OPTIMIZERS),
            ("data.format", self.data.format, ("text", *FORMATS)),
            ("model.size", self.model.get("size", "10m"), tuple(SIZES)),
            ("model.kind", self.model.get("kind", "published"), tuple(KINDS)),
        ):
            _check_choice(key, word, words)

    def _check_ranges(self) -> None:
        train, optim, lora = self.train, self.optim, self.lora or Lora()
        for key, number in (
            ("train.steps", train.steps),
            ("train.seq_len", train.seq_len),
            ("train.accumulate", train.accumulate),
            ("train.batch_tokens", train.batch_tokens),
            ("checkpoint.keep", self.checkpoint.keep),
            ("train.patience", train.patience),
            ("optim.lr", optim.lr),
            ("eval.tokens", self.eval.tokens),
            ("lora.rank", lora.rank),
            ("lora.alpha", lora.alpha),
            ("parallel.replicate", self.parallel.replicate),
            ("parallel.context", self.parallel.context),
            ("parallel.tensor", self.parallel.tensor),
        ):
            if number <= 0:
                raise ValueError(f"{key} = {number}, but must be positive")
        for key, number, least, most in (
            ("optim.min_lr", optim.min_lr, 0, 1),
            ("optim.decay_share", optim.decay_share, 0, 1),
            ("train.seed", train.seed, 0, 2**31 - 1),
            ("data.seed", self.data.seed, 0, 2**63 - 1),
            ("optim.eps", optim.eps, 0, 1),
            ("data.vocab_size", self.data.vocab_size, 0, 2**24),
            ("lora.dropout", lora.dropout, 0, 1),
        ):
            if not least <= number <= most:
                raise ValueError(f"{key} = {number}, but must be from {least} to {most}")
        for key, number in (
            ("checkpoint.every", self.checkpoint.every),
            ("eval.every", self.eval.every),
            ("optim.clip", optim.clip),
            ("optim.warmup_steps", optim.warmup_steps),
            ("optim.weight_decay", optim.weight_decay),
            ("parallel.shard", self.parallel.shard),
            ("train.segment", train.segment),
            ("train.spike", train.spike),
            ("checkpoint.keep_every", self.checkpoint.keep_every),
        ):
            if number < 0:
                raise ValueError(f"{key} = {number}, but must be 0 or more")

    def _check_combinations(self) -> None:
        train, optim, lora = self.train, self.optim, self.lora or Lora()
        if train.batch_tokens % (train.seq_len * train.accumulate):
            raise ValueError(
                f"train.batch_tokens = {train.batch_tokens} is not a multiple of train.seq_len x "
                f"train.accumulate = {train.seq_len * train.accumulate}"
            )
        if train.float8 and (
            train.dtype != "bfloat16" or self.parallel.tensor > 1 or self.lora is not None
        ):
            raise ValueError(
                "train.float8 needs train.dtype = bfloat16, parallel.tensor = 1 and no lora"
            )
        if train.segment and lora.dropout:
            raise ValueError(
                "train.segment reads rows twice, and lora.dropout would drop out something else; "
                "set it to 0"
            )
        if train.graph and train.recompute and lora.dropout:
            raise ValueError(
                "train.graph cannot recompute what lora.dropout dropped out; set one of the three "
                "to 0 or false"
            )
        if optim.bits not in ((32,) if optim.name == "muon" else (32, 8)):
            raise ValueError(
                f"optim.bits = {optim.bits}, but must be 32, or 8 with optim.name = adamw or adam"
            )
        if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
            raise ValueError(
                f"optim.betas = {list(optim.betas)}, but must be two numbers from 0 to below 1"
            )
        if not self.data.path:
            raise ValueError(
                "data.path is missing: the prepared folder, or where to put what is made from "
                "data.text"
            )

    @property
    def base(self) -> Path | None:
        """The folder of the model to start from."""
        return Path(self.model["from"]) if "from" in self.model else None

    @property
    def rows(self) -> int:
        """Sequences in one microbatch."""
        return self.train.batch_tokens // (self.train.seq_len * self.train.accumulate)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's configuration; its vocabulary is the data's where the recipe names none."""
        config = _named(self.model.get("size", "10m"), {"vocab_size": vocab_size} | self.model)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"model.vocab_size = {config.vocab_size}, but the tokenizer of {self.data.path} "
                f"has {vocab_size} words"
            )
        return config

    def to_toml(self) -> str:
        """The resolved recipe: a file that `load` reads back to an equal one.

        It does not say how the data were made where the recipe does not know: their data.json does.
        """
        values = dataclasses.asdict(self)
        if not self.data.text:
            # which `check_content` compares, unless they are the defaults
            known = {key: getattr(self.data, key) for key in ("path", "format", "chat_template")}
            values["data"] = {k: v for k, v in known.items() if v != getattr(Data, k)}
        lines = [f"run = {toml_value(values.pop('run'))}"]
        for table, content in values.items():
            if content is not None:
                lines += ["", f"[{table}]"]
                lines += [f"{key} = {toml_value(v)}" for key, v in content.items() if v is not None]
        return "\n".join(lines) + "\n"

    def difference(self, other: Recipe) -> str | None:
        """The first setting in which two recipes differ, as text; None where they are equal but for
        MOVABLE ones."""
        mine, theirs = flatten(dataclasses.asdict(self)), flatten(dataclasses.asdict(other))
        for key in [*mine, *theirs]:
            if not MOVABLE.fullmatch(key) and mine.get(key) != theirs.get(key):
                return (
                    f"{key} was {json.dumps(mine.get(key))} and is now "
                    f"{json.dumps(theirs.get(key))}"
                )
        return None


def _parse(key: str, text: str) -> Any:
    """What an override says: a TOML value, or else the text itself. `run=second` and
    `run=2024_05_01` need no quotes.

    A setting that is text, or a list of texts, keeps what was written, however much it looks like a
    number or a date."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = {"True": True, "False": False, "null": None, "None": None}.get(text, text)
    wanted = _type(key)
    if (wanted is str and not isinstance(value, str)) or (
        wanted == tuple[str, ...] and not isinstance(value, (str, list))
    ):
        return text
    return value


def _type(key: str) -> Any:
    """The type of a setting, e.g. int of train.steps; None where there is no such setting."""
    table, _, name = key.partition(".")
    if table == "model":
        own, _, setting = name.partition(".")
        if own == "softmax":
            return typing.get_type_hints(SoftmaxSettings).get(setting)
        # the others are size, kind and from
        return typing.get_type_hints(ModelConfig).get(name, str)
    kinds = {"train": Train, "data": Data, "optim": Optim, "lora": Lora}
    return typing.get_type_hints(kinds.get(table, Recipe)).get(name or table)


def _look_beside(folder: Path, values: dict[str, Any]) -> None:
    """Complete, in place, what a recipe in `folder` calls by names that are there, and not in the
    working directory."""

    def found(name: object) -> object:
        if isinstance(name, list):
            return [found(each) for each in name]
        if not isinstance(name, str) or os.path.exists(name) or not os.path.exists(folder / name):
            return name
        path, here = (folder / name).resolve(), Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)

    named = ("data.path", "data.text", "data.tokenizer", "data.chat_template", "model.from")
    for table, key in (name.split(".") for name in named):
        settings = values.get(table)
        if isinstance(settings, dict) and settings.get(key):
            settings[key] = found(settings[key])


def _check_choice(key: str, word: object, words: Sequence[str]) -> None:
    if word not in words:
        choices = ", ".join(word or "''" for word in words)
        raise ValueError(f"{key} = {word!r}, but must be one of {choices}{nearest(word, words)}")


def _named(size: str, model: dict[str, Any]) -> ModelConfig:
    """The configuration of a named size with the fields that a recipe's table `model` names."""
    kind = model.get("kind", "published")
    _check_choice("model.kind", kind, tuple(KINDS))
    return ModelConfig.named(
        size, **KINDS[kind] | {k: v for k, v in model.items() if k not in ("size", "kind")}
    )


def model_overrides(size: str, overrides: Sequence[str]) -> ModelConfig:
    """A named size with `model.key=value` overrides, as a recipe takes them. Raises ValueError for
    any other."""
    fields: dict[str, Any] = {}
    for key, text in split_overrides(overrides, "model.hidden_size=4096").items():
        table, _, name = key.partition(".")
        if table != "model" or not name:
            raise ValueError(
                f"{f'{key}={text}'!r} is no field of the model; write e.g. model.hidden_size=4096"
            )
        set_value(fields, name, _parse(key, text))
    return _named(size.lower(), fields)
