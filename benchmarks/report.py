"""docs/performance.md and its pictures, from the newest result of each subject and device in benchmarks/results."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from record import RESULTS, every, link, newest, source, table
from report_meshes import four, two

DOCS = RESULTS.parent.parent / "docs"


def training(result: dict[str, Any]) -> str:
    pairs = zip(result["rows"][::2], result["rows"][1::2], strict=True)
    rows = [
        [f"{ours['seq_len']:,}", ours["dtype"], f"{ours['tokens_per_second']:,.0f}", f"{theirs['tokens_per_second']:,.0f}",
         f"{ours['over_transformer']:.2f}", f"{ours['flop_share']:.0%}", f"{theirs['flop_share']:.0%}"]
        for ours, theirs in pairs
    ]  # fmt: skip
    ceilings = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in result["matmul_flops"].items())
    head = ["T", "dtype", "TransNormerLLM", "Transformer", "ratio", "share of the ceiling", "Transformer's"]
    size = result["rows"][0]["size"]
    return (f"## Training on a CPU\n\nTokens per second, size {size}, the same width and depth (softmax attention through "
            f"PyTorch's SDPA, {result['rows'][1]['parameters']:,} parameters; ours {result['rows'][0]['parameters']:,}). "
            f"The ceiling is a square matrix product: {ceilings}.\n\n{table(head, rows)}\n\n{source(result)}\n")  # fmt: skip


NAMES = {
    "transnormer": "TransNormerLLM", "llama": "LLaMA (transformers)", "softmax": "our softmax Transformer",
    "retnet": "RetNet (fla)",
}  # fmt: skip


def training_gpu(result: dict[str, Any]) -> str:
    others = [each for subject in ("train_long", "train_retnet", "train_1b") for each in every(subject, "h100")]
    sources = sorted([result, *others], key=lambda each: each["date"])
    found = [row for each in sources for row in each["rows"] if "tokens_per_second" in row]
    beside: dict[int, dict[str, Any]] = {}  # of a row: ours of the same run
    for each in sources:
        of = {
            (row.get("run"), row["size"], row["seq_len"]): row for row in each["rows"] if row["model"] == "transnormer"
        }
        for row in each["rows"]:
            if ours := of.get((row.get("run"), row["size"], row["seq_len"])):
                beside[id(row)] = ours
    latest = {(row["size"], row["seq_len"], row["model"]): row for row in found if row["model"] in NAMES}
    eights = {(row["size"], row["seq_len"]): row for row in found if row["model"] == "transnormer, 8 bits"}
    order = list(dict.fromkeys(row["size"] for row in found))
    usual = sorted(latest.values(), key=lambda row: (order.index(row["size"]), row["seq_len"]))
    speed = {(row["size"], row["seq_len"], row["model"]): row["tokens_per_second"] for row in usual}
    rows = []
    for row in usual:
        ours = beside[id(row)]["tokens_per_second"]
        rows.append([
            row["size"], f"{row['rows']} × {row['seq_len']:,}", NAMES[row["model"]], f"{row['parameters'] / 1e6:,.1f}",
            f"{row['tokens_per_second']:,}", "" if row["model"] == "transnormer" else f"{ours / row['tokens_per_second']:.2f}",
            f"{row['flop_share']:.0%}" if row["flop_share"] else "–", f"{row['peak_bytes'] / 2**30:.1f}", f"{row['millijoules_per_token']:.1f}" if row["millijoules_per_token"] else "–",
            f"{row['first_step_seconds']:.0f}",
        ])  # fmt: skip
    head = ["size", "B × T", "model", "M parameters", "tokens/s", "ours is times faster", "share of the ceiling", "peak, GiB",
            "mJ a token", "first step, s"]  # fmt: skip
    sizes = list(dict.fromkeys(row["size"] for row in usual))
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(4.5 * len(sizes), 3.5), dpi=120, layout="constrained", squeeze=False
    )
    for axis, size in zip(axes[0], sizes, strict=True):
        for model, label in NAMES.items():
            points = [(length, rate) for (of, length, name), rate in speed.items() if (of, name) == (size, model)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=size, xlabel="tokens a row", ylabel="tokens per second", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({length for of, length, _ in speed if of == size}), minor=False)
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(DOCS / "training.png")
    plt.close(figure)
    long = {row["seq_len"]: row for row in found if "segments" in row["model"]}
    million = ""
    if len(long) == 2:
        (_, short_row), (tokens, row) = sorted(long.items())
        million = (
            f"One row of {tokens:,} tokens trains in {row['peak_bytes'] / 2**30:.1f} GiB at {row['tokens_per_second']:,} tokens/s "
            f"(`train/segments.py`: exact gradients, segments of 32,768 read twice); a row of {short_row['seq_len']:,}, read "
            f"twice too, at {short_row['tokens_per_second']:,}.\n\n"
        )
    notes = dict.fromkeys(
        f"{NAMES[row['model']]}, {row['size']}: {row['note']}. " for row in usual if row["model"] != "transnormer"
    )
    ceiling = {id(row): each["matmul_tflop_per_second"] for each in sources for row in each["rows"]}
    cost = {
        (row["size"], row["model"]): row["flop_share"] * ceiling[id(row)] / row["tokens_per_second"] * 1e3
        for row in usual if row["seq_len"] == 2_048 and row["flop_share"]
    }  # fmt: skip
    costs = "; ".join(
        f"{size} {cost[size, 'transnormer']:.2f} GFLOP, the LLaMA's {cost[size, 'llama']:.2f}, our softmax Transformer's "
        f"{cost[size, 'softmax']:.2f}" for size in sizes
    )  # fmt: skip
    why = (
        f"At 2,048 tokens attention is a small part of either, so that operations a token are nearly the same ({costs}), and "
        f"our softmax Transformer of equal width, which has fewer parameters, keeps the matrix units as busy: there is little to win.\n\n"
    )
    commit = next(each["commit"] for each in sources if latest["385m", 2_048, "transnormer"] in each["rows"])
    told = (
        f"{source(each)} Ceiling {each['matmul_tflop_per_second']:,.0f} TFLOP/s. {each.get('note', '')}"
        for each in sources
    )
    eight = "".join(
        f"`optim.bits = 8` (bitsandbytes), {row['size']}, {row['rows']} × {row['seq_len']:,}: {row['tokens_per_second']:,} tokens/s in "
        f"{row['peak_bytes'] / 2**30:.1f} GiB; with 32 in the same run {beside[id(row)]['tokens_per_second']:,} in {beside[id(row)]['peak_bytes'] / 2**30:.1f}.\n\n"
        for row in eights.values()
    )
    return (
        f"## Training on a GPU\n\nA step is loss, backward, clip and AdamW on random ids; bf16 autocast over float32 weights, vocabulary "
        f"64,000, SDPA's cuDNN kernels, blocks compiled. Contenders have the GPU to themselves, one after another. The ceiling is a "
        f"square matrix product of the same run. Each row is the newest measured; *ours is times faster* compares it with ours of its own run.\n\n"
        f"{table(head, rows)}\n\n![training](training.png)\n\n{repeated(sources, commit)}{million}{eight}{why}"
        + "".join(notes)
        + "\n\n"
        + "\n\n".join(map(str.rstrip, told))
        + "\n"
    )


def repeated(sources: list[dict[str, Any]], commit: str) -> str:
    """Every run beside the LLaMA at 2,048 tokens, of this commit and before: one run does not settle the second digit."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for each in (*sources, *every("train_profile", "h100"), *every("train_graph", "h100")):
        speed = {
            row["model"]: row.get("tokens_per_second") for row in each["rows"]
            if (row["size"], row["seq_len"]) == ("385m", 2_048)
        }  # fmt: skip
        if speed.get("llama"):
            ratios[each["commit"] == commit].append(speed["transnormer"] / speed["llama"])
    now, before = (", ".join(f"{ratio:.2f}" for ratio in sorted(ratios[which])) for which in (True, False))
    return (
        f"385m, 16 × 2,048, in every run: {now} times the LLaMA; before the faster backward of attention {before}.\n\n"
    )


def training_graph(result: dict[str, Any]) -> str:
    """Both passes as one CUDA graph, on one GPU."""
    speed = {(row["size"], row["model"]): row["tokens_per_second"] for row in result["rows"]}
    rows = []
    for size in dict.fromkeys(size for size, _ in speed):
        for model in ("transnormer", "softmax"):
            plain, recorded = speed[size, model], speed[size, f"{model}, one graph"]
            rows.append([
                size, NAMES[model], f"{plain:,}", f"{recorded:,}", f"{recorded / plain:.2f}",
                f"{recorded / speed[size, 'llama']:.2f}",
            ])  # fmt: skip
    head = ["size", "model", "tokens/s", "recorded", "times", "recorded, times the LLaMA"]
    return (
        f"### One CUDA graph\n\n`train.graph` on one GPU, 16 × 2,048 tokens: it gains what the host loses, much where the model is small, nothing where "
        f"the GPU is busy anyway.\n\n{table(head, rows)}\n\n{source(result)}\n"
    )


def training_float8(result: dict[str, Any]) -> str:
    rows = []
    usual = {}
    for row in result["rows"]:
        if row["model"] == "transnormer":
            usual[row.get("run"), row["size"], row["seq_len"]] = row
    for row in result["rows"]:
        beside = usual[row.get("run"), row["size"], row["seq_len"]]
        if row is not beside:
            rows.append([
                row["size"], f"{row['rows']} × {row['seq_len']:,}", "rowwise" if "rows" in row["model"] else "tensorwise",
                f"{row['tokens_per_second']:,}", f"{beside['tokens_per_second']:,}",
                f"{row['tokens_per_second'] / beside['tokens_per_second']:.2f}",
                *(f"{each['peak_bytes'] / 2**30:.1f}" for each in (row, beside)),
                *(f"{each['millijoules_per_token']:.1f}" for each in (row, beside)),
            ])  # fmt: skip
    head = ["size", "B × T", "scales", "tokens/s", "bf16's", "times faster", "peak, GiB", "bf16's", "mJ a token",
            "bf16's"]  # fmt: skip
    text = (
        f"### Products in float8\n\n`train.float8`: the blocks' products by torchao, each row beside bfloat16 in the same run.\n\n"
        f"{table(head, sorted(rows))}\n\ntorchao {result['versions'].get('torchao', '')}; {source(result)}\n"
    )
    return text + (curves(found) if (found := newest("curves", "h100")) else "")


def curves(result: dict[str, Any]) -> str:
    figure, axis = plt.subplots(figsize=(6, 3.5), dpi=120, layout="constrained")
    for row in result["rows"]:
        axis.plot(
            *zip(*row["valid"], strict=True), marker="o", markersize=3, label=f"{row['variant']}, seed {row['seed']}"
        )
    axis.set(xlabel="step", ylabel="validation loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "curves.png")
    plt.close(figure)
    ends = ", ".join(
        f"{row['variant']}, seed {row['seed']}, {row['valid'][-1][1]:.3f} ({row['tokens_per_second']:,.0f} tokens/s)"
        for row in result["rows"]
    )
    return (
        f"\nThe loss of {result['size']} on real text ({', '.join(result['data'])}), {result['steps']} steps of {result['batch_tokens']:,} tokens, "
        f"with the same start and the same batches; validation loss at the end and the loop's median rate: {ends}. {result.get('note', '')}\n\n![curves](curves.png)\n\n{source(result)}\n"
    )


def training_profile(result: dict[str, Any]) -> str:
    """Where a step's time goes, by kind of kernel."""
    kinds = {
        "swish, gate, norm around attention": ("swish_kernel", "norm_kernel", "norm_backward_kernel", "lrpe", "layer_norm_gated"),
        "matrix products": ("nvjet", "splitKreduce"),
        "attention": ("backward_kernel", "forward_kernel", "sdpa", "cudnn", "chunk_"),
        "optimizer and clip": ("multi_tensor",), "soft-max of the loss": ("softmax_loss", "liger", "cross_entropy"),
        "element-wise": ("triton_", "elementwise", "CUDAFunctor", "layer_norm", "swiglu", "rotary"),
    }  # fmt: skip
    sources = [result, *every("train_1b", "h100")]
    columns: dict[str, list[str]] = {}
    for row in [row for each in sources for row in each["rows"] if "profile" in row and row["model"] in NAMES]:
        profile, of = row["profile"], dict.fromkeys(kinds, 0.0)
        for name, _, ms in profile["kernels"]:
            if kind := next((kind for kind in kinds if any(word in name for word in kinds[kind])), None):
                of[kind] += ms
        columns[f"{row['size']}, {NAMES[row['model']]}"] = [
            *(f"{ms:.1f}" for ms in of.values()), f"{profile['busy_ms'] - sum(of.values()):.1f}",
            *(f"{profile[f'{what}_ms']:.1f}" for what in ("busy", "whole", "queued")), f"{profile['launches']:,}",
        ]  # fmt: skip
    names = [*kinds, "other, and kernels too short to list", "the GPU is busy", "the step, waited for", "the host has queued it after", "launches"]  # fmt: skip
    rows = [[name, *(column[n] for column in columns.values())] for n, name in enumerate(names)]
    return (f"### Where a step goes\n\nms of one step of {result['rows'][0]['rows']} × {result['rows'][0]['seq_len']:,} tokens, kernels by torch.profiler.\n\n"
            f"{table(['', *columns], rows)}\n\n{source(result)} That of 1b is of the runs above.\n")  # fmt: skip


def decoding(result: dict[str, Any]) -> str:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), dpi=120, layout="constrained")
    for name in ("transnormer", "transformer"):
        rows = [row for row in result["rows"] if row["model"] == name]
        contexts = [row["context_tokens"] for row in rows]
        axes[0].plot(contexts, [row["token_ms"] for row in rows], marker="o", label=name)
        axes[1].plot(contexts, [row["state_bytes"] / 2**20 for row in rows], marker="o", label=name)
    for axis, label in zip(axes, ("ms per token", "state, MiB per sequence"), strict=True):
        axis.set(xlabel="tokens read before", ylabel=label, xscale="log", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(DOCS / "decoding.png")
    plt.close(figure)
    rows = [[row["model"], f"{row['context_tokens']:,}", f"{row['token_ms']:.2f}", f"{row['state_bytes'] / 2**20:.2f}",
             f"{row['peak_bytes'] / 2**20:.1f}"] for row in result["rows"]]  # fmt: skip
    head = ["model", "tokens read before", "ms per token", "state, MiB", "peak of a token, MiB"]
    return (f"## Decoding on a CPU\n\nA state is a value here, also the softmax baseline's: its cache is copied for every token, "
            f"which a serving engine would avoid; what it must read still grows.\n\n{table(head, rows)}\n\n![decoding](decoding.png)\n\n`import transnormer` takes "
            f"{result['import_transnormer_s']:.2f} s, `import torch` {result['import_torch_s']:.2f} s.\n\n{source(result)}\n")  # fmt: skip


def attention(result: dict[str, Any]) -> str:
    lengths = [row["seq_len"] for row in result["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), dpi=120, layout="constrained")
    for name, label in (("plain", "plain, T × T"), ("chunked", "Lightning Attention, chunks")):
        axes[0].plot(lengths, [row[f"{name}_ms"] for row in result["rows"]], marker="o", label=label)
        axes[1].plot(lengths, [row[f"{name}_bytes"] / 2**20 for row in result["rows"]], marker="o", label=label)
    for axis, label in zip(axes, ("forward and backward, ms", "peak memory, MiB"), strict=True):
        axis.set(xlabel="T", ylabel=label, yscale="log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(DOCS / "attention.png")
    plt.close(figure)
    rows = [[f"{row['seq_len']:,}", f"{row['plain_ms']:,.1f}", f"{row['chunked_ms']:,.1f}", f"{row['plain_ms'] / row['chunked_ms']:.1f}",
             f"{row['plain_bytes'] / 2**20:,.1f}", f"{row['chunked_bytes'] / 2**20:,.1f}"] for row in result["rows"]]  # fmt: skip
    head = ["T", "plain, ms", "chunked, ms", "times faster", "plain, MiB", "chunked, MiB"]
    one = result["rows"][0]
    return (f"## Lightning Attention against plain linear attention on a CPU\n\nForward and backward, float32, "
            f"{one['heads']} heads of {one['head_dim']}. The plain form is given its mask for nothing.\n\n{table(head, rows)}\n\n"
            f"![attention](attention.png)\n\n{source(result)}\n")  # fmt: skip


def gpu(result: dict[str, Any]) -> str:
    """Everything benchmarks/ops.py measured."""
    idle = f"With nothing to do the GPU takes {result['idle_watts']:.0f} W. " if "idle_watts" in result else ""
    parts = [
        f"## The ops on a GPU\n\nMedian ms of calls, forward / forward and backward, bfloat16. Floor: the bytes that must move over "
        f"the copy bandwidth of the same run, {result['copy_tb_per_second']:.2f} TB/s; a bf16 matrix product ran at "
        f"{result['matmul_tflop_per_second']:.0f} TFLOP/s. {idle}{result.get('note', '')}\n"
    ]  # fmt: skip
    sections = {
        "attention": contenders,
        "first": firsts,
        "lengths": lengths,
        "fusions": fusions,
        "losses": losses,
        "others": steps,
    }
    parts += [section(result[key]) for key, section in sections.items() if result.get(key)]
    parts.append(f"{source(result)}\n")
    return "\n".join(parts)


def _pair(row: dict[str, Any], forward: str, both: str) -> str:
    ms = [row.get(key) for key in (forward, both)]
    return " / ".join(f"{x:.3g}" if isinstance(x, float) else "–" for x in ms) if any(ms) else "–"


def contenders(rows: list[dict[str, Any]]) -> str:
    shapes = list(dict.fromkeys((row["B"], row["H"], row["T"]) for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    found = {(row["contender"], row["B"], row["H"], row["T"]): row for row in rows}
    lines = []
    for shape in shapes:
        ours = found["ours", *shape]
        line = [", ".join(f"{n:,}" for n in shape), _pair(ours, "floor_forward_ms", "floor_both_ms")]
        line.append(f"{ours['forward_over_floor']:.2f} / {ours['both_over_floor']:.2f}")
        line += [_pair(found.get((name, *shape), {}), "forward_ms", "both_ms") for name in names]
        lines.append(line)
        if "both_graph_ms" in ours:
            over = (ours[f"{kind}_graph_ms"] / ours[f"floor_{kind}_ms"] for kind in ("forward", "both"))
            line = ["the same by graph replay", "", " / ".join(f"{x:.2f}" for x in over)]
            lines.append(
                line + [_pair(found.get((name, *shape), {}), "forward_graph_ms", "both_graph_ms") for name in names]
            )
    energy = []
    for shape in shapes:
        of = [found.get((name, *shape), {}) for name in names]
        if any("both_joules" in row for row in of):
            joules = (f"{row['both_joules']:.3g} J" if "both_joules" in row else "–" for row in of)
            sizes = (f"{row['both_bytes'] / 2**30:.2f} GiB" if "both_bytes" in row else "–" for row in of)
            energy.append([", ".join(f"{n:,}" for n in shape), *map(", ".join, zip(joules, sizes, strict=True))])
    counts = [f"{name} {row['forward_launches']} and {row['both_launches']}" for name in names
              if "both_launches" in (row := found.get((name, 4, 32, 8_192), {}))]  # fmt: skip
    counted = (
        f"\nKernels that a call launches, forward, and forward and backward: {'; '.join(counts)}.\n" if counts else ""
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    for axis, kind, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward and backward"), strict=True):
        for name in names:
            points = [
                (T, found[name, B, H, T][kind])
                for B, H, T in shapes
                if B == 4 and kind in found.get((name, B, H, T), {})
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        points = [(T, found["ours", B, H, T][f"floor_{kind}"]) for B, H, T in shapes if B == 4]
        axis.plot(*zip(*points, strict=True), color="black", linestyle=":", label="floor")
        axis.set(xlabel="T", ylabel="ms", title=f"{title}, B = 4, H = 32, K = V = 128", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize="small")
    figure.savefig(DOCS / "ops.png")
    plt.close(figure)
    return (
        f"### Lightning Attention, K = V = 128\n\nSDPA is softmax attention; the others are linear.\n\n"
        f"{table(['B, H, T', 'floor', 'ours ÷ floor', *names], lines)}\n\n![ops](ops.png)\n\nEnergy of forward and backward (NVML, 3 s of "
        f"repeats) and peak memory beyond the inputs:\n\n{table(['B, H, T', *names], energy)}\n{counted}"
    )


def firsts(rows: list[dict[str, Any]]) -> str:
    lines = [[f"{row['K']}, {row['V']}", row["dtype"].removeprefix("torch."), f"{row['forward_seconds']:.1f}",
              f"{row['backward_seconds']:.1f}"] for row in rows if "forward_seconds" in row]  # fmt: skip
    head = ["K, V", "dtype", "forward, s", "backward, s"]
    return f"### First calls\n\nOf a process that finds nothing compiled.\n\n{table(head, lines)}\n"


def lengths(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["contenders"])

    def ms(found: dict[str, Any], kind: str) -> Any:
        """By graph replay where that was measured: the host takes longer than short lengths."""
        return found.get(f"{kind}_graph_ms", found[f"{kind}_ms"])

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    for name in names:
        good = [row for row in rows if isinstance(row["contenders"][name], dict)]
        axes[0].plot(
            [row["T"] for row in good], [ms(row["contenders"][name], "both") for row in good], marker="o", label=name
        )
        sizes = [row["contenders"][name]["both_bytes"] / 2**30 for row in good]
        axes[1].plot([row["T"] for row in good], sizes, marker="o", label=name)
    for axis, label in zip(axes, ("forward and backward, ms", "peak memory beyond the inputs, GiB"), strict=True):
        axis.set(xlabel="T (B = 1, H = 32)", ylabel=label, yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.savefig(DOCS / "lengths.png")
    plt.close(figure)

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["contenders"][name]
        if not isinstance(found, dict):
            return "out of memory" if "OutOfMemory" in found else found
        return f"{ms(found, 'forward'):.3g} / {ms(found, 'both'):.3g}, {found['both_bytes'] / 2**30:.3g} GiB"

    lines = [[f"{row['T']:,}", *(cell(row, name) for name in names)] for row in rows]

    def faster(kind: str) -> str:
        """From which of the lengths on ours is faster."""
        slower = [
            row["T"] for row in rows if row["contenders"]["ours"][kind] >= row["contenders"]["left product"][kind]
        ]
        return next((f"{row['T']:,}" for row in rows if row["T"] > max(slower, default=0)), "none measured")

    timed = [row for row in rows if "both_graph_ms" in row["contenders"]["ours"]]
    replayed = all(ms(row["contenders"]["ours"], kind) < ms(row["contenders"]["left product"], kind)
                   for row in timed for kind in ("forward", "both"))  # fmt: skip
    return (
        f"### Against the plain forms of linear attention\n\nB = 1, H = 32; up to T = 4,096 by graph replay. Plain: the quadratic form with a mask of T × T, which is "
        f"given. Left product: the paper's first algorithm as a kernel, O(T²) operations and nothing of T × T stored. "
        f"By replay the chunks are faster {'at every length, both ways' if replayed else 'at some lengths'}; called one by one, where the host counts, forward "
        f"from T = {faster('forward_ms')} on, forward and backward from {faster('both_ms')}.\n\n{table(['T', *names], lines)}\n\n![lengths](lengths.png)\n"
    )


def fusions(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    lines = [
        [row["op"], _pair(row, "floor_forward_ms", "floor_both_ms"),
         *(f"{_pair(found, 'forward_ms', 'both_ms')} ({found['both_graph_ms']:.3g})" if (found := row["contenders"].get(name)) else "–"
           for name in names)]
        for row in rows
    ]  # fmt: skip
    return (
        f"### Norms, gates, positions\n\nOne tensor is [2, 8192, 4096]; in brackets forward and backward by graph replay, which leaves out "
        f"the host. `torch.compile` compiles these alone.\n\n{table(['', 'floor', *names], lines)}\n"
    )


def losses(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["contender"], f"{row['vocab']:,}", f"{row['both_ms']:.1f}" if isinstance(row["both_ms"], float) else row["both_ms"],
         f"{row['floor_ms']:.1f}", f"{row['bytes'] / 2**30:.2f}" if isinstance(row["bytes"], int) else "–",
         *(f"{row[key]:.1e}" if key in row else "–" for key in ("loss_error", "d_hidden_error", "d_head_error"))]
        for row in rows
    ]  # fmt: skip
    head = ["", "vocab", "ms", "three products, ms", "GiB", "error of the loss", "of d hidden", "of d head"]
    return (
        f"### Head and loss\n\n{rows[0]['tokens']:,} tokens of width {rows[0]['width']:,}, forward and backward; errors are relative, against "
        f'float64, of 2,048 tokens. cut-cross-entropy leaves out gradients where the soft-max is small; "whole" does not.\n\n{table(head, lines)}\n'
    )


def steps(rows: list[dict[str, Any]]) -> str:
    row = rows[0]
    return (
        f"### One token\n\n{row['B']} rows, {row['H']} heads, K = V = {row['K']}, in place: {row['graph_ms']:.3f} ms by graph replay, "
        f"{row['eager_ms']:.3f} eager; floor {row['floor_ms']:.3f}.\n"
    )


def check(result: dict[str, Any]) -> str:
    rows = result["check"]
    right = sum(row["right"] for row in rows)
    sanitized = newest("ops_memcheck", "h100")
    watched = (
        f"All again under compute-sanitizer's memcheck: {sanitized['right']} of {sanitized['configurations']} right, {sanitized['errors']} errors "
        f"({link(sanitized, 'result')}). "
        if sanitized
        else ""
    )
    return (
        f"## Every configuration that may be chosen\n\nOf {len(rows)} (pass, widths, dtypes, segments, packing) {right} are right: the error of output, "
        f"states and gradients against float64 is at most twice plain torch's, and repeats are equal to the bit; the largest is "
        f"{max(row['error_over_plain'] for row in rows if row['right']):.2f} times. {watched}\n\n"
        f"[{result['file']}](../benchmarks/results/{result['file']}).\n"
    )


def limits(result: dict[str, Any]) -> str:
    swish, eager = newest("ops_swish", "h100"), newest("ops_descriptors", "h100")
    return (
        f"## What limits the backward\n\nNsight Compute, B, H, T = 4, 32, 8,192: {result['duration_ms']} ms, memory at "
        f"{result['dram_throughput_percent']:.0f} % and L2 at {result['l2_throughput_percent']:.0f} % of their peak, {result['dram_read_bytes'] / 1e9:.2f} GB read "
        f"and {result['dram_write_bytes'] / 1e9:.2f} GB written. {result['note']} So the design's own floor is 10 units, 0.89 ms at the copy bandwidth. "
        f"The stalls are waits for loads ({result['stalls_per_issue']['long_scoreboard']} of them an instruction) and barriers.\n\nVariants that were tried "
        f"instead (one program for dk and dv with the whole state; results and state transposed, 128 wide): "
        f"[ops_variants_h100_2026-11-25.json](../benchmarks/results/ops_variants_h100_2026-11-25.json). None is faster by 8 % at both 2,048 and 8,192 "
        f"tokens; the transposed form with today's tiles gains 6 and 8 % in backward, half a percent of a training step, for a second form of the walk; in forward it loses 7 % at 8,192 tokens and nothing at 2,048.\n\n"
        f"{result['device']}; [{result['file']}](../benchmarks/results/{result['file']}).\n"
        + (through_swish(swish, eager) if swish and eager else "")
        + (long_limits(long) if (long := newest("ops_profile_long", "h100")) else "")
    )


def through_swish(result: dict[str, Any], eager: dict[str, Any]) -> str:
    """The backward of Gated Linear Attention, whose gradients of q and k go on through the swish."""
    of: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        of.setdefault((row["B"], row["T"], row["H"]), {})[row["variant"]] = row
    rows = [
        [", ".join(f"{n:,}" for n in shape), f"{at['base']['without_swish_ms']:.2f}",
         *(f"{at[name]['with_swish_ms']:.2f}" for name in ("base", "sig", "half", "halfpipe", "desc"))]
        for shape, at in of.items()
    ]  # fmt: skip
    head = ["B, T, H", "without the swish", "as it was", "another sigmoid", "and in halves", "and the pipeline: as it is", "and descriptors"]  # fmt: skip
    apart = of[16, 2_048, 8]["base"]["swish_as_a_pass_of_its_own_ms"]
    return (
        f"\nInside Gated Linear Attention the backward also turns gradients of swish(q) and swish(k) into those of q and k. The sigmoid is now two approximate "
        f"instructions; the columns go through it in two halves, for which registers suffice; and what is read for it comes through the pipeline of the other "
        f"loads. In ms, V = 128:\n\n{table(head, rows)}\n\nThe swish as a pass of its own would take {apart:.2f} more. With a pipeline of one stage, which only GPUs "
        f"with little shared memory use, today's form is slower than the one before on the H100 ({of[16, 2_048, 8]['halfpipe']['with_swish_by_tiles_ms']['64x64 w4 s1']:.2f} "
        f"for {of[16, 2_048, 8]['base']['with_swish_by_tiles_ms']['64x64 w4 s1']:.2f}). Descriptors are used from 2^26 numbers on, the last of these shapes; below, "
        f"making them takes the host of an eager call longer than they gain ({link(eager, 'forward and backward, both ways')}; in the last column the third shape has "
        f"two stages for three). An experiment outside the repository: {link(result)}.\n"
    )


def long_limits(result: dict[str, Any]) -> str:
    """Of the row that has too few heads to fill the GPU."""
    rows = [
        [f"{row['call']}: {row['kernel']}", f"{row['duration_ms']:.2f}", f"{row['dram_bytes'] / 1e9:.2f}",
         f"{row['dram_throughput_percent']:.0f}", f"{row['l2_throughput_percent']:.0f}", f"{row['warps_active']:.1f}",
         f"{row['stalls_per_issue']['long_scoreboard']:.1f}", f"{row['stalls_per_issue']['barrier']:.1f}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["kernel", "ms", "GB moved", "memory, %", "L2, %", "warps a processor", "waits for loads an instruction", "for barriers"]  # fmt: skip
    return (
        f"\nB, H, T = 1, 32, 131,072 has 64 programs in forward and so is cut into segments, whose states a kernel sums up first: it reads k and v "
        f"again where the decay lets anything of them last. The walk itself is near the memory's limit in forward.\n\n{table(head, rows)}\n\n{source(result)}\n"
    )


def sweep(result: dict[str, Any]) -> str:
    rows = [
        row
        for row in result["sweep"]
        if isinstance(row.get("backward_ms"), float) and isinstance(row.get("forward_ms"), float)
    ]

    def label(row: dict[str, Any]) -> str:
        chunk, width, warps, stages, described = row["tiles"]
        return f"{chunk} × {width}, {warps} warps, {stages} stages{', descriptors' if described else ''}"

    figure, axis = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.2), dpi=120, layout="constrained")
    places = range(len(rows))
    axis.barh([n - 0.2 for n in places], [row["forward_ms"] for row in rows], height=0.4, label="forward")
    axis.barh([n + 0.2 for n in places], [row["backward_ms"] for row in rows], height=0.4, label="backward")
    for n, row in zip(places, rows, strict=True):
        if isinstance(row.get("resources"), dict):
            spilled = row["resources"].get("backward", (0, 0))[1]
            axis.text(row["backward_ms"], n + 0.2, f" {spilled} spilled", va="center", fontsize="x-small")
    axis.set_yticks(list(places), [label(row) for row in rows], fontsize="small")
    axis.set(
        xlabel=f"ms, B = {rows[0]['B']}, H = {rows[0]['H']}, T = {rows[0]['T']:,}",
        xlim=(0, 1.15 * max(row["backward_ms"] for row in rows)),
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right")
    figure.savefig(DOCS / "sweep.png")
    plt.close(figure)
    return (
        f"## Chunk and tile sizes\n\nChunk × slice of the state. Too large spills registers (counted beside the bars), too small starves the matrix units. What is chosen: 64 × 64, by descriptors where q has 2^26 elements or more (making them takes longer than small calls gain).\n\n![sweep](sweep.png)\n\n"
        f"{source(result)}\n"
    )


def main() -> None:
    parts = ["# Performance\n\nGenerated by `benchmarks/report.py` from `benchmarks/results/`.\n"]
    for subject, device, section in (
        ("train", "h100", training_gpu),
        ("train_profile", "h100", training_profile),
        ("train_graph", "h100", training_graph),
        ("train_float8", "h100", training_float8),
        ("meshes", "h100x2", two),
        ("meshes_385m", "h100x4", four),
        ("train", "cpu", training),
        ("inference", "cpu", decoding),
        ("attention", "cpu", attention),
        ("ops", "h100", gpu),
        ("ops_check", "h100", check),
        ("ops_profile", "h100", limits),
        ("ops_sweep", "h100", sweep),
    ):
        if result := newest(subject, device):
            parts.append(section(result))
    (DOCS / "performance.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
