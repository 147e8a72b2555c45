"""What the report says of the ops: one function a section, which gives its picture and its
values."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from lib.pictures import bars, lines, panels
from lib.report_training import Values
from lib.results import GIB, Result, newest, pair, table


def attention_cells(
    found: dict[tuple[Any, ...], Result], names: list[str], shapes: list[tuple[Any, ...]]
) -> tuple[list[list[str]], list[list[str]]]:
    """The cells of two tables, of time and of memory: a shape a row, a contender a column. found:
    rows of the result by contender and shape."""
    rows: list[list[str]] = []
    memory: list[list[str]] = []
    for shape in shapes:
        ours = found["ours", *shape]
        label = ", ".join(f"{n:,}" for n in shape)
        of = [found.get((name, *shape), {}) for name in names]
        rows.append(
            [
                label,
                pair(ours, "floor_forward_ms", "floor_both_ms"),
                f"{ours['forward_over_floor']:.2f} / {ours['both_over_floor']:.2f}",
                *(pair(row, "forward_ms", "both_ms") for row in of),
            ]
        )
        if "both_graph_ms" in ours:
            over = (
                ours[f"{kind}_graph_ms"] / ours[f"floor_{kind}_ms"] for kind in ("forward", "both")
            )
            rows.append(
                [
                    "the same, replayed",
                    "",
                    " / ".join(f"{x:.2f}" for x in over),
                    *(pair(row, "forward_graph_ms", "both_graph_ms") for row in of),
                ]
            )
        memory.append(
            [
                label,
                *(
                    f"{row['both_bytes'] / GIB:.2f} GiB, {row['both_joules']:.3g} J"
                    if "both_joules" in row
                    else f"{row['both_bytes'] / GIB:.2f} GiB"
                    if "both_bytes" in row
                    else "–"
                    for row in of
                ),
            ]
        )
    return rows, memory


def attention() -> tuple[Figure, Values]:
    result, limits = newest("ops"), newest("ops_profile")
    found = {(row["contender"], row["B"], row["H"], row["T"]): row for row in result["attention"]}
    names = list(dict.fromkeys(name for name, *_ in found))
    shapes = list(dict.fromkeys(tuple(shape) for _, *shape in found))
    rows, memory = attention_cells(found, names, shapes)
    figure, axes = panels(2, 5.2, 4)
    drawn = [shape for shape in shapes if shape[0] == 4]
    for axis, key, scale, label in (
        (axes[0], "both_ms", 1, "forward and backward, ms"),
        (axes[1], "both_bytes", GIB, "peak memory beyond the inputs, GiB"),
    ):
        series = {
            name: [
                (shape[2], found[name, *shape][key] / scale)
                for shape in drawn
                if key in found.get((name, *shape), {})
            ]
            for name in names
        }
        if axis is axes[0]:
            series["floor"] = [
                (shape[2], found["ours", *shape]["floor_both_ms"]) for shape in drawn
            ]
        lines(axis, series, "tokens (B = 4, H = 32, K = V = 128)", label, log=True)
    shape = drawn[-1]
    ours, soft, linear = (found[name, *shape] for name in ("ours", "SDPA cuDNN", "fla chunk"))
    return figure, {
        "table": table(["B, H, T", "floor", "ours ÷ floor", *names], rows),
        "T": shape[2],
        "floor": ours["both_over_floor"],
        "memory": table(["B, H, T", *names], memory),
        "softmax": soft["both_ms"] / ours["both_ms"],
        "linear": linear["both_ms"] / ours["both_ms"],
        "linear_memory": linear["both_bytes"] / ours["both_bytes"],
        "bandwidth": result["copy_tb_per_second"],
        "product": result["matmul_tflop_per_second"],
        "limits": limits,
        "runs": [result, limits, newest("ops_profile_long")],
    }


def lengths() -> tuple[Figure, Values]:
    result = newest("ops")
    rows = result["lengths"]
    names = list(rows[0]["contenders"])

    def ms(found: Result, kind: str) -> float:
        """By graph replay where that was measured: at short lengths the host takes longer than the
        GPU."""
        return float(found[f"{kind}_graph_ms" if f"{kind}_graph_ms" in found else f"{kind}_ms"])

    figure, axes = panels(2, 5)
    for axis, of, label in (
        (axes[0], lambda found: ms(found, "both"), "forward and backward, ms"),
        (axes[1], lambda found: found["both_bytes"] / GIB, "peak memory beyond the inputs, GiB"),
    ):
        series = {name: [(row["T"], of(row["contenders"][name])) for row in rows] for name in names}
        lines(axis, series, "tokens (B = 1, H = 32)", label, log=True)
    cells = [
        [
            f"{row['T']:,}",
            *(
                (
                    f"{ms(found, 'forward'):.3g} / {ms(found, 'both'):.3g}, "
                    f"{found['both_bytes'] / GIB:.3g} GiB"
                )
                for found in row["contenders"].values()
            ),
        ]
        for row in rows
    ]
    last = rows[-1]["contenders"]
    replayed = [row["T"] for row in rows if "both_graph_ms" in row["contenders"]["ours"]]
    slower = [
        row["T"]
        for row in rows
        if row["contenders"]["ours"]["both_ms"] >= row["contenders"]["left product"]["both_ms"]
    ]
    return figure, {
        "table": table(["T", *names], cells),
        "T": rows[-1]["T"],
        "replayed": replayed[-1],
        "runs": [result],
        "from": next(row["T"] for row in rows if row["T"] > max(slower, default=0)),
        **{
            name: ms(last[name], "both") / ms(last["ours"], "both")
            for name in ("left product", "plain")
        },
        "memory": last["plain"]["both_bytes"] / last["ours"]["both_bytes"],
    }


def gated() -> tuple[Figure, Values]:
    """The backward of Gated Linear Attention, whose gradients of q and k go on through the
    swish."""
    result = newest("ops_swish")
    of: dict[str, dict[str, Result]] = {}
    for row in result["rows"]:
        of.setdefault(f"{row['B']}, {row['T']:,}, {row['H']}", {})[row["variant"]] = row
    stages = {
        "base": "at first",
        "sig": "another sigmoid",
        "half": "and in halves",
        "halfpipe": "and pipelined",
        "desc": "and by descriptors",
    }
    figure, (axis,) = panels(1, 8, 3)
    series = {"without the swish": [at["base"]["without_swish_ms"] for at in of.values()]}
    series |= {
        name: [at[key]["with_swish_ms"] for at in of.values()]
        for key, name in stages.items()
        if key in ("base", "halfpipe", "desc")
    }
    bars(axis, list(of), series, "ms of the backward pass; B, T, H beside the bars", form=".2f")
    rows = [
        [
            shape,
            f"{at['base']['without_swish_ms']:.2f}",
            *(f"{at[key]['with_swish_ms']:.2f}" for key in stages),
        ]
        for shape, at in of.items()
    ]
    first = next(iter(of))
    return figure, {
        "table": table(["B, T, H", "without the swish", *stages.values()], rows),
        "shape": first,
        "base": of[first]["base"],
        "now": of[first]["halfpipe"]["with_swish_ms"],
        "runs": [result, newest("ops_descriptors")],
    }


def fusions() -> tuple[Figure, Values]:
    result = newest("ops")
    rows = result["fusions"]
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    figure, (axis,) = panels(1, 8, 3.4)
    series = {"floor": [row["floor_both_ms"] for row in rows]}
    series |= {
        name: [row["contenders"].get(name, {}).get("both_graph_ms") for row in rows]
        for name in names
        if name != "eager"
    }
    bars(
        axis,
        [row["op"] for row in rows],
        series,
        "ms of forward and backward, replayed",
        form=".2f",
    )
    cells = [
        [
            row["op"],
            pair(row, "floor_forward_ms", "floor_both_ms"),
            *(
                f"{pair(found, 'forward_ms', 'both_ms')} ({found['both_graph_ms']:.3g})"
                if (found := row["contenders"].get(name))
                else "–"
                for name in names
            ),
        ]
        for row in rows
    ]
    over = [row["contenders"]["ours"]["both_graph_ms"] / row["floor_both_ms"] for row in rows]
    compiled = [
        row["contenders"]["compiled"]["both_graph_ms"] / row["contenders"]["ours"]["both_graph_ms"]
        for row in rows
    ]
    return figure, {
        "table": table(["op", "floor", *names], cells),
        "least": min(over),
        "most": max(over),
        "runs": [result],
        "compiled_least": min(compiled),
        "compiled_most": max(compiled),
    }


def losses() -> tuple[Figure, Values]:
    result = newest("ops")
    rows = result["losses"]
    vocab = rows[0]["vocab"]
    here = [row for row in rows if row["vocab"] == vocab]
    figure, axes = panels(2, 5, 3.2)
    names = [row["contender"] for row in here]
    bars(
        axes[0],
        names,
        {"": [row["both_ms"] for row in here]},
        f"ms, vocabulary {vocab:,}",
        form=".1f",
    )
    axes[0].axvline(here[0]["floor_ms"], color="black", linestyle=":")
    bars(axes[1], [""] * len(here), {"": [row["bytes"] / GIB for row in here]}, "GiB", form=".2f")
    cells = [
        [
            row["contender"],
            f"{row['vocab']:,}",
            f"{row['both_ms']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['bytes'] / GIB:.2f}",
            *(f"{row[key]:.1e}" for key in ("loss_error", "d_hidden_error", "d_head_error")),
        ]
        for row in rows
    ]
    head = [
        "loss",
        "vocabulary",
        "ms",
        "three products, ms",
        "GiB",
        "error of the loss",
        "of d hidden",
        "of d head",
    ]
    of = {row["contender"]: row for row in here}
    return figure, {
        "table": table(head, cells),
        "ours": of["ours"],
        "tokens": rows[0]["tokens"],
        "width": rows[0]["width"],
        "runs": [result],
        "over": of["ours"]["both_ms"] / of["ours"]["floor_ms"],
        "plain": of["plain"]["both_ms"] / of["ours"]["both_ms"],
        "memory": of["plain"]["bytes"] / of["ours"]["bytes"],
        "liger": of["Liger"]["both_ms"] / of["ours"]["both_ms"],
        "liger_memory": of["Liger"]["bytes"] / of["ours"]["bytes"],
        "vocab": vocab,
    }


def attention_cpu() -> tuple[Figure, Values]:
    result = newest("attention", "cpu")
    rows = result["rows"]
    names = {"plain": "plain, T × T", "chunked": "Lightning Attention, in chunks"}
    figure, axes = panels(2)
    for axis, key, scale, label in (
        (axes[0], "ms", 1, "forward and backward, ms"),
        (axes[1], "bytes", 2**20, "peak memory, MiB"),
    ):
        series = {
            label: [(row["seq_len"], row[f"{name}_{key}"] / scale) for row in rows]
            for name, label in names.items()
        }
        lines(axis, series, "tokens", label, log=True)
    cells = [
        [
            f"{row['seq_len']:,}",
            f"{row['plain_ms']:,.1f}",
            f"{row['chunked_ms']:,.1f}",
            f"{row['plain_ms'] / row['chunked_ms']:.1f}",
            f"{row['plain_bytes'] / 2**20:,.1f}",
            f"{row['chunked_bytes'] / 2**20:,.1f}",
        ]
        for row in rows
    ]
    head = ["tokens", "plain, ms", "chunked, ms", "plain ÷ chunked", "plain, MiB", "chunked, MiB"]
    return figure, {
        "table": table(head, cells),
        "one": rows[0],
        "T": rows[-1]["seq_len"],
        "runs": [result],
        "time": rows[-1]["plain_ms"] / rows[-1]["chunked_ms"],
        "memory": rows[-1]["plain_bytes"] / rows[-1]["chunked_bytes"],
    }


def tiles() -> Figure:
    """The sweep of chunk and tile sizes, and the bytes that the backward spills."""
    result = newest("ops_sweep")
    rows = [
        row
        for row in result["sweep"]
        if all(isinstance(row.get(f"{kind}_ms"), float) for kind in ("forward", "backward"))
    ]
    labels = []
    for row in rows:
        chunk, width, warps, stages, described = row["tiles"]
        spilled = (
            row["resources"].get("backward", (0, 0))[1]
            if isinstance(row.get("resources"), dict)
            else 0
        )
        described = ", descriptors" if described else ""
        labels.append(
            f"{chunk} × {width}, {warps} warps, {stages} stages{described}; {spilled} spilled"
        )
    figure, (axis,) = panels(1, 9, 0.34 * len(rows) + 1.2)
    series = {kind: [row[f"{kind}_ms"] for row in rows] for kind in ("forward", "backward")}
    bars(
        axis,
        labels,
        series,
        f"ms, B = {rows[0]['B']}, H = {rows[0]['H']}, T = {rows[0]['T']:,}",
        form=".2f",
    )
    return figure


def checks() -> tuple[None, Values]:
    """What was compared with float64 or with one process, and how far off the worst of it was."""
    check, memory = newest("ops_check"), newest("ops_memcheck")
    right = [row for row in check["check"] if row["right"]]
    rows = [
        [
            "configurations of the attention kernels",
            f"{len(check['check']):,}",
            f"{len(right):,} right",
            f"{max(row['error_over_plain'] for row in right):.2f} × plain torch's error",
        ],
        [
            "the same under compute-sanitizer's memcheck",
            f"{memory['configurations']:,}",
            f"{memory['right']:,} right",
            f"{memory['errors']} errors",
        ],
    ]
    runs = [check, memory]
    for subject, device, what in (
        ("meshes_errors", "h100x2", "gradients on two GPUs"),
        ("meshes_errors", "h100x4", "gradients on four GPUs"),
        ("meshes_graph_errors", "h100x4", "gradients of recorded steps on four GPUs"),
    ):
        result = newest(subject, device)
        found = [row for row in result["rows"] if "off" in row]
        worst = max(row["off"] / max(row["one_process_off"], 2**-9) for row in found)
        exact = [row["float32_off"] for row in found if "float32_off" in row]
        rows.append(
            [
                f"{what}, bfloat16",
                f"{len(found):,}",
                f"{len(result['rows']) - len(found)} failed",
                (
                    f"{worst:.2f} × one process' "
                    f"error{f'; in float32 by {max(exact):.1e}' if exact else ''}"
                ),
            ]
        )
        runs.append(result)
    return None, {
        "table": table(["what", "cases", "outcome", "off by at most"], rows),
        "runs": runs,
    }
