"""The sections of docs/performance.md on several GPUs."""

from __future__ import annotations

import statistics
from typing import Any

from record import link, newest, source, table

from transnormer.config import ModelConfig
from transnormer.planning.hardware import GPUS
from transnormer.planning.memory import Layout, find_memory, measure
from transnormer.planning.speed import find_speed

FITTED = "Planned is what today's plan says; some of its constants are fitted to steps of two and four GPUs ([planning.md](planning.md))."


def planned(row: dict[str, Any]) -> tuple[str, str]:
    """(tokens a second, GiB a GPU) by today's plan."""
    factors: dict[str, Any] = {}
    if row["mesh"] != "one process":
        factors = {name: int(size) for name, size in map(str.split, row["mesh"].split(", "))}
    layout = Layout(**factors)
    shape = measure(ModelConfig.named(row["size"]), row["seq_len"])
    speed, _ = find_speed(shape, layout, GPUS["h100"], row["rows"], row["seq_len"])
    memory = find_memory(shape, layout, row["rows"], row["seq_len"])
    return f"{speed:,.0f}", f"{memory.allocated / 2**30:.2f}"


def two(result: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    alone: dict[int, int] = {}
    for row in result["rows"]:
        if "tokens_per_second" not in row:
            continue
        alone.setdefault(row["seq_len"], row["tokens_per_second"])
        rows.append([
            row["mesh"], f"{row['rows']} × {row['seq_len']:,}", f"{row['tokens_per_second']:,}",
            f"{row['tokens_per_second'] / alone[row['seq_len']]:.2f}", planned(row)[0],
            f"{row['peak_bytes'] / 2**30:.2f}", planned(row)[1],
        ])  # fmt: skip
    spread = max(max(row["times_ms"]) / min(row["times_ms"]) for row in result["rows"] if "times_ms" in row)
    head = ["mesh", "rows a data rank × tokens", "tokens/s", "of one process", "planned", "GiB a GPU", "planned"]
    profile = newest("meshes_profile", "h100x2")
    exact, off = newest("meshes_errors", "h100x2"), ""
    if exact:
        found = [row for row in exact["rows"] if "off" in row]
        ratio = max(row["off"] / max(row["one_process_off"], 2**-9) for row in found)
        apart = max(row["float32_off"] for row in found if "float32_off" in row)
        off = (
            f"Gradients of four layers of 45m, {len(found)} times a model, a mesh and a way (compiled, recomputed): in bf16 off by at most {ratio:.2f} times "
            f"what one process in bf16 is off by, in float32 by at most {apart:.1e} ({link(exact, 'result')}; "
            f"{len(exact['rows']) - len(found)} failed). {exact.get('note', '')}\n\n"
        )
    return (f"## Two GPUs\n\n{off}Training steps of {result['rows'][0]['size']}, bf16, compiled, AdamW; all-reduce {result['all_reduce_gb_per_second']:.0f} GB/s a GPU, "
            f"bf16 matmul {result['matmul_tflop_per_second']:.0f} TFLOP/s. Medians of 8 steps, of which the slowest takes up to {spread:.1f} times "
            f"the fastest on several GPUs: a GPU has half the tokens under `context` and half of every product under `tensor`. "
            f"Both are for models and rows that do not fit; where they do, `shard` and `replicate` are faster. {FITTED}\n\n"
            f"{table(head, rows)}\n\n{source(result)}\n{profiles(profile) if profile else ''}")  # fmt: skip


def four(result: dict[str, Any]) -> str:
    """Meshes of four GPUs, plain and recorded: 385m, and 7b from several runs."""
    more = (newest(f"meshes_7b{name}", "h100x4") for name in ("", "_alone", "_graph", "_c", "_d", "_tensor"))
    runs = dict(zip("abcdefg", [result, *filter(None, more)], strict=False))
    rows: list[list[str]] = []
    for run, each in runs.items():
        for row in each["rows"]:
            times, peak = row["times_ms"], row.get("peak_bytes")
            rows.append([
                run, row["size"], row["mesh"], "yes" if row.get("graph") else "", f"{row['tokens_per_second']:,}", planned(row)[0],
                f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})", f"{row['profile']['computing_ms']:.0f}",
                f"{peak / 2**30:.1f}" if peak else "", planned(row)[1] if peak else "",
            ])  # fmt: skip
    head = ["run", "size", "mesh", "recorded", "tokens/s", "planned", "a step, ms", "the GPU computes", "GiB a GPU", "planned"]  # fmt: skip
    errors = [each for each in (newest("meshes_errors", "h100x4"), newest("meshes_graph_errors", "h100x4")) if each]
    off = [row for each in errors for row in each["rows"]]
    worst = max(row["off"] / max(row["one_process_off"], 2**-9) for row in off)
    files = " and ".join(link(each, name) for name, each in zip(("plain", "recorded"), errors, strict=True))
    reserved = {bool(row.get("graph")): row["reserved_bytes"] / 2**30 for row in runs["f"]["rows"]}
    return (
        f"## Four GPUs\n\nIn bf16 the gradients of {len(off)} steps (two factors at once, four ranks of one; compiled, recomputed, recorded) are off by at most "
        f"{worst:.2f} times what one process is off by ({files}).\n\nTraining steps as above, 385m with rows of 16 × 2,048 and 7b of 4 × 2,048 a data rank. "
        f"*Recorded* is `train.graph`: the passes are one CUDA graph, so the host queues nothing in them. What `tensor` and `context` lose without it is the host's: "
        f"a GPU computes as long either way. In run b meshes followed one another in the same processes; `shard 4`, which fills the GPU, was faster in "
        f"processes of its own (c). Runs e, f and g were on machines with a slower host. A recorded step reserves what a plain one does: {reserved[True]:.1f} GiB for "
        f"{reserved[False]:.1f} in f. {million()}{FITTED}\n\n{table(head, rows)}\n\n{source(result)} The other runs: "
        f"{', '.join(f'{run} {link(each)}' for run, each in runs.items() if run != 'a')}.\n{the_host()}"
    )  # fmt: skip


def million() -> str:
    result = newest("meshes_million", "h100x4")
    if result is None:
        return ""
    (row,) = result["rows"]
    return (
        f"One row of {row['seq_len']:,} tokens over all four (385m, `{row['mesh']}`, recomputed) trains at {row['tokens_per_second']:,} tokens/s in "
        f"{row['peak_bytes'] / 2**30:.1f} GiB a GPU ({link(result, 'result')}). "
    )


def the_host() -> str:
    result = newest("host", "h100")
    if result is None:
        return ""
    parts = ("forward", "backward", "clip", "optimizer", "whole")
    rows = [
        [row["mesh"] if row["mesh"] == "one" else f"{row['mesh']} 2", *(f"{row[part]:.1f}" for part in parts)]
        for row in result["rows"]
    ]
    head = ["mesh", *parts[:-1], "until the GPU is done"]
    return (
        f"\nWhat the host needs to queue a step of 385m, in ms, with 512 tokens and other processes that are only pretended. "
        f"Real ones take longer, by NCCL's calls and by waiting for the slowest of them: two GPUs, above.\n\n{table(head, rows)}\n\n{source(result)}\n"
    )  # fmt: skip


def profiles(result: dict[str, Any]) -> str:
    found = [row for row in result["rows"] if "profile" in row]
    rows = [
        [row["mesh"], f"{statistics.median(row['times_ms']):.0f}",
         *(f"{row['profile'][f'{what}_ms']:.0f}" for what in ("whole", "queued", "computing", "busy")),
         f"{row['profile']['launches']:,}"]
        for row in found
    ]  # fmt: skip
    queued = ", ".join(
        f"{row['profile']['queued_ms'] / statistics.median(row['times_ms']):.0%} of the median step with {row['mesh']}"
        for row in found if not row["mesh"].startswith(("shard", "replicate"))
    )  # fmt: skip
    shape = found[0]
    head = ["mesh", "median step, ms", "one step", "queued after", "under the profiler: the GPU computes", "computes or communicates",
            "launches"]  # fmt: skip
    return (
        f"\nWhere a step of {shape['size']}, {shape['rows']} × {shape['seq_len']:,}, goes, of the first GPU. A kernel of NCCL also waits for the other GPU, and the profiler "
        f"slows the host. To queue one step took the host {queued}; under `tensor` and `context` it is the limit, as recorded steps show (four GPUs, below).\n\n{table(head, rows)}\n\n{source(result)}\n"
    )
