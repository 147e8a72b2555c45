"""A folder with a recipe for a tiny model, and one thread for what must not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .runs import STEPS


@pytest.fixture
def work(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the working directory."""
    (tmp_path / "tiny.toml").write_text(
        f"""
        [data]
        path = "{prepared}"
        [model]
        num_hidden_layers = 2
        hidden_size = 32
        num_attention_heads = 2
        intermediate_size = 48
        [train]
        steps = {STEPS}
        seq_len = 32
        batch_tokens = 128
        [optim]
        lr = 1e-2
        warmup_steps = 4
        [eval]
        every = 10
        tokens = 512
        [checkpoint]
        every = 3
        """
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
