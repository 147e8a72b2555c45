"""What every benchmark shares: where it ran, how much memory a call took, and its result as
JSON."""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from transnormer.provenance import device_name, provenance

RESULTS = Path(__file__).parents[1] / "results"


def slug(device: str) -> str:
    """A device's name in the names of results."""
    return next(
        (kind for kind in ("h200", "h100", "a100") if kind in device.lower()),
        device.lower().replace(" ", "-"),
    )


def head(
    subject: str, device: str, of: str | None = None, launcher: tuple[str, ...] = ("python",)
) -> dict[str, Any]:
    """What every result begins with: subject, device, installed versions, commit (`of`, or git's),
    command and date."""
    arguments = list(sys.argv[1:])
    if "--out" in arguments:  # where it lay says nothing
        place = arguments.index("--out")
        del arguments[place : place + 2]
    command = shlex.join([*launcher, f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    found = provenance("cuda" if torch.cuda.is_available() else "cpu", command=command, of=of)
    return {"subject": subject, **found, "device": device}


def save(subject: str, device: str, rows: list[dict[str, Any]], **facts: Any) -> Path:
    """Write benchmarks/results/<subject>_<device>_<date>.json."""
    record = head(subject, device_name(device)) | facts | {"rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{subject}_{device}_{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def matmul_flops(device: str, dtype: torch.dtype, size: int = 2_048) -> float:
    """The measured ceiling: operations per second of a square matrix product on random data."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / (min(time_ms(lambda: a @ b, device) for _ in range(5)) / 1e3)


def time_ms(call: Callable[[], object], device: str) -> float:
    """Wall-clock milliseconds of one call, the device waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """What a call needs at its peak beyond what was allocated before it (CPU: resident memory,
    Linux only)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def status(key: str) -> int:
        found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0

    # else freed memory is reused and the call seems to need none
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)
