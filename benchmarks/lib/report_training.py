"""What the report says of training and decoding: one function a section, which gives its picture
and its values."""

from __future__ import annotations

import statistics
from typing import Any

from matplotlib.figure import Figure

from lib.pictures import bars, lines, panels
from lib.results import GIB, Result, every, link, newest, table

Values = dict[str, Any]
Compared = dict[tuple[str, int, str], tuple[Result, Result, Result]]
NAMES = {
    "transnormer": "TransNormerLLM",
    "llama": "LLaMA",
    "softmax": "softmax Transformer",
    "retnet": "RetNet",
}
OPTIMIZERS = {"bfloat16": "AdamW", "adamw": "AdamW", "muon": "Muon", "8 bits": "AdamW, 8 bits"}
KINDS = {  # of kernels, by what their names hold; the first kind that fits is a kernel's
    "swish, gate and norm around attention": (
        "swish_kernel",
        "norm_kernel",
        "norm_backward_kernel",
        "lrpe",
        "layer_norm_gated",
    ),
    "matrix products": ("nvjet", "splitKreduce"),
    "attention": ("backward_kernel", "forward_kernel", "sdpa", "cudnn", "chunk_"),
    "optimizer and clipping": ("multi_tensor",),
    "softmax of the loss": ("softmax_loss", "liger", "cross_entropy"),
    "element-wise": ("triton_", "elementwise", "CUDAFunctor", "layer_norm", "swiglu", "rotary"),
}


def compared() -> Compared:
    """The newest (row, our row of the same run, result) by size, length and model."""
    others = [
        each for subject in ("train_long", "train_retnet", "train_1b") for each in every(subject)
    ]
    found = {}
    for result in sorted([newest("train"), *others], key=lambda each: each["date"]):
        rows = [
            row for row in result["rows"] if row["model"] in NAMES and "tokens_per_second" in row
        ]
        ours = {
            (row.get("run"), row["size"], row["seq_len"]): row
            for row in rows
            if row["model"] == "transnormer"
        }
        for row in rows:
            if beside := ours.get((row.get("run"), row["size"], row["seq_len"])):
                found[row["size"], row["seq_len"], row["model"]] = (row, beside, result)
    return found


def times_faster(found: Compared, size: str, length: int) -> dict[str, float]:
    """Our tokens per second over those of every other model, each in its own run."""
    over = {}
    for model in list(NAMES)[1:]:
        if (size, length, model) in found:
            theirs, beside, _ = found[size, length, model]
            over[model] = beside["tokens_per_second"] / theirs["tokens_per_second"]
    return over


def training_row(found: Compared, size: str, length: int, over: dict[str, float]) -> list[str]:
    """One size at one length, as a row of the table."""
    ours, _, result = found[size, length, "transnormer"]
    both = [found[size, length, model][0] for model in ("transnormer", "llama")]
    energy = [row["millijoules_per_token"] for row in both]
    return [
        size,
        f"{ours['rows']} × {length:,}",
        f"{ours['tokens_per_second']:,}",
        *(f"{over[model]:.2f}" if model in over else "–" for model in list(NAMES)[1:]),
        f"{ours['flop_share']:.0%}",
        *(f"{row['peak_bytes'] / GIB:.1f}" for row in both),
        *(f"{joules:.1f}" if joules else "–" for joules in energy),
        f"{result['date']}",
    ]


def all_ratios(runs: list[Result], commit: str, length: int) -> dict[str, str]:
    """Our tokens per second over LLaMA's at 385m, in all runs: those of a commit (now), and those
    before it."""
    ratios: dict[bool, list[float]] = {True: [], False: []}  # at this commit, and before it
    for each in (*runs, *every("train_profile"), *every("train_graph")):
        speed = {
            row["model"]: row.get("tokens_per_second")
            for row in each["rows"]
            if (row["size"], row["seq_len"]) == ("385m", length)
        }
        if speed.get("llama"):
            ratios[each["commit"] == commit].append(speed["transnormer"] / speed["llama"])
    return {
        name: ", ".join(f"{ratio:.2f}" for ratio in sorted(ratios[which]))
        for name, which in (("now", True), ("before", False))
    }


def training() -> tuple[Figure, Values]:
    found = compared()
    shapes = sorted(
        {key[:2] for key in found},
        key=lambda shape: (found[*shape, "transnormer"][0]["parameters"], shape[1]),
    )
    lengths = sorted({length for _, length in shapes})
    values: Values = {"least": lengths[0], "most": lengths[-1]}
    rows = []
    for size, length in shapes:
        over = times_faster(found, size, length)
        where = {lengths[0]: "least", lengths[-1]: "most"}.get(length)
        values |= {f"{size} {where} {model}": ratio for model, ratio in over.items()}
        rows.append(training_row(found, size, length, over))
    head = [
        "size",
        "rows × tokens",
        "tokens/s",
        *(f"÷ {name}" for name in list(NAMES.values())[1:]),
        "of the ceiling",
        "GiB",
        "LLaMA's GiB",
        "mJ a token",
        "LLaMA's mJ",
        "measured",
    ]
    sizes = list(dict.fromkeys(size for size, _ in shapes))
    figure, axes = panels(len(sizes))
    for axis, size in zip(axes, sizes, strict=True):
        series = {
            name: [
                (length, found[size, length, model][0]["tokens_per_second"])
                for length in lengths
                if (size, length, model) in found
            ]
            for model, name in NAMES.items()
        }
        lines(axis, series, "tokens in a row", "tokens per second", size)
    sources = {result["name"]: result for _, _, result in found.values()}
    commit = found["385m", lengths[0], "transnormer"][2]["commit"]
    said = all_ratios([*sources.values()], commit, lengths[0])
    return figure, values | said | {"table": table(head, rows), "runs": sources.values()}


def long_rows() -> tuple[Figure, Values]:
    """Rows that are read in parts: twice on one GPU, or over the ranks of a mesh."""
    result, four = newest("train"), newest("meshes_million", "h100x4")
    rows = [(row, "1, in segments") for row in result["rows"] if "segments" in row["model"]]
    rows += [(row, f"4, {row['mesh']}") for row in four["rows"]]
    labels = [f"{row['seq_len']:,} tokens, GPUs: {gpus}" for row, gpus in rows]
    figure, axes = panels(2, 5.5, 2.2)
    bars(axes[0], labels, {"": [row["tokens_per_second"] for row, _ in rows]}, "tokens per second")
    bars(
        axes[1],
        [""] * len(rows),
        {"": [row["peak_bytes"] / GIB for row, _ in rows]},
        "peak GiB a GPU",
        form=".1f",
    )
    lines_of = [
        [
            f"{row['seq_len']:,}",
            gpus,
            f"{row['tokens_per_second']:,}",
            f"{row['peak_bytes'] / GIB:.1f}",
            each["date"],
        ]
        for (row, gpus), each in zip(rows, [result] * (len(rows) - 1) + [four], strict=True)
    ]
    (short, _), (long, _), *_ = rows
    return figure, {
        "table": table(
            ["tokens in the row", "GPUs", "tokens/s", "GiB a GPU", "measured"], lines_of
        ),
        "longer": long["seq_len"] / short["seq_len"],
        "rate": long["tokens_per_second"] / short["tokens_per_second"],
        "memory": long["peak_bytes"] / short["peak_bytes"],
        "runs": [result, four],
    }


def steps() -> tuple[Figure, Values]:
    """Where the time of a step goes, by kind of kernel."""
    sources = [newest("train_profile"), *every("train_1b")]
    found = {
        (row["size"], row["model"]): row
        for each in sources
        for row in each["rows"]
        if "profile" in row and row["model"] in NAMES
    }
    found = {
        key: found[key]
        for key in sorted(found, key=lambda key: (key[0] != "385m", list(NAMES).index(key[1])))
    }
    parts: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "other")}
    for row in found.values():
        spent = dict.fromkeys(KINDS, 0.0)
        for kernel, _, ms in row["profile"]["kernels"]:
            if kind := next(
                (kind for kind, marks in KINDS.items() if any(mark in kernel for mark in marks)),
                None,
            ):
                spent[kind] += ms
        for kind, ms in spent.items():
            parts[kind].append(ms)
        parts["other"].append(row["profile"]["busy_ms"] - sum(spent.values()))
    labels = [f"{size}, {NAMES[model]}" for size, model in found]
    figure, (axis,) = panels(1, 10, 3.4)
    bars(axis, labels, parts, "ms of GPU time in one step", stacked=True)
    kinds = [[kind, *(f"{ms:.1f}" for ms in parts[kind])] for kind in parts]
    whole = [
        [name, *(f"{row['profile'][key]:,.1f}" for row in found.values())]
        for name, key in (
            ("the GPU is busy", "busy_ms"),
            ("the whole step", "whole_ms"),
            ("the host has queued it after", "queued_ms"),
        )
    ]
    whole.append(
        ["kernels launched", *(f"{row['profile']['launches']:,}" for row in found.values())]
    )
    at = list(found)
    ours, llama = at.index(("385m", "transnormer")), at.index(("385m", "llama"))
    return figure, {
        "table": table(["ms", *labels], kinds + whole),
        "rows": found[at[0]]["rows"],
        "tokens": found[at[0]]["seq_len"],
        "runs": sources,
        **{
            f"{kind} {name}": parts[kind][place]
            for kind in parts
            for name, place in (("ours", ours), ("llama", llama))
        },
    }


def graph() -> tuple[Figure, Values]:
    """Both passes as one CUDA graph, on one GPU."""
    result = newest("train_graph")
    speed = {(row["size"], row["model"]): row["tokens_per_second"] for row in result["rows"]}
    rows, labels, values = [], [], {}
    plain, recorded = [], []
    for size in dict.fromkeys(size for size, _ in speed):
        for model in ("transnormer", "softmax"):
            plain.append(speed[size, model])
            recorded.append(speed[size, f"{model}, one graph"])
            labels.append(f"{size}, {NAMES[model]}")
            values[f"{size} {model}"] = recorded[-1] / plain[-1]
            rows.append(
                [
                    size,
                    NAMES[model],
                    f"{plain[-1]:,}",
                    f"{recorded[-1]:,}",
                    f"{recorded[-1] / plain[-1]:.2f}",
                    f"{recorded[-1] / speed[size, 'llama']:.2f}",
                ]
            )
    figure, (axis,) = panels(1, 8, 2.8)
    bars(axis, labels, {"queued by the host": plain, "replayed": recorded}, "tokens per second")
    head = ["size", "model", "tokens/s", "recorded", "recorded ÷ plain", "recorded ÷ LLaMA"]
    return figure, values | {"table": table(head, rows), "runs": [result]}


def float8() -> tuple[Figure, Values]:
    """Each row beside bfloat16 of the same run, and the losses of whole runs."""
    result, curves = newest("train_float8"), newest("curves")
    usual = {
        (row.get("run"), row["size"]): row
        for row in result["rows"]
        if row["model"] == "transnormer"
    }
    rows = []
    ratios: dict[str, list[float]] = {}
    for row in result["rows"]:
        if row["model"] != "transnormer":
            beside = usual[row.get("run"), row["size"]]
            scales = "rowwise" if "rows" in row["model"] else "tensorwise"
            ratio = row["tokens_per_second"] / beside["tokens_per_second"]
            ratios.setdefault(f"{row['size']} {scales}", []).append(ratio)
            rows.append(
                [
                    row["size"],
                    scales,
                    f"{row['tokens_per_second']:,}",
                    f"{beside['tokens_per_second']:,}",
                    f"{ratio:.2f}",
                    *(f"{each['peak_bytes'] / GIB:.1f}" for each in (row, beside)),
                    *(f"{each['millijoules_per_token']:.1f}" for each in (row, beside)),
                ]
            )
    head = [
        "size",
        "scales",
        "tokens/s",
        "bfloat16's",
        "ratio",
        "GiB",
        "bfloat16's",
        "mJ a token",
        "bfloat16's",
    ]
    shape = result["rows"][0]
    return apart(curves, ("bfloat16", "float8"), "bfloat16", {}), {
        "table": table(head, sorted(rows)),
        "runs": [result, curves],
        "rows": shape["rows"],
        "tokens": shape["seq_len"],
        "steps": curves["steps"],
        "size": curves["size"],
        "ends": ends(curves, "bfloat16", "float8"),
        **{
            key: " and ".join(f"{ratio:.2f}" for ratio in sorted(found))
            for key, found in ratios.items()
        },
    }


def ends(curves: Result, *variants: str) -> str:
    return ", ".join(
        f"{row['variant']} (seed {row['seed']}) {row['valid'][-1][1]:.3f}"
        for row in curves["rows"]
        if row["variant"].startswith(variants)
    )


def apart(curves: Result, variants: tuple[str, ...], base: str, names: dict[str, str]) -> Figure:
    """The curves, and how far each is from the first one, among which another seed shows what
    chance does."""
    figure, axes = panels(2, 5.2)
    found = [row for row in curves["rows"] if row["variant"].startswith(variants)]
    first = dict(next(row for row in found if row["variant"] == base)["valid"])
    curve, off = {}, {}
    for row in found:
        label = f"{names.get(row['variant'], row['variant'])}, seed {row['seed']}"
        curve[label] = row["valid"]
        off[label] = [(step, loss - first[step]) for step, loss in row["valid"]]
    lines(axes[0], curve, "step", "validation loss, nats a token", lengths=False)
    lines(axes[1], off, "step", f"difference from {names.get(base, base)}, seed 0", lengths=False)
    axes[1].get_legend().remove()  # type: ignore[union-attr]
    return figure


def optimizers() -> tuple[Figure, Values]:
    curves, steps, small, eight = (
        newest("curves"),
        newest("train_muon"),
        newest("optim", "cpu"),
        newest("train_1b"),
    )
    rows = [
        [
            OPTIMIZERS[row["variant"]],
            str(row["seed"]),
            f"{row['valid'][-1][1]:.3f}",
            f"{row['tokens_per_second']:,.0f}",
        ]
        for row in curves["rows"]
        if not row["variant"].startswith("float8")
    ]
    ms = [statistics.median(row["times_ms"]) for row in steps["rows"][:2]]
    of = {
        row["model"]: row
        for row in eight["rows"]
        if "8 bits" in row["model"] or row["model"] == "transnormer"
    }
    plain, bits = of["transnormer"], of["transnormer, 8 bits"]
    return apart(curves, ("bfloat16", "muon", "8 bits"), "bfloat16", OPTIMIZERS), {
        "table": table(
            ["optimizer", "seed", "validation loss at the end", "tokens/s of the loop"], rows
        ),
        "size": curves["size"],
        "steps": curves["steps"],
        "batch": curves["batch_tokens"],
        "muon_ms": ms[1] - ms[0],
        "adamw_rate": steps["rows"][0]["tokens_per_second"],
        "muon_rate": steps["rows"][1]["tokens_per_second"],
        "bits_size": bits["size"],
        "bits_rate": bits["tokens_per_second"],
        "bits_gib": bits["peak_bytes"] / GIB,
        "plain_rate": plain["tokens_per_second"],
        "plain_gib": plain["peak_bytes"] / GIB,
        "small": " and ".join(
            f"{row['mean']:.3f} ± {row['deviation']:.3f} with {OPTIMIZERS[row['name']]}"
            for row in small["summary"]
        ),
        "runs": [curves, steps, small, eight],
    }


def decoding() -> tuple[Figure, Values]:
    result, step = newest("inference", "cpu"), newest("ops")["others"][0]
    names = {"transnormer": "TransNormerLLM", "transformer": "softmax Transformer"}
    figure, axes = panels(2)
    for axis, of, label in (
        (axes[0], lambda row: row["token_ms"], "ms a token"),
        (axes[1], lambda row: row["state_bytes"] / 2**20, "state, MiB a sequence"),
    ):
        series = {
            name: [
                (row["context_tokens"], of(row)) for row in result["rows"] if row["model"] == model
            ]
            for model, name in names.items()
        }
        lines(axis, series, "tokens read before", label)
    rows = [
        [
            names[row["model"]],
            f"{row['context_tokens']:,}",
            f"{row['token_ms']:.2f}",
            f"{row['state_bytes'] / 2**20:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
        ]
        for row in result["rows"]
    ]
    head = ["model", "tokens read before", "ms a token", "state, MiB", "peak of a token, MiB"]
    own = [row for row in result["rows"] if row["model"] == "transnormer"]
    return figure, {
        "table": table(head, rows),
        "first": own[0],
        "last": own[-1],
        "theirs": result["rows"][-1],
        "step": step,
        "import": result["import_transnormer_s"],
        "import_torch": result["import_torch_s"],
        "runs": [result, newest("ops")],
    }


def training_cpu() -> tuple[Figure, Values]:
    result = newest("train", "cpu")
    pairs = list(zip(result["rows"][::2], result["rows"][1::2], strict=True))
    rows = [
        [
            f"{ours['seq_len']:,}",
            ours["dtype"],
            f"{ours['tokens_per_second']:,.0f}",
            f"{theirs['tokens_per_second']:,.0f}",
            f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}",
            f"{ours['flop_share']:.0%}",
            f"{theirs['flop_share']:.0%}",
        ]
        for ours, theirs in pairs
    ]
    figure, (axis,) = panels(1, 8, 2.8)
    labels = [f"{ours['seq_len']:,} tokens, {ours['dtype']}" for ours, _ in pairs]
    series = {
        name: [pair[n]["tokens_per_second"] for pair in pairs]
        for n, name in enumerate(("TransNormerLLM", "softmax Transformer"))
    }
    bars(axis, labels, series, "tokens per second")
    head = [
        "tokens in a row",
        "dtype",
        "tokens/s",
        "Transformer's",
        "ratio",
        "of the ceiling",
        "Transformer's",
    ]
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    return figure, {
        "table": table(head, rows),
        "runs": [result],
        "size": result["rows"][0]["size"],
        "least": min(ratios),
        "most": max(ratios),
        "ceilings": " and ".join(
            f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in result["matmul_flops"].items()
        ),
    }


def sources(runs: list[Result]) -> str:
    return "Runs: " + ", ".join(link(each) for each in runs) + "."
