"""Reading `benchmarks/results`, and the small pieces of Markdown that the report is made of."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
GIB = 2**30

Result = dict[str, Any]


def every(subject: str, device: str = "h100") -> list[Result]:
    """The results of a subject (or of all subjects that a pattern matches) on a device, the oldest
    first.

    `name` is the name of the file and `subject` what stands in it before the device, so that a run
    is called the same whichever other files there are."""
    paths = RESULTS.glob(f"{subject}_{device}_????-??-??.json")
    found = [json.loads(path.read_text()) | {"name": path.stem} for path in paths]
    named = [each | {"subject": each["name"].rsplit("_", 2)[0]} for each in found]
    return sorted(named, key=lambda each: (each["date"], each["name"]))


def newest(subject: str, device: str = "h100") -> Result:
    found = every(subject, device)
    if not found:
        raise FileNotFoundError(f"no result of {subject} on {device} in {RESULTS}")
    return found[-1]


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def link(result: Result, name: str = "") -> str:
    """A link to the run's place in the records, which have its command, commit and versions."""
    return f"[{name or result['name']}](records.md#{result['name']})"


def spread(values: list[float], form: str = ",.0f") -> str:
    """One value, or the least and the largest of several."""
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


def pair(row: Result, forward: str, both: str) -> str:
    ms = [row.get(key) for key in (forward, both)]
    return " / ".join(f"{x:.3g}" if isinstance(x, float) else "–" for x in ms) if any(ms) else "–"


def wrap(text: str) -> str:
    """Prose in lines of 120 characters; headings, tables, pictures and indented lines stay as they
    are."""
    return "\n\n".join(
        part
        if part.startswith(("#", "|", "!", "    "))
        else textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False)
        for part in blocks(text)
    )


def blocks(text: str) -> Iterator[str]:
    return (part.strip("\n") for part in text.split("\n\n") if part.strip())
