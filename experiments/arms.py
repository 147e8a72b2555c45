"""What experiments/tables.toml describes, as runs with complete recipes."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transnormer.config import ModelConfig
from transnormer.layer_config import FULL, LINEAR
from transnormer.train.recipe import Recipe

HERE = Path(__file__).parent
TABLES: dict[str, Any] = tomllib.loads((HERE / "tables.toml").read_text(encoding="utf-8"))
REFERENCE = "published"  # the arm whose parameters all others match
TOLERANCE = 0.005  # in parameters, as a share of the reference's
CONFIRMING_SEED = 11  # the first seed of tables that claim something; those that explore begin at 0


@dataclass(frozen=True)
class Run:
    """One training run of one arm. `name` is what its result and its folder are called."""

    table: str
    arm: str
    seed: int
    size: str
    tokens: int
    optimizer: str
    lr: float
    dataset: str = "text"
    dtype: str = "bfloat16"  # of the training on a GPU; on a CPU it is float32

    @property
    def setting(self) -> str:
        """The beginning of the names of all runs that read as much of the same data with a model of
        this size."""
        dataset = "" if self.dataset == "text" else f"{self.dataset}-"
        return f"{dataset}{self.size}-{self.tokens // 1000}k"

    @property
    def name(self) -> str:
        arm, dtype = (
            self.arm.replace("/", "_"),
            "" if self.dtype == "bfloat16" else f"-{self.dtype}",
        )
        lr = f"{self.lr:g}".replace("+", "")  # 1e+18 is no name of a run
        return f"{self.setting}-{self.optimizer}-{lr}-{arm}-{self.seed}{dtype}"

    @property
    def family(self) -> str:
        return str(TABLES["arms"][self.arm]["family"])


def number(text: str | int) -> int:
    """An amount such as 100M, 2.5G or 32768. Raises ValueError for anything else."""
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    text = str(text)
    return round(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def known(kind: str, name: str) -> dict[str, Any]:
    """An entry of the file. Raises ValueError naming those that there are."""
    if name not in TABLES[kind]:
        raise ValueError(
            f"{name!r} is not among the {kind} of tables.toml; there are {', '.join(TABLES[kind])}"
        )
    return dict(TABLES[kind][name])


def runs(
    table: str,
    size: str | None = None,
    *,
    arms: list[str] | None = None,
    seeds: int | None = None,
    tokens: int | None = None,
    optimizers: list[str] | None = None,
) -> Iterator[Run]:
    """The runs of a table, seed by seed, so that a table that is cut short has whole seeds.

    Without a size they have those of the table or, where it names none, 10m. Raises ValueError for
    a name that the file does not know, or an arm whose family has no learning rate yet."""
    entry = known("tables", table)
    chosen, dataset = arms or entry["arms"], entry.get("dataset", "text")
    lengths = entry["tokens"] if isinstance(entry["tokens"], list) else [entry["tokens"]]
    for arm in chosen:
        known("arms", arm)
    first = 0 if entry.get("exploring") else CONFIRMING_SEED
    for seed, optimizer, of_size, length, arm in itertools.product(
        range(first, first + (seeds or entry["seeds"])),
        optimizers or entry.get("optimizers", ["adamw"]),
        [size] if size else entry.get("sizes", ["10m"]),
        [tokens] if tokens else map(number, lengths),
        chosen,
    ):
        family = TABLES["arms"][arm]["family"]
        if "grid" in entry:
            found = entry["grid"].get(optimizer, {}).get(family, [])
        else:
            tuned = entry.get("rates_of", {}).get(of_size, of_size)
            found = [rate(tuned, optimizer, family, dataset)]
        for lr, dtype in itertools.product(found, entry.get("dtypes", ["bfloat16"])):
            yield Run(table, arm, seed, of_size, length, optimizer, lr, dataset, dtype)


def rate(size: str, optimizer: str, family: str, dataset: str = "text") -> float:
    """The learning rate that was chosen for a family. Raises ValueError where none was."""
    folder = folder_of(dataset)
    try:
        return float(TABLES["rates"][f"{size}-{folder}" if folder else size][optimizer][family])
    except KeyError:
        raise ValueError(
            f"tables.toml has no learning rate for {size}, {optimizer}, {family}; run the table "
            f"`rates{folder and '-'}{folder}` and add the best"
        ) from None


def folder_of(dataset: str) -> str:
    """The folder of a data set within the corpus, which also names its learning rates; that of text
    is the corpus."""
    return str(known("datasets", dataset).get("folder", "" if dataset == "text" else dataset))


def settings_of(size: str, dataset: str) -> dict[str, Any]:
    """The recipe's settings that do not depend on the run."""
    of_size, of_dataset = (
        known("sizes", size).get("recipe", {}),
        known("datasets", dataset).get("recipe", {}),
    )
    return dict(TABLES["recipe"] | of_size | of_dataset)


def words_of(arm: str, layers: int) -> dict[str, Any]:
    """What an arm changes in the config of a model of so many layers."""
    words = known("arms", arm)
    for name in ("family", "fewer"):
        words.pop(name, None)
    if every := min(words.pop("softmax_every", 0), layers):
        types = [FULL if n % every == 0 else LINEAR for n in range(1, 1 + layers)]
        words["layer_types"] = types
    return words


def model_of(arm: str, size: str, vocab_size: int) -> dict[str, Any]:
    """The [model] table of an arm's recipe, its F chosen so that its parameters are the
    reference's."""
    shape = {key: value for key, value in known("sizes", size).items() if key != "recipe"}
    words = words_of(arm, _config(shape).num_hidden_layers)
    model = {**shape, **words, "vocab_size": vocab_size}
    if TABLES["arms"][arm].get("fewer"):
        return model
    wanted = _config({**shape, "vocab_size": vocab_size}).parameter_count()
    step = 8  # tensor cores want rows of 16 bytes
    first = _config({**model, "intermediate_size": step}).parameter_count()
    per_step = _config({**model, "intermediate_size": 2 * step}).parameter_count() - first
    model["intermediate_size"] = step * max(1, 1 + round((wanted - first) / per_step))
    found = _config(model).parameter_count()
    if abs(found - wanted) > TOLERANCE * wanted:
        raise ValueError(f"{arm} at {size} has {found:,} parameters, and {REFERENCE} {wanted:,}")
    return model


def _config(model: dict[str, Any]) -> ModelConfig:
    fields = {key: value for key, value in model.items() if key != "size"}
    return ModelConfig.named(model["size"], **fields) if "size" in model else ModelConfig(**fields)


def recipe(run: Run, data: Path, vocab_size: int, *, cuda: bool) -> Recipe:
    """The complete recipe of a run. On a GPU it trains in `run.dtype`, compiled and recorded; on a
    CPU in float32."""
    settings = settings_of(run.size, run.dataset)
    batch, length = settings["train.batch_tokens"], settings["train.seq_len"]
    steps = max(1, run.tokens // batch)
    settings |= {
        "train.steps": steps,
        "train.seed": run.seed,
        "optim.name": run.optimizer,
        "optim.lr": run.lr,
        "optim.warmup_steps": min(settings["optim.warmup_steps"], steps // 10),
        "eval.every": max(1, steps // 10),
        "eval.tokens": 256 * length,
        "checkpoint.every": 0,
        "checkpoint.keep": 1,
    }
    if cuda:
        settings |= {"train.dtype": run.dtype, "train.compile": True, "train.graph": True}
    values: dict[str, Any] = {"run": run.name, "data": {"path": str(data)}}
    values["model"] = model_of(run.arm, run.size, vocab_size)
    for key, value in settings.items():
        table, _, field = key.partition(".")
        values.setdefault(table, {})[field] = value
    return Recipe.from_dict(values)
