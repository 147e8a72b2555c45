"""The loss that a model will reach, told from fits of L(N, D) = E + A / N^alpha + B / D^beta to the
losses of smaller runs.

N is the number of parameters without the embedding, D the number of training tokens.
`experiments/scaling.py` makes the fits and writes them to FITS, which ships with the package as
soon as there are fits. Importing this takes the standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SHAPE, ModelConfig
from ..layer_config import FULL, LINEAR

FITS = Path(__file__).with_name("scaling.json")
# Fields that say how large a model is, or what its tokens are. The others are its architecture.
SIZES = (
    *SHAPE,
    "head_dim",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def read_fits() -> dict[str, Any] | None:
    """What FITS holds; None where no fits ship with the package."""
    return json.loads(FITS.read_text(encoding="utf-8")) if FITS.exists() else None


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What a model is apart from its size: the fields in which it differs from `ModelConfig()`.

    A stack in which every n-th layer has full attention, and the others are linear, has
    `softmax_every` = n instead of `layer_types`, so that stacks of any depth can be compared."""
    defaults = dataclasses.asdict(ModelConfig())
    found = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in SIZES and value != defaults[name]
    }
    if config.softmax is not None:
        found["softmax"] = {k: v for k, v in found["softmax"].items() if v is not None}
        if not found["softmax"]:
            del found["softmax"]
    types = found.pop("layer_types", None) or ()
    every = types.index(FULL) + 1 if FULL in types else 0
    if every and list(types) == [LINEAR if n % every else FULL for n in range(1, len(types) + 1)]:
        found |= {"softmax_every": every} if every > 1 else {}  # 1: softmax layers alone
    elif types:
        found["layer_types"] = types
    return json.loads(json.dumps(found))  # with lists for tuples, as FITS has them


def counted_parameters(config: ModelConfig) -> int:
    """The N of a fit: all parameters but those of the embedding, which is also the head where the
    two are tied."""
    return config.parameter_count() - config.vocab_size * config.hidden_size


def loss(coefficients: Sequence[float], parameters: float, tokens: float) -> float:
    """L(N, D) in nats a token. coefficients: E, ln A, alpha, ln B, beta."""
    least, log_a, alpha, log_b, beta = coefficients
    of_parameters = math.exp(log_a - alpha * math.log(parameters))
    return least + of_parameters + math.exp(log_b - beta * math.log(tokens))


@dataclass(frozen=True)
class Prediction:
    """The loss of a model after so many tokens, in nats a token, and the 95 % interval of the
    fitted curve.

    parameters_beyond, tokens_beyond: how many times the most that was fitted these are, or, below
        1, how many times the least. 1 stands for all that lies between."""

    architecture: str
    loss: float
    least: float
    most: float
    parameters_beyond: float
    tokens_beyond: float


def predict(fit: dict[str, Any], name: str, parameters: float, tokens: float) -> Prediction:
    """The prediction of one architecture's fit.

    The interval is that of the fitted curve: the middle 95 % of what the fits to resampled runs
    predict. A single run lies beside the curve, and nothing is known of a law that changes beyond
    the runs."""
    drawn = [loss(coefficients, parameters, tokens) for coefficients in fit["sample"]]
    fortieths = statistics.quantiles(drawn, n=40, method="inclusive")
    return Prediction(
        name,
        loss(fit["fitted"], parameters, tokens),
        fortieths[0],
        fortieths[-1],
        _beyond(parameters, *fit["parameters"]),
        _beyond(tokens, *fit["tokens"]),
    )


def predict_model(config: ModelConfig, tokens: float, fits: dict[str, Any]) -> Prediction | None:
    """The prediction for a model; None where no fitted architecture is that of the model."""
    wanted = architecture(config)
    for name, fit in fits["architectures"].items():
        if fit["architecture"] == wanted:
            return predict(fit, name, counted_parameters(config), tokens)
    return None


def described(config: ModelConfig, tokens: float, fits: dict[str, Any]) -> str:
    """What `transnormer plan` says of a model's loss: the prediction, or why there is none."""
    found = predict_model(config, tokens, fits)
    if found is None:
        wanted, fitted = architecture(config), fits["architectures"]
        apart = {name: _apart(wanted, fit["architecture"]) for name, fit in fitted.items()}
        nearest = min(apart, key=lambda name: len(apart[name]))
        return (
            f"No loss is predicted, because only the architectures {', '.join(fitted)} have fits; "
            f"the nearest, {nearest}, differs in {', '.join(apart[nearest])}."
        )
    says = (
        f"Predicted loss: {found.loss:.3f} nats a token, 95 % interval of the fitted curve "
        f"{found.least:.3f} to {found.most:.3f}, on the {fits['part']} part of {fits['corpus']} "
        f"in tokens of {fits['tokenizer']}, for {found.architecture} trained with "
        f"{fits['optimizer']}"
    )
    away = {"parameters": found.parameters_beyond, "tokens": found.tokens_beyond}
    above = [f"{name} {_times(each)}" for name, each in away.items() if each > 1]
    below = [f"{name} {_times(each)}" for name, each in away.items() if each < 1]
    beyond = [f"{' and '.join(above)} the largest run fitted"] if above else []
    beyond += [f"{' and '.join(below)} the smallest"] if below else []
    says += f": {'; '.join(beyond) or 'no larger and no smaller than the runs fitted'}."
    if config.vocab_size != fits["vocab_size"]:
        says += (
            f" With the model's own vocabulary of {config.vocab_size:,} a token has another loss."
        )
    return says


def _apart(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the settings in which two architectures differ."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def _beyond(value: float, least: float, most: float) -> float:
    return value / most if value > most else value / least if value < least else 1.0


def _times(factor: float) -> str:
    return f"{factor:,.0f} times" if factor >= 100 else f"{factor:.2g} times"
