"""Scenes of Shakespeare as documents, and prepared in small shards."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from transnormer.data.prepare import prepare
from transnormer.data.tokenizer import END_OF_TEXT, load_tokenizer

SHAKESPEARE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"


@pytest.fixture(scope="session")
def scenes() -> list[str]:
    """120 scenes of uneven length, two of which spell the end of text."""
    found = SHAKESPEARE.read_text()[:60_000].split("\n\n")[:120]
    found[3] += END_OF_TEXT + " 1599 \U0001f600"
    found[50] = END_OF_TEXT
    return found


@pytest.fixture(scope="session")
def scenes_file(tmp_path_factory: pytest.TempPathFactory, scenes: list[str]) -> Path:
    path = tmp_path_factory.mktemp("scenes") / "scenes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in scenes))
    return path


@pytest.fixture(scope="session")
def prepared_scenes(tmp_path_factory: pytest.TempPathFactory, scenes_file: Path) -> Path:
    out = tmp_path_factory.mktemp("prepared_scenes") / "data"
    prepare([scenes_file], out, vocab_size=400, split=0.2, shard_tokens=1000)
    return out


@pytest.fixture(scope="session")
def tokenizer(prepared: Path) -> Tokenizer:
    """The tokenizer of the prepared text."""
    return load_tokenizer(prepared)
