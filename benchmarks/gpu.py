"""Measuring on one GPU: time, memory, energy and the two ceilings."""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import record
import torch


def median_ms(call: Callable[[], Any], *, budget_ms: float = 400) -> float:
    """Of single calls between events, after warming up."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = (time.perf_counter() - begin) * 1000
    repeats = int(min(200, max(7, budget_ms / max(once, 0.01))))
    for _ in range(min(3, repeats)):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def graph_ms(calls: Sequence[Callable[[], Any]], number: int = 20) -> float:
    """A call's share of the replay of so many calls in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _, call in zip(range(number), itertools.cycle(calls), strict=False):
            call()
    return median_ms(graph.replay) / number


def peak_bytes(call: Callable[[], Any]) -> int:
    return record.peak_bytes(call, "cuda")


def joules(call: Callable[[], Any], seconds: float = 3.0, each: int = 10) -> dict[str, float]:
    """Energy of a call by NVML's counter over at least `seconds` of repeats, `each` between looks, and the idle power."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def counter() -> float:
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

    torch.cuda.synchronize()
    start, begin = counter(), time.perf_counter()
    time.sleep(1)
    idle = (counter() - start) / (time.perf_counter() - begin)
    calls, start, begin = 0, counter(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(each):
            call()
        torch.cuda.synchronize()
        calls += each
    return {"joules": (counter() - start) / calls, "idle_watts": idle}


def attempt(measure: Callable[[], Any]) -> Any:
    """The measurement, or what went wrong as text."""
    try:
        return measure()
    except Exception as error:  # recorded: one contender may not end the run
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def ceilings() -> dict[str, float]:
    """Copy bandwidth, read and written bytes, and bf16 matmul, both on random data."""
    x = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = median_ms(functools.partial(y.copy_, x))
    del x, y
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(functools.partial(torch.mm, a, b))
    return {"copy_tb_per_second": 2 * 2**32 / copy / 1e9, "matmul_tflop_per_second": 2 * 8192**3 / product / 1e9}
