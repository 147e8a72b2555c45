"""The predicted loss: which fit a model has, what it says, and that a plan prints it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transnormer.cli import app
from transnormer.config import TRANSFORMER, ModelConfig
from transnormer.planning import scaling

# Two architectures whose losses are E + 100 / N^0.5 + 1,000 / D^0.5; E differs from draw to draw.
LAW = [math.log(100), 0.5, math.log(1_000), 0.5]
FIT = {
    "runs": 12,
    "parameters": [1e6, 1e8],
    "tokens": [1e7, 1e9],
    "fitted": [2.0, *LAW],
    "sample": [[1.5 + n / 100, *LAW] for n in range(101)],
}
FITS: dict[str, Any] = {
    "part": "test",
    "corpus": "some books",
    "tokenizer": "byte-level BPE of 300",
    "vocab_size": 300,
    "optimizer": "adamw",
    "architectures": {
        "published": {"architecture": {"embed_scale": True}, **FIT},
        "plain": {"architecture": scaling.architecture(ModelConfig(**TRANSFORMER)), **FIT},
    },
}


def test_an_architecture_is_what_is_left_without_sizes() -> None:
    words = {"convolution": "heads", "softmax": {"position": "none", "gate": True}}

    def stack(layers: int, every: int) -> ModelConfig:
        types = [
            "linear_attention" if n % every else "full_attention" for n in range(1, layers + 1)
        ]
        return ModelConfig(num_hidden_layers=layers, layer_types=tuple(types), **words)

    assert scaling.architecture(ModelConfig.named("5m")) == {}
    assert scaling.architecture(ModelConfig.published("1b")) == {"embed_scale": True}
    assert scaling.architecture(stack(10, 5)) == {**words, "softmax_every": 5}
    assert scaling.architecture(stack(24, 5)) == scaling.architecture(stack(5, 5))
    assert scaling.architecture(stack(12, 4)) != scaling.architecture(stack(12, 5))
    uneven = ["full_attention", *["linear_attention"] * 4, "full_attention"]
    config = ModelConfig(num_hidden_layers=6, layer_types=tuple(uneven))
    assert scaling.architecture(config) == {"layer_types": uneven}
    softmax = ModelConfig(num_hidden_layers=2, **TRANSFORMER)
    assert scaling.architecture(
        softmax.replace(layer_types=["full_attention"] * 2)
    ) == scaling.architecture(softmax)
    json.dumps(scaling.architecture(stack(10, 5)))


def test_a_prediction_by_hand() -> None:
    found = scaling.predict(FITS["architectures"]["published"], "published", 4_000_000, 1e8)
    assert found.loss == pytest.approx(2.0 + 0.05 + 0.1)
    # of the 101 values of E from 1.5 to 2.5, 2.5 of 100 steps from either end
    assert (found.least, found.most) == pytest.approx((1.675, 2.625))
    assert (found.parameters_beyond, found.tokens_beyond) == (1.0, 1.0)
    found = scaling.predict(FITS["architectures"]["published"], "published", 850_000_000, 1e6)
    assert (found.parameters_beyond, found.tokens_beyond) == pytest.approx((8.5, 0.1))


@pytest.mark.parametrize(
    ("size", "tokens", "beyond"),
    [
        ("10m", 1e8, "adamw: no larger and no smaller than the runs fitted."),
        ("385m", 2e10, "adamw: parameters 3.3 times and tokens 20 times the largest run fitted."),
        ("1b", 1e12, "parameters 8.9 times and tokens 1,000 times the largest run fitted."),
        ("1b", 1e6, "parameters 8.9 times the largest run fitted; tokens 0.1 times the smallest."),
    ],
)
def test_the_line_says_how_far_it_extrapolates(size: str, tokens: float, beyond: str) -> None:
    config = ModelConfig.published(size)
    said = scaling.described(config, tokens, FITS | {"vocab_size": config.vocab_size})
    assert re.match(
        r"Predicted loss: \d\.\d{3} nats a token, 95 % interval of the fitted curve \d\.\d{3} to ",
        said,
    )
    assert (
        "on the test part of some books in tokens of byte-level BPE of 300, for published" in said
    )
    assert said.endswith(beyond)
    other = scaling.described(config, tokens, FITS)
    vocab = f"{config.vocab_size:,}"
    assert other == f"{said} With the model's own vocabulary of {vocab} a token has another loss."


def test_an_architecture_without_a_fit_has_no_prediction() -> None:
    config = ModelConfig.published("385m", glu="swiglu")
    assert scaling.predict_model(config, 1e9, FITS) is None
    assert scaling.described(config, 1e9, FITS) == (
        "No loss is predicted, because only the architectures published, plain have fits; the "
        "nearest, published, differs in glu."
    )


def test_the_verb_prints_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(*arguments: str) -> str:
        words = ["plan", "--size", "10m", "--tokens", "5B", *arguments]
        return CliRunner().invoke(app, words, catch_exceptions=False).stdout

    monkeypatch.setattr(scaling, "FITS", tmp_path / "scaling.json")
    assert "redicted" not in plan()
    assert json.loads(plan("--json"))["predicted_loss"] is None
    scaling.FITS.write_text(json.dumps(FITS))
    *lines, settings = plan("model.embed_scale=true").splitlines()
    assert settings.startswith("The best as settings")
    assert all(len(line) <= 100 for line in lines)
    assert "tokens 5 times the largest run fitted." in " ".join(lines)
    found = json.loads(plan("--json", "model.kind=transformer"))["predicted_loss"]
    assert found["architecture"] == "plain"
    assert found["least"] < found["loss"] < found["most"]
