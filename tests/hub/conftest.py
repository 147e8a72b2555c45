"""Our classes registered with transformers, and a folder of every kind of model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import transnormer
from transnormer import LanguageModel
from transnormer.data.tokenizer import load_tokenizer

from ..lazy import Lazy
from .models import KINDS, small

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    import transnormer.hub  # noqa: F401  registers our classes with the Auto classes


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a kind, as our own `save_pretrained` writes it."""
    parent = tmp_path_factory.mktemp("folders")
    for name, kind in KINDS.items():
        model = small(**kind)
        model.tokenizer = load_tokenizer(prepared)
        model.save_pretrained(parent / name)
    return {name: parent / name for name in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, tuple[LanguageModel, hf.TransNormerForCausalLM]]:
    return {
        name: (transnormer.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder))
        for name, folder in folders.items()
    }


@pytest.fixture(params=KINDS)
def both(request, loaded) -> tuple[LanguageModel, hf.TransNormerForCausalLM]:
    """Our model and transformers' of the same folder."""
    return loaded[request.param]


@pytest.fixture
def tied(loaded) -> tuple[LanguageModel, hf.TransNormerForCausalLM]:
    return loaded["tied"]


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return shutil.copytree(folders["untied"], tmp_path / "copy")
