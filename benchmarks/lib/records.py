"""docs/records.md: every result with its command, its commit and its rows, without a word about any
one subject."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from typing import Any

from lib.results import GIB, Result, every, table, wrap

WIDTH, ROWS, CELL = 200, 60, 60  # characters of a line, rows that are shown, characters of a cell
# what every result begins with
HEAD = ("subject", "name", "device", "date", "commit", "versions", "command")
KEYS = (
    "run",
    "model",
    "contender",
    "variant",
    "op",
    "mesh",
    "size",
    "graph",
    "recompute",
    "rows",
    "seq_len",
    "B",
    "H",
    "T",
    "K",
    "V",
    "dtype",
    "vocab",
    "seed",
    "name",
    "rate",
    "call",
    "kernel",
    "commit",
)


def flat(row: Result, before: str = "") -> dict[str, Any]:
    """A row's values by name; of lists only short ones and times, of which the median and the
    ends."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            found |= flat(value, f"{name}: ")
        elif not isinstance(value, list):
            found[name] = value
        elif key.endswith("_ms") and value:
            found[name] = (
                f"{statistics.median(value):,.4g} ({min(value):,.4g} to {max(value):,.4g})"
            )
        elif 0 < len(value) <= 5 and not any(isinstance(each, list | dict) for each in value):
            found[name] = ", ".join(cell("", each) for each in value)
    return found


def by_contender(row: Result) -> list[Result]:
    """A row of its own for each contender of a row that holds several; a text says what went wrong
    with one."""
    if "contenders" not in row:
        return [row]
    facts = {key: value for key, value in row.items() if key != "contenders"}
    found = {
        name: each if isinstance(each, dict) else {"error": each}
        for name, each in row["contenders"].items()
    }
    return [facts | {"contender": name} | each for name, each in found.items()]


def title(name: str) -> str:
    words = name if "." in name else name.removesuffix("_bytes").replace("_", " ")
    return words + (", GiB" if name.endswith("bytes") else "")


def cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes") and isinstance(value, int | float):
        return f"{value / GIB:,.4g}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return text[:12] if name == "commit" else text


def tables(rows: list[Result]) -> list[str]:
    """What all rows share as a sentence, the rest in tables no wider than a line, long texts below
    them."""
    flats = [flat(row) for row in itertools.chain.from_iterable(map(by_contender, rows))]
    names = list(dict.fromkeys(name for each in flats for name in each))
    cells = {
        name: [cell(name, each[name]) if name in each else "" for each in flats] for name in names
    }
    shared = {
        name: found[0] for name, found in cells.items() if len(flats) > 1 and len(set(found)) == 1
    }
    texts = [
        name
        for name in names
        if name not in shared and (name == "note" or max(map(len, cells[name])) > CELL)
    ]
    keys = [name for name in names if name in KEYS and name not in (*shared, *texts)]
    rest = [name for name in names if name not in (*shared, *texts, *keys)]
    width = {name: 3 + max(len(title(name)), *map(len, cells[name])) for name in names}
    columns = [list(keys)]
    for name in rest:
        if columns[-1] != keys and sum(width[each] for each in (*columns[-1], name)) >= WIDTH:
            columns.append(list(keys))
        columns[-1].append(name)
    parts = [f"All rows: {listed(shared)}."] if shared else []
    for chosen in filter(None, columns):
        parts.append(
            table(
                [title(name) for name in chosen],
                zip(*(cells[name] for name in chosen), strict=True),
            )
        )
    for name in texts:
        of = cells[keys[0]] if keys else [""] * len(flats)
        pairs = dict.fromkeys(
            (where, text) for where, text in zip(of, cells[name], strict=True) if text
        )
        parts += [
            f"{capital(title(name))}{f' of {where}' if where else ''}: {text}"
            for where, text in pairs
        ]
    return parts


def listed(values: dict[str, str]) -> str:
    return "; ".join(f"{title(name)} {text}" for name, text in values.items())


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def record(result: Result) -> str:
    versions = ", ".join(
        f"{name} {version}" for name, version in (result.get("versions") or {}).items() if version
    )
    parts = [
        f"## {result['name']}",
        f"{result['device']}; {result['date']}; commit {cell('commit', result['commit'])}; "
        f"{versions}; "
        f"[file](../benchmarks/results/{result['name']}.json).",
        *commands(result["command"]),
    ]
    beside: dict[str, str] = {}
    for key, value in result.items():
        if key in HEAD:
            continue
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            parts += [f"**{capital(title(key))}**"] if key != "rows" else []
            parts += (
                tables(value)
                if len(value) <= ROWS
                else [f"The {len(value):,} rows are in the file alone."]
            )
        elif isinstance(value, dict):
            found = {name: cell(name, each) for name, each in flat(value).items()}
            parts.append(f"{capital(title(key))}: {listed(found)}.")
        elif key in (found := flat({key: value})):
            text = cell(key, found[key])
            if len(text) > CELL:
                parts.append(f"{capital(title(key))}: {text}")
            else:
                beside[key] = text
    if beside:
        parts.append(f"In the whole run: {listed(beside)}.")
    return "\n\n".join(map(wrap, parts))


def commands(text: str) -> list[str]:
    """A code block for each command, its lines continued as a shell reads them; what is not one as
    a sentence."""
    if (
        not text.startswith(("python ", "torchrun --n", "ncu ", "compute-sanitizer "))
        or ", on the " in text
    ):
        return [f"Made by {text}."]
    width = {"width": 110, "break_long_words": False, "break_on_hyphens": False}
    lines = (" \\\n  ".join(textwrap.wrap(each, **width)) for each in text.split("; "))  # type: ignore[arg-type]
    return [textwrap.indent(each, "    ") for each in lines]


def records(pictures: dict[str, str]) -> str:
    """Every result, the newest first; `pictures` are file names by the name of a result."""
    found = sorted(every("*", "*"), key=lambda each: (each["date"], each["name"]), reverse=True)
    drawn = {name: f"\n\n![{name}]({file})" for name, file in pictures.items()}
    return "\n\n".join(record(result) + drawn.get(result["name"], "") for result in found)
