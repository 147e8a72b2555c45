"""The README's Python and every example run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from transnormer import LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer

from .conftest import REPOSITORY


@pytest.fixture(scope="module")
def folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand in, with a small untrained model where the README has its run and its exported model."""
    work = tmp_path_factory.mktemp("readme")
    config = ModelConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.5,  # wide and tied, it repeats the last token: it never draws the end of text at once
    )  # fmt: skip
    model = LanguageModel(config)
    model.tokenizer = load_tokenizer(prepared)
    for place in ("runs/demo", "mine"):
        model.save_pretrained(work / place)
    return work


def run(code: list[str], folder: Path) -> str:
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_and_the_inference_page(folder: Path) -> None:
    for page in ("README.md", "docs/inference.md"):
        for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), re.DOTALL):
            assert run(["-c", block], folder)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(path: Path, folder: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    assert run([str(path), "runs/demo"], folder)


def test_links_lead_somewhere() -> None:
    for page in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
