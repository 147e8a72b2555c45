"""Fixtures of the ops' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from losses import GPU

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


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Each backend that can run here."""
    if request.param == "triton":
        launch_triton = pytest.importorskip("transnormer.ops.launch_triton")
        if not GPU and not launch_triton.INTERPRETED:
            pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    return request.param


@pytest.fixture
def exact(backend):
    """The widest dtype of the backend."""
    return torch.float64 if backend == "torch" else torch.float32
