"""Measuring on one GPU: time, memory, energy and the two ceilings."""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lib import record


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
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
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


def _energy() -> float:
    """Joules the GPU has taken, by NVML's counter."""
    import pynvml

    pynvml.nvmlInit()
    # NVML counts GPUs that are hidden too
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def joules(call: Callable[[], Any], seconds: float = 3.0, each: int = 10) -> float:
    """Energy of a call over at least `seconds` of repeats, `each` between looks."""
    call()
    torch.cuda.synchronize()
    calls, start, begin = 0, _energy(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(each):
            call()
        torch.cuda.synchronize()
        calls += each
    return (_energy() - start) / calls


def idle_watts(seconds: float = 3.0) -> float:
    """Power of a GPU that has nothing to do, to be asked before all else."""
    torch.cuda.synchronize()
    start, begin = _energy(), time.perf_counter()
    time.sleep(seconds)
    return (_energy() - start) / (time.perf_counter() - begin)


def launches(call: Callable[[], Any]) -> int:
    """Kernels and copies that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def profiled(call: Callable[[], Any], longest: int = 40) -> dict[str, Any]:
    """Of one warm call, in ms: until the host has queued it; until it is done; how long the GPU was
    busy, and busy with anything but NCCL; and of the longest kernels the name, how many, and ms."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    kernels: dict[str, tuple[int, float]] = {}
    for start, end, name in spans:
        calls, ms = kernels.get(name, (0, 0.0))
        kernels[name] = calls + 1, ms + (end - start) / 1e3
    slowest = sorted(kernels.items(), key=lambda item: -item[1][1])[:longest]
    return {
        "queued_ms": queued * 1e3,
        "whole_ms": whole * 1e3,
        "busy_ms": _covered(spans),
        "computing_ms": _covered(span for span in spans if "nccl" not in span[2].lower()),
        "launches": len(spans),
        "kernels": [(name[:120], *seen) for name, seen in slowest],
    }


def _covered(spans: Iterable[tuple[float, float, str]]) -> float:
    """ms that spans [us, sorted] cover, overlaps once."""
    covered, last = 0.0, 0.0
    for start, end, _ in spans:
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered / 1e3


def attempt(measure: Callable[[], Any]) -> Any:
    """The measurement, or what went wrong as text."""
    try:
        return measure()
    except Exception as error:  # recorded: one contender may not end the run
        torch.cuda.empty_cache()
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def ceilings() -> dict[str, float]:
    """Idle power, then copy bandwidth, read and written bytes, and bf16 matmul, both on random
    data."""
    idle = idle_watts()
    x = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = median_ms(functools.partial(y.copy_, x))
    del x, y
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(functools.partial(torch.mm, a, b))
    return {
        "idle_watts": idle,
        "copy_tb_per_second": 2 * 2**32 / copy / 1e9,
        "matmul_tflop_per_second": 2 * 8192**3 / product / 1e9,
    }


def distance(found: Tensor, want: Tensor) -> float:
    """How far a tensor is from the one that is wanted, as a share of its norm."""
    return ((found.float() - want.float()).norm() / want.float().norm()).item()
