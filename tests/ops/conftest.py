"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import faster_interpreter


@pytest.fixture(scope="session", autouse=True)
def _fast_interpreter() -> Iterator[None]:
    with faster_interpreter():
        yield


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def poison(*shape, make=make, **how):
            made = make(*shape, **how)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, poison)
