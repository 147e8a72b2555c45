"""Processes that tests start: forked from one that has imported what they need, so that each begins
in milliseconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "matplotlib.backends.backend_agg",
        "transnormer.train.loop",
        "tests.frozen",
    ]
)


def run_processes(work: Callable[..., None], *arguments: object, count: int) -> None:
    """Call work(rank, *arguments) in `count` processes and wait for all; raises what the first of
    them raised."""
    mp.start_processes(work, arguments, nprocs=count, start_method="forkserver")
