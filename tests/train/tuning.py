"""A tiny model and twenty records to tune it on, and what the tests read of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer
from transnormer.train.metrics import read_metrics
from transnormer.train.recipe import Recipe

from .runs import load

PLACES = {
    "Ann": "Rome", "Bob": "Oslo", "Cal": "Lima", "Dot": "Bonn", "Eve": "Cork", "Flo": "Kiev",
    "Gus": "Riga",
    "Hal": "Bern", "Ida": "Nice", "Jon": "Pisa", "Kit": "York", "Leo": "Bath", "Max": "Deal",
    "Ned": "Hove",
    "Ora": "Hull", "Pam": "Ayr", "Roy": "Ely", "Sam": "Wem", "Tom": "Diss", "Una": "Ware",
}  # fmt: skip


def write_records(path: Path, places: dict[str, str]) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Where is {name}?"},
                {"role": "assistant", "content": place},
            ]
        }
        for name, place in places.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def small_model(prepared: Path, folder: Path, **changes) -> LanguageModel:
    config = ModelConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        **changes,
    )
    torch.manual_seed(1)
    model = LanguageModel(config)
    model.tokenizer = load_tokenizer(prepared)
    model.save_pretrained(folder)
    return model


def tune(*overrides: str) -> Recipe:
    return load("tune.toml", *overrides)


def curve(run: str) -> list[tuple[int, float, float | None]]:
    lines = read_metrics(Path("runs") / run / "metrics.jsonl")
    return [(line["step"], line["loss"], line.get("valid_loss")) for line in lines]


def means(curve: list[tuple[int, float, float | None]]) -> list[float]:
    return [loss for _, loss, _ in curve]


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return transnormer.load(run).state_dict()
