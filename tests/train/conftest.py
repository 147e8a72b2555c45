"""A folder with a recipe for a tiny model, one thread for what must not depend on their number,
steps that go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transnormer.train import loop

from .runs import spoiling, write_recipe
from .tuning import PLACES, small_model, write_records


@pytest.fixture
def pictures() -> None:
    """Runs of the test draw their curves, as they do outside the tests."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs draw none, because drawing takes longer than all the steps of a tiny run."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(loop, "plot", lambda *_: None)


@pytest.fixture
def work(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the working directory."""
    write_recipe(tmp_path, prepared)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tuning(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with an untrained model, twenty records, and a recipe that tunes the one on the
    other."""
    import transnormer.hub  # noqa: F401  registers our classes with the Auto classes

    small_model(prepared, tmp_path / "base")
    write_records(tmp_path / "records.jsonl", PLACES)
    (tmp_path / "tune.toml").write_text(
        """
        [model]
        from = "base"
        [data]
        path = "data"
        text = ["records.jsonl"]
        format = "messages"
        split = 0.2
        [train]
        steps = 12
        seq_len = 64
        batch_tokens = 256
        [optim]
        lr = 1e-2
        weight_decay = 0.0
        warmup_steps = 4
        [eval]
        every = 4
        [checkpoint]
        every = 3
        """
    )
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes loss and gradients of the steps that read the given samples NaN, or a
    multiple."""
    gradients = loop.gradients

    def choose(
        *samples: int,
        factor: float = float("nan"),
        stop_at: int = -1,
        error: type[Exception] | None = None,
    ) -> None:
        def damage(model: Any, loss: Tensor) -> Tensor:
            for p in model.parameters():
                p.grad *= factor
            return loss * factor

        monkeypatch.setattr(
            loop, "gradients", spoiling(gradients, damage, *samples, stop_at=stop_at, error=error)
        )

    return choose
