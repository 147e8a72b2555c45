"""Fixtures shared by the suite."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
TEXT = REPOSITORY / "examples" / "shakespeare.txt"
# seconds after which what a test waits for is given up; nothing else depends on how fast a machine
# is
PATIENCE = 900
PUBLISHED = Path(__file__).parent / "fixtures" / "tnl_tiny"

# triton reads it where it is first imported, and other libraries import it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# a shell starts what runs in the background so
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # what tests start would not hear Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("MPLCONFIGDIR", str(REPOSITORY / "build" / "matplotlib"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One where there is a GPU, which some tests fill; else one more than cores, because many tests
    wait, and at most four, which need 8 GB of memory."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:  # pytest-xdist obeys it
        return None
    return 1 if torch.cuda.is_available() else min(4, (os.cpu_count() or 1) + 1)


def pytest_configure(config: pytest.Config) -> None:
    # one thread for each, and for what it starts
    if (config.getoption("numprocesses", None) or 0) > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The folders with the longest files first: no process is to be left alone with one of them in
    # the end.
    items.sort(
        key=lambda item: [folder in item.path.parts for folder in ("train", "ops")], reverse=True
    )
    chosen = config.getoption("-m") or ""
    for item in items:
        if "proof" in item.keywords and "proof" not in chosen:
            item.add_marker(pytest.mark.skip(reason="takes long: make proof"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now is no longer searched for garbage


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(int(os.environ.get("TRANSNORMER_TEST_SEED", "0")))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60,000 characters of Shakespeare in a file."""
    path = tmp_path_factory.mktemp("text") / "part.txt"
    path.write_text(TEXT.read_text()[:60_000])
    return path


@pytest.fixture(scope="session")
def prepared(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That text as a prepared folder with 300 words."""
    from transnormer.data.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "prepared"
    prepare([text_file], out, vocab_size=300, split=0.1)
    return out
