"""Speed, memory and energy of the ops on one GPU, with every contender in the same run.

    python benchmarks/ops.py            everything, into benchmarks/results/ops_<device>_<date>.json
    python benchmarks/ops.py --quick    fewer rows and repeats, a few minutes
    python benchmarks/ops.py --parts attention    only some of check, first, attention, lengths,
                                                  fusions, others, losses
    python benchmarks/ops.py --check    only: all configurations, against the float64 recurrence
    python benchmarks/ops.py --sweep    only: chunk, slice, warps and stages
    python benchmarks/ops.py --profile forward|backward|step [--shape B H T]    one call, to be
                                                                                profiled

Times are medians of single calls between CUDA events; "graph" is the replay of a CUDA graph that
holds 20 calls over several inputs, a call. Memory is what a call needs beyond its inputs. The floor
is the bytes that must move (every input read once, every output written once) over the copy
bandwidth measured first. What fails is recorded as text."""

# mypy: allow-untyped-defs

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lib import configurations, record
from lib.configurations import SEGMENTS, SWEEP
from lib.contenders import (
    HEADS_FIRST,
    LeftProduct,
    attention_contenders,
    attention_inputs,
    loss_contenders,
    plain,
)
from lib.gpu import attempt, ceilings, distance, graph_ms, joules, launches, median_ms, peak_bytes
from torch import Tensor

from transnormer.ops import add_rms_norm, lightning_step_, simple_rms_norm
from transnormer.ops import lightning_triton as kernels
from transnormer.ops.lrpe import swish_lrpe

PARTS = ["check", "first", "attention", "lengths", "fusions", "others", "losses"]
ROOT = Path(__file__).resolve().parents[1]
ROWS = [(4, 32, 2_048), (4, 32, 8_192), (4, 32, 32_768), (1, 32, 131_072), (1, 16, 2_048)]


# Lightning Attention beside the others.


def both_ways(attend: Callable[..., Tensor], tensors: Any, log_decay: Tensor) -> Any:
    q, k, v, d_output = tensors
    return torch.autograd.grad(attend(q, k, v, log_decay), (q, k, v), d_output)


def measure(
    attend: Callable[..., Tensor], tensors: list[Any], log_decay: Tensor, small: bool, energy: bool
) -> Any:
    def forward(x: Any) -> Tensor:
        with torch.no_grad():
            return attend(*x[:3], log_decay)

    one = tensors[0]
    begin = time.perf_counter()
    forward(one)
    both_ways(attend, one, log_decay)
    torch.cuda.synchronize()
    row: dict[str, Any] = {"first_call_seconds": time.perf_counter() - begin}
    row["forward_ms"] = median_ms(lambda: forward(one))
    row["both_ms"] = median_ms(lambda: both_ways(attend, one, log_decay))
    row["forward_bytes"] = peak_bytes(lambda: forward(one))
    row["both_bytes"] = peak_bytes(lambda: both_ways(attend, one, log_decay))
    if small:
        row["forward_graph_ms"] = attempt(
            lambda: graph_ms([functools.partial(forward, x) for x in tensors])
        )
        calls = [functools.partial(both_ways, attend, x, log_decay) for x in tensors]
        row["both_graph_ms"] = attempt(lambda: graph_ms(calls))
    row["forward_launches"] = attempt(lambda: launches(lambda: forward(one)))
    row["both_launches"] = attempt(lambda: launches(lambda: both_ways(attend, one, log_decay)))
    if energy:
        row["both_joules"] = attempt(lambda: joules(lambda: both_ways(attend, one, log_decay)))
    return row


def attention_rows(
    rows: list[tuple[int, int, int]], bandwidth: float, quick: bool
) -> Iterator[dict[str, Any]]:
    """One contender after another over all rows. Quick runs leave out softmax attention where it
    takes seconds."""
    for name, attend in attention_contenders().items():
        for B, H, T in rows:
            if quick and T > 8_192 and name.startswith("SDPA"):
                continue
            small = B * H * T < 2**18
            tensors, log_decay = attention_inputs(B, H, T, 8 if small else 1, name in HEADS_FIRST)
            unit = tensors[0][0].numel() * 2 / bandwidth / 1e9
            row: dict[str, Any] = {
                "contender": name,
                "B": B,
                "H": H,
                "T": T,
                "K": 128,
                "V": 128,
                "dtype": "bfloat16",
            }
            row |= {"floor_forward_ms": 4 * unit, "floor_both_ms": 11 * unit}
            energy = T <= 8_192 or not name.startswith("SDPA")
            found = attempt(functools.partial(measure, attend, tensors, log_decay, small, energy))
            if isinstance(found, dict):
                found["forward_over_floor"] = found["forward_ms"] / row["floor_forward_ms"]
                found["both_over_floor"] = found["both_ms"] / row["floor_both_ms"]
            yield row | (found if isinstance(found, dict) else {"error": found})


def first_rows() -> Iterator[dict[str, Any]]:
    """Seconds of the first forward and backward of a process that finds nothing compiled, B, T, H =
    4, 2048, 32."""
    widths = [(128, 128), (256, 256)]
    for (K, V), dtype in itertools.product(widths, [torch.bfloat16, torch.float16, torch.float32]):
        with concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        ) as pool:
            found = attempt(pool.submit(_first, K, V, dtype).result)
        row = {"K": K, "V": V, "dtype": str(dtype)}
        yield row | (found if isinstance(found, dict) else {"error": found})


def _first(K: int, V: int, dtype: torch.dtype) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        return _first_call(K, V, dtype)


def _first_call(K: int, V: int, dtype: torch.dtype) -> dict[str, float]:
    q, k = (
        torch.randn(4, 2_048, 32, K, device="cuda", dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    v = torch.randn(4, 2_048, 32, V, device="cuda", dtype=dtype, requires_grad=True)
    log_decay, attend = torch.full((32,), -0.1, device="cuda"), attention_contenders()["ours"]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    output = attend(q, k, v, log_decay)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    output.backward(torch.ones_like(output))
    torch.cuda.synchronize()
    return {"forward_seconds": middle - begin, "backward_seconds": time.perf_counter() - middle}


def length_rows(lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Ours beside the plain forms of linear attention, B = 1, H = 32."""
    for T in lengths:
        tensors, log_decay = attention_inputs(1, 32, T)
        forms: dict[str, Callable[..., Tensor]] = {
            "ours": attention_contenders()["ours"],
            "left product": LeftProduct.apply,
        }
        row: dict[str, Any] = {"B": 1, "H": 32, "T": T, "contenders": {}}
        for name, attend in forms.items():
            row["contenders"][name] = attempt(
                functools.partial(measure, attend, tensors, log_decay, T <= 4_096, False)
            )
        row["contenders"]["plain"] = attempt(
            functools.partial(_measure_plain, T, tensors, log_decay)
        )
        yield row


def _measure_plain(T: int, tensors: list[Any], log_decay: Tensor) -> Any:
    return measure(plain(T, log_decay), tensors, log_decay, T <= 4_096, False)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A fused op with its inputs. units: how many tensors as large as the first input must be read
    and written, forward, and forward and backward."""

    name: str
    call: Callable[..., tuple[Tensor, ...]]
    inputs: list[Tensor]
    forward_units: int
    both_units: int


def fusions() -> list[Fusion]:
    """SimpleRMSNorm, alone and with what stands around it, and swish with LRPE.

    q, k and the gate are views of one projection's output, as in the model. One tensor is [2, 8192,
    4096] in bfloat16."""
    B, T, H, V = 2, 8_192, 32, 128
    x, update = (torch.randn(B, T, H * V, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k, _, gate = torch.randn(B, T, H, 4, V, device="cuda", dtype=torch.bfloat16).unbind(-2)
    theta, positions = 10_000 ** -torch.rand(H, V, device="cuda"), torch.arange(T, device="cuda")

    def alone(x: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (simple_rms_norm(x, backend=backend),)

    def times_gate(x: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (simple_rms_norm(x, gate=gate, backend=backend),)

    def after_update(x: Tensor, update: Tensor, backend: str) -> tuple[Tensor, ...]:
        return add_rms_norm(x, update, backend=backend)

    def turned(q: Tensor, k: Tensor, theta: Tensor, backend: str) -> tuple[Tensor, ...]:
        return swish_lrpe(q, k, theta, positions, backend=backend)

    return [
        Fusion("norm", alone, [x], 2, 5),
        Fusion("norm, gate", times_gate, [x, gate], 3, 8),
        Fusion("residual, norm", after_update, [x, update], 4, 8),
        Fusion("swish, LRPE", turned, [q, k, theta], 6, 14),
    ]


def fusion_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """The fused ops beside torch, eager and compiled."""
    for fusion in fusions():
        leaves = [x.detach().requires_grad_() for x in fusion.inputs]
        forms: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "ours": functools.partial(fusion.call, backend="triton"),
            "eager": functools.partial(fusion.call, backend="torch"),
            "compiled": torch.compile(functools.partial(fusion.call, backend="torch")),
        }
        if fusion.name == "norm":
            forms["F.rms_norm"] = lambda x: (F.rms_norm(x, x.shape[-1:], eps=1e-6),)
        unit = leaves[0].numel() * 2 / bandwidth / 1e9
        yield {
            "op": fusion.name,
            "floor_forward_ms": fusion.forward_units * unit,
            "floor_both_ms": fusion.both_units * unit,
            "contenders": {name: measure_fusion(form, leaves) for name, form in forms.items()},
        }


def measure_fusion(
    form: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]
) -> dict[str, float | str]:
    """Time and memory of one form of a fused op."""
    with torch.no_grad():
        forward_ms = attempt(functools.partial(median_ms, functools.partial(form, *leaves)))
    gradients = [torch.randn_like(y) for y in form(*leaves)]

    def both() -> Any:
        return torch.autograd.grad(form(*leaves), leaves, gradients)

    return {
        "forward_ms": forward_ms,
        "both_ms": attempt(functools.partial(median_ms, both)),
        "both_graph_ms": attempt(functools.partial(graph_ms, [both], 4)),
        "both_bytes": attempt(functools.partial(peak_bytes, both)),
    }


def other_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """The one-token step."""
    B, H, D = 64, 32, 128
    q, k, v = (torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    log_decay = torch.full((H,), -0.1, device="cuda")
    states = [torch.randn(B, H, D, D, device="cuda") for _ in range(4)]
    calls = [functools.partial(lightning_step_, q, k, v, log_decay, state) for state in states]
    yield {
        "op": "step",
        "B": B,
        "H": H,
        "K": D,
        "V": D,
        "floor_ms": 2 * states[0].numel() * 4 / bandwidth / 1e9,
        "graph_ms": attempt(lambda: graph_ms(calls)),
        "eager_ms": attempt(lambda: median_ms(calls[0])),
    }


def loss_rows(product: float, vocab: int) -> Iterator[dict[str, Any]]:
    """Head and loss, forward and backward, one contender after another; product: TFLOP/s of a
    matrix product.

    Distances from float64 are of 2,048 tokens. The floor is the three products.
    """
    width = 1_024
    head = (torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16) / 32).requires_grad_()

    def tokens(number: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(number, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return hidden, head, torch.randint(vocab, (number,), device="cuda")

    def results(
        loss: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor
    ) -> list[Tensor]:
        value = loss(hidden, head, targets)
        return [value.detach(), *torch.autograd.grad(value, (hidden, head))]

    forms, few, many = loss_contenders(), tokens(2_048), tokens(32_768)
    exact, exact_head = (x.detach().double().requires_grad_() for x in few[:2])
    true = [x.float() for x in results(forms["plain"], exact, exact_head, few[2])]
    floor = 6 * 32_768 * width * vocab / product / 1e9
    for name, loss in forms.items():
        row: dict[str, Any] = {
            "op": "linear_cross_entropy",
            "contender": name,
            "tokens": 32_768,
            "width": width,
            "vocab": vocab,
            "dtype": "bfloat16",
            "floor_ms": floor,
        }

        def errors(loss: Callable[..., Tensor] = loss) -> dict[str, float]:
            names = ("loss_error", "d_hidden_error", "d_head_error")
            return {
                n: distance(x, y) for n, x, y in zip(names, results(loss, *few), true, strict=True)
            }

        call = functools.partial(results, loss, *many)
        row["both_ms"] = attempt(functools.partial(median_ms, call))
        row["bytes"] = attempt(functools.partial(peak_bytes, call))
        found = attempt(errors)
        yield row | (found if isinstance(found, dict) else {"error": found})


# Reporting.


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {short(v)}" for k, v in value.items()) + "}"
    return str(value)


def show(
    title: str,
    rows: Iterator[dict[str, Any]],
    into: list[dict[str, Any]],
    keep: Callable[[], object],
) -> None:
    """Print rows as they come, put them into the result and keep it: a run cut short loses
    nothing."""
    print(f"\n== {title}", flush=True)
    for row in rows:
        print("  ".join(f"{k}={short(v)}" for k, v in row.items()), flush=True)
        into.append(row)
        keep()


def profile(what: str, B: int, H: int, T: int) -> None:
    ((q, k, v, g),), log_decay = attention_inputs(B, H, T)
    q, k, v = (x.detach() for x in (q, k, v))
    if what == "forward":
        kernels.forward(q, k, v, log_decay)
    elif what == "backward":
        kernels.backward(q, k, v, log_decay, None, None, g, None)
    else:
        state = torch.randn(64, 32, 128, 128, device="cuda")
        q, k, v = (
            torch.randn(64, 1, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        lightning_step_(q, k, v, log_decay, state)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--quick", "--check", "--sweep"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--profile", choices=["forward", "backward", "step"])
    parser.add_argument(
        "--shape", nargs=3, type=int, default=(4, 32, 8_192), metavar=("B", "H", "T")
    )
    parser.add_argument("--commit", default=None, help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.profile:
        profile(options.profile, *options.shape)
        return
    device = torch.cuda.get_device_name()
    today = datetime.date.today().isoformat()
    result: dict[str, Any] = record.head("ops", device, options.commit) | ceilings()
    print(short(result), flush=True)
    bandwidth = result["copy_tb_per_second"]
    everything = not (options.check or options.sweep)
    quick = options.quick
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "sweep_" if options.sweep else "check_" if options.check else "quick_" if quick else ""
    slug = record.slug(device)
    path = options.out / f"ops_{kind}{slug}_{today}.json"

    def part(title: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        into = result.setdefault(title.split(":")[0], [])
        show(title, rows, into, lambda: path.write_text(json.dumps(result, indent=1) + "\n"))
        return into

    if options.check or (everything and not quick and "check" in options.parts):
        checked = part(
            "check: error in units of plain torch's, at most 2", configurations.check(quick)
        )
        wrong = [row for row in checked if not row["right"]]
        print(f"{len(wrong)} of {len(checked)} configurations are wrong", flush=True)
    if options.sweep:
        part("sweep", configurations.sweep([(4, 32, 8_192, 1)], SWEEP[:5] if quick else SWEEP))
        part(
            "segments",
            configurations.sweep(
                [(*shape, n) for shape, numbers in SEGMENTS for n in numbers],
                [*SWEEP[:1], *SWEEP[2:5]],
            ),
        )
    if everything and not quick and "first" in options.parts:
        part("first", first_rows())
    if everything and "attention" in options.parts:
        part("attention", attention_rows(ROWS, bandwidth, quick))
    if everything and "lengths" in options.parts:
        lengths = (
            [512, 2_048, 8_192] if quick else [128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384]
        )
        part("lengths", length_rows(lengths))
    if everything and "fusions" in options.parts:
        part("fusions", fusion_rows(bandwidth))
    if everything and "others" in options.parts:
        part("others", other_rows(bandwidth))
    if everything and "losses" in options.parts:
        product = result["matmul_tflop_per_second"]
        part(
            "losses",
            itertools.chain.from_iterable(loss_rows(product, vocab) for vocab in (64_000, 50_257)),
        )
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
