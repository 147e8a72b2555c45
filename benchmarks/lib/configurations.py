"""Every configuration that the attention kernels may choose: whether it is right, and how fast it
is."""

# mypy: allow-untyped-defs

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.contenders import attention_inputs
from lib.gpu import attempt, distance, graph_ms, median_ms
from transnormer.ops import lightning_kernels_triton as device_code
from transnormer.ops import lightning_triton as kernels
from transnormer.ops.lightning_tiles_triton import Tiles, choices, device_limits

ROOT = Path(__file__).resolve().parents[2]
SWEEP = [
    Tiles(*tiles)  # type: ignore[arg-type]
    for tiles in [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (64, 64, 4, 2, True),
        (64, 64, 4, 3, True),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (64, 128, 8, 3, True),
        (64, 128, 8, 4, True),
        (128, 64, 8, 2),
        (128, 64, 8, 2, True),
        (128, 64, 8, 3, True),
        (128, 128, 8, 2),
        (128, 128, 8, 2, True),
        (64, 64, 8, 3),
        (64, 128, 8, 1),
        (64, 128, 8, 2, True),
        (128, 64, 8, 1),
        (128, 64, 4, 1),
        (128, 128, 8, 1),
        (64, 128, 4, 2),
        (32, 64, 4, 2),
        (32, 64, 4, 3, True),
        (16, 64, 4, 2),
        (16, 64, 4, 4),
    ]
]
SEGMENTS: list[tuple[tuple[int, int, int], tuple[int | None, ...]]] = [
    ((1, 32, 131_072), (None, 1, 4, 8, 16)),
    ((1, 16, 2_048), (None, 1, 4, 8)),
    ((4, 32, 2_048), (None, 2)),
]


def _error(
    forward: bool,
    tiles: Tiles,
    segments: int | None,
    K: int,
    V: int,
    dtype: torch.dtype,
    lengths: Any,
) -> float | str:
    """The largest error of output and state, or of the gradients, in units of plain torch's: at
    most 2 is right.

    Two roundings of float32 are the least unit, as in the tests.
    """
    sys.path.insert(0, str(ROOT / "tests" / "ops"))
    import oracle

    case = oracle.draw(
        200,
        K,
        V,
        rows=2,
        decays=[0.0, -0.02, -0.7],
        dtype=dtype,
        lengths=lengths,
        device="cuda",
        seed=K + V,
    )
    case = case.to(dtype, state=torch.float32)
    arguments = (case.q, case.k, case.v, case.log_decay, case.state, case.cu_seqlens)

    def call() -> tuple[Tensor, ...]:
        if forward:
            return kernels.forward(*arguments, tiles=tiles, segments=segments)
        return kernels.backward(
            *arguments, case.d_output, case.d_last, tiles=tiles, segments=segments
        )

    names = ("output", "last") if forward else ("d_q", "d_k", "d_v", "d_state")
    found, again = (dict(zip(names, call(), strict=True)) for _ in range(2))
    if lost := [name for name in names if not found[name].isfinite().all()]:
        return f"not finite: {', '.join(lost)}"
    if other := [name for name in names if not torch.equal(found[name], again[name])]:
        return f"another result the second time: {', '.join(other)}"
    in_dtype = case.to(dtype)
    true, plain = oracle.exact(in_dtype), oracle.plain(in_dtype)
    unit = 2 * torch.finfo(torch.float32).eps
    return max(
        oracle.distance(x, true[name]) / max(oracle.distance(plain[name], true[name]), unit)
        for name, x in found.items()
    )


def check(quick: bool) -> Iterator[dict[str, Any]]:
    """Every configuration that may be chosen, in several processes, as compiling takes longer than
    running."""
    widths = [(128, 128), (64, 64), (256, 128)]
    if not quick:
        widths += [(128, 256), (256, 256), (16, 16), (96, 160), (33, 47)]
    shared = device_limits(torch.cuda.current_device())[1]
    cases: list[tuple[int, list[int] | None]] = [
        (1, None),
        (3, None),
        (1, [70, 0, 130]),
        (2, [70, 0, 130]),
    ]
    calls = []
    for (K, V), dtype in itertools.product(widths, [torch.bfloat16, torch.float16, torch.float32]):
        wide = max(K, V)
        walks = [choices(wide, wide, dtype, shared, paired=paired) for paired in (True, False)]
        passes = {
            "forward": choices(K, V, dtype, shared),
            "backward": [*walks[0], *walks[1]],
        }
        brief = quick and (dtype != torch.bfloat16 or (K, V) != (128, 128))
        for name, options in passes.items():
            found = list(dict.fromkeys(options))[: 1 if brief else None]
            # as in small calls
            found += [dataclasses.replace(x, described=False) for x in found if x.described]
            for tiles, (segments, lengths) in itertools.product(found, cases[:: 3 if brief else 1]):
                calls.append((name == "forward", tiles, segments, K, V, dtype, lengths))
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        for call, (error, seconds) in zip(calls, pool.map(_checked, calls), strict=True):
            forward, tiles, segments, K, V, dtype, lengths = call
            yield {
                "pass": "forward" if forward else "backward",
                "K": K,
                "V": V,
                "dtype": str(dtype),
                "tiles": dataclasses.astuple(tiles),
                "segments": segments,
                "packed": lengths is not None,
                "error_over_plain": error,
                "seconds": seconds,
                "right": isinstance(error, float) and error <= 2,
            }


def _checked(call: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return attempt(lambda: _error(*call)), time.perf_counter() - begin


def sweep(
    shapes: list[tuple[int, int, int, int | None]], candidates: list[Tiles]
) -> Iterator[dict[str, Any]]:
    """Forward and backward kernels alone with every configuration, and how far each is from the
    first one's result."""
    seen = _kernels()
    for B, H, T, segments in shapes:
        ((q, k, v, g),), log_decay = attention_inputs(B, H, T)
        q, k, v = (x.detach() for x in (q, k, v))
        wanted: list[Tensor] = []
        for tiles in candidates:
            chosen: dict[str, Any] = {"tiles": tiles, "segments": segments}
            forward = functools.partial(kernels.forward, q, k, v, log_decay, **chosen)
            backward = functools.partial(
                kernels.backward, q, k, v, log_decay, None, None, g, None, **chosen
            )
            row: dict[str, Any] = {
                "B": B,
                "H": H,
                "T": T,
                "segments": segments,
                "tiles": dataclasses.astuple(tiles),
            }
            for name, call in (("forward", forward), ("backward", backward)):
                begin = time.perf_counter()
                row[f"{name}_ms"] = attempt(functools.partial(_kernel_ms, call, B * H * T < 2**18))
                row[f"{name}_seconds"] = time.perf_counter() - begin
            found = attempt(functools.partial(_outputs, forward, backward))
            if isinstance(found, list):
                wanted = wanted or found
                row["distance"] = [distance(x, y) for x, y in zip(found, wanted, strict=True)]
            if (count := _kernels()) > seen:  # else the kernels compiled last are of another row
                row["resources"], seen = attempt(_resources), count
            yield row
            del found
        del wanted


def _outputs(forward: Callable[[], Any], backward: Callable[[], Any]) -> list[Tensor]:
    """The output of forward, and dq, dk and dv of backward."""
    return [forward()[0], *backward()[:3]]


def _kernel_ms(call: Callable[[], Any], small: bool) -> float:
    return graph_ms([call]) if small else median_ms(call, budget_ms=60)


def _compiled() -> dict[str, list[Any]]:
    kernels = {"forward": device_code.forward_kernel, "backward": device_code.backward_kernel}
    index = torch.cuda.current_device()
    return {name: list(kernel.device_caches[index][0].values()) for name, kernel in kernels.items()}


def _kernels() -> int:
    return sum(map(len, _compiled().values()))


def _resources() -> dict[str, Any]:
    """Registers and spills of the kernels compiled last."""
    found = {}
    for name, compiled in _compiled().items():
        if compiled:
            found[name] = (
                getattr(compiled[-1], "n_regs", None),
                getattr(compiled[-1], "n_spills", None),
            )
    return found
