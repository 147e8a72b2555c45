"""docs/performance.md and its pictures, from the newest result of each subject and device in benchmarks/results."""

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from record import RESULTS

DOCS = RESULTS.parent.parent / "docs"


def newest(subject: str, device: str) -> dict[str, Any] | None:
    found = sorted(RESULTS.glob(f"{subject}_{device}_*.json"))
    return json.loads(found[-1].read_text()) | {"file": found[-1].name} if found else None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(result: dict[str, Any]) -> str:
    return (f"{result['device']}; torch {result['versions']['torch']}; commit {result['commit'][:12]}{'-dirty' * result['commit'].endswith('dirty')}; `{result['command']}`; "
            f"[{result['file']}](../benchmarks/results/{result['file']}).")  # fmt: skip


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
    rows, shapes = result["attention"], []
    for row in rows:
        shape = (row["B"], row["H"], row["T"])
        if shape not in shapes:
            shapes.append(shape)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    found = {(row["contender"], row["B"], row["H"], row["T"]): row for row in rows}
    lines = []
    for shape in shapes:
        floor = found["ours", *shape]
        line = [", ".join(f"{n:,}" for n in shape), f"{floor['floor_forward_ms']:.3f} / {floor['floor_both_ms']:.3f}"]
        for name in names:
            row = found.get((name, *shape), {})
            graph = "_graph" * ("both_graph_ms" in row)
            measured = f"forward{graph}_ms" in row
            line.append(f"{row[f'forward{graph}_ms']:.3f} / {row[f'both{graph}_ms']:.3f}" if measured else "–")
        lines.append(line)
    return (
        f"## Lightning Attention on a GPU\n\nMedian ms, forward / forward and backward, bfloat16, head size 128; the smallest "
        f"shape by CUDA graph replay. Floor: bytes that must move over the copy bandwidth measured in the same run "
        f"({result['copy_tb_per_second']:.2f} TB/s; bf16 matrix product {result['matmul_tflop_per_second']:.0f} TFLOP/s). SDPA is "
        f"softmax attention. {result.get('note', '')}\n\n{table(['B, H, T', 'floor', *names], lines)}\n\n"
        f"{result['device']}; torch {result['torch']}, triton {result['triton']}; commit {result['commit'][:12]}"
        f"{'-dirty' * result['commit'].endswith('dirty')}; `{result['command']}`; "
        f"[{result['file']}](../benchmarks/results/{result['file']}).\n"
    )


def main() -> None:
    parts = ["# Performance\n\nGenerated by `benchmarks/report.py` from `benchmarks/results/`.\n"]
    for subject, device, section in (
        ("train", "cpu", training),
        ("inference", "cpu", decoding),
        ("attention", "cpu", attention),
        ("ops_quick", "h100", gpu),
    ):
        if result := newest(subject, device):
            parts.append(section(result))
    (DOCS / "performance.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
