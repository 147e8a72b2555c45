"""What the report says of several GPUs: each mesh, plain and recorded, beside today's plan for
it."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from matplotlib.figure import Figure

from lib.pictures import bars, panels
from lib.report_training import Values
from lib.results import GIB, Result, every, newest, spread, table
from transnormer.config import ModelConfig
from transnormer.planning.hardware import GPUS
from transnormer.planning.memory import Layout, ParameterShapes, expected_memory, parameter_shapes
from transnormer.planning.speed import find_speed


@functools.cache
def shapes_of(size: str, tokens: int) -> ParameterShapes:
    return parameter_shapes(ModelConfig.named(size), tokens)


def planned(row: Result) -> tuple[float, float]:
    """(tokens a second, GiB a GPU) by today's plan."""
    factors: dict[str, Any] = {}
    if row["mesh"] != "one process":
        factors = {name: int(size) for name, size in map(str.split, row["mesh"].split(", "))}
    layout, shapes = Layout(**factors), shapes_of(row["size"], row["seq_len"])
    speed, _ = find_speed(shapes, layout, GPUS["h100"], row["rows"], row["seq_len"])
    return speed, expected_memory(shapes, layout, row["rows"], row["seq_len"]).allocated / GIB


def run_name(result: Result) -> str:
    """The name of a run: that of its file without what all of them share, never its place among the
    others."""
    return result["subject"].removeprefix("meshes_")


def by_mesh(results: list[Result]) -> dict[tuple[str, str, str, bool], list[tuple[Result, Result]]]:
    """(row, result) of every run of a mesh, by size, rows and tokens, mesh, and whether its step is
    recorded."""
    found: dict[tuple[str, str, str, bool], list[tuple[Result, Result]]] = {}
    for result in results:
        for row in result["rows"]:
            if "tokens_per_second" in row:
                key = (
                    row["size"],
                    f"{row['rows']} × {row['seq_len']:,}",
                    row["mesh"],
                    bool(row.get("graph")),
                )
                found.setdefault(key, []).append((row, result))
    order = sorted(found, key=lambda key: (*key[:2], key[2] != "one process", *key[2:]))
    return {key: found[key] for key in order}


def meshes(results: list[Result]) -> tuple[Figure, Values]:
    """A row and a group of bars for each mesh; a range where several runs measured it."""
    head = [
        "size",
        "rows × tokens",
        "mesh",
        "recorded",
        "tokens/s",
        "planned",
        "step, ms",
        "GPU computes, ms",
    ]
    head += ["GiB a GPU", "planned", "runs"]
    rows = []
    # of the planned rate, where layers wait for others
    shares: dict[str, list[float]] = {"plain": [], "recorded": []}
    speeds: dict[str, dict[str, dict[str, float]]] = {}  # by size, mesh, and what the speed is of
    for (size, shape, mesh, recorded), runs in by_mesh(results).items():
        speed, memory = planned(runs[0][0])
        measured = [row["tokens_per_second"] for row, _ in runs]
        medians = [statistics.median(row["times_ms"]) for row, _ in runs]
        computing = [row["profile"]["computing_ms"] for row, _ in runs if "profile" in row]
        peaks = [row["peak_bytes"] / GIB for row, _ in runs if row.get("peak_bytes")]
        cells = [
            size,
            shape,
            mesh,
            "yes" if recorded else "",
            spread(measured),
            f"{speed:,.0f}",
            spread(medians),
        ]
        cells += [
            spread(computing) if computing else "",
            spread(peaks, ".1f") if peaks else "",
            f"{memory:.1f}",
        ]
        rows.append([*cells, ", ".join(run_name(result) for _, result in runs)])
        kind = "recorded" if recorded else "plain"
        if "tensor" in mesh or "context" in mesh:
            shares[kind] += [each / speed for each in measured]
        speeds.setdefault(size, {}).setdefault(f"{shape}, {mesh}", {"planned": speed})[kind] = max(
            measured
        )
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    rows = [[row[n] for n in kept] for row in rows]
    figure, axes = panels(
        len(speeds), 9 / len(speeds) + 1, 0.42 * max(map(len, speeds.values())) + 1
    )
    for axis, (size, of) in zip(axes, speeds.items(), strict=True):
        kinds = [
            kind
            for kind in ("plain", "recorded", "planned")
            if any(kind in each for each in of.values())
        ]
        series = {kind: [each.get(kind) for each in of.values()] for kind in kinds}
        bars(axis, list(of), series, "tokens per second, the fastest run", size)
    ends = {
        f"{kind} {end.__name__}": end(found)
        for kind, found in shares.items()
        if found
        for end in (min, max)
    }
    return figure, {"table": table([head[n] for n in kept], rows), "runs": results, **ends}


def two() -> tuple[Figure, Values]:
    result, profile = newest("meshes", "h100x2"), newest("meshes_profile", "h100x2")
    figure, values = meshes([result])
    alone = {
        row["seq_len"]: row["tokens_per_second"]
        for row in result["rows"]
        if row["mesh"] == "one process"
    }
    gains: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["mesh"] != "one process" and "tokens_per_second" in row:
            gains.setdefault(row["mesh"], []).append(
                row["tokens_per_second"] / alone[row["seq_len"]]
            )
    queued = ", ".join(
        f"{row['profile']['queued_ms'] / statistics.median(row['times_ms']):.0%} with {row['mesh']}"
        for row in profile["rows"]
        if row["mesh"].startswith(("tensor", "context"))
    )
    return figure, values | {
        "gains": ", ".join(f"{mesh} {spread(found, '.2f')}" for mesh, found in gains.items()),
        "queued": queued,
        "all_reduce": result["all_reduce_gb_per_second"],
        "runs": [result, profile, newest("host")],
    }


def runs_of_four() -> list[Result]:
    """385m and 7b on four GPUs: the newest file of each name."""
    return list({result["subject"]: result for result in every("meshes_[0-9]*", "h100x4")}.values())


def four() -> tuple[Figure, Values]:
    return meshes(runs_of_four())
