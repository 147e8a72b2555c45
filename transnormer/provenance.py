"""Where and how a result was made: device, versions, commit, command, date. Each result and each
start of a run holds these."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__

LIBRARIES = (
    "numpy",
    "triton",
    "transformers",
    "torchao",
    "bitsandbytes",
    "flash-linear-attention",
    "lightning-attn",
    "liger-kernel",
    "cut-cross-entropy",
)
CHECKOUT = Path(__file__).parent.parent


def device_name(device: str | torch.device) -> str:
    """The name of a GPU such as "cuda" or "cuda:1", otherwise the processor's with the number of
    threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files were changed; None where there is no
    checkout, or no git."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return (
            subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
            or None
        )
    except OSError:
        return None


def provenance(
    device: str | torch.device, *, command: str, of: str | None = None
) -> dict[str, Any]:
    """What every result says of itself. device: as in `device_name`; of: the commit, where the code
    has no git with it."""
    versions = {
        "transnormer": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if torch.version.cuda:
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": of or commit(),
        "command": command,
        "date": date.today().isoformat(),
    }
