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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lib import record
from lib.contenders import HEADS_FIRST, LeftProduct, attention_contenders, loss_contenders, plain
from lib.gpu import attempt, ceilings, graph_ms, joules, launches, median_ms, peak_bytes
from torch import Tensor

from transnormer.ops import add_rms_norm, lightning_step_, simple_rms_norm
from transnormer.ops import lightning_kernels_triton as device_code
from transnormer.ops import lightning_triton as kernels
from transnormer.ops.lightning_triton import Tiles
from transnormer.ops.lrpe import swish_lrpe

PARTS = ["check", "first", "attention", "lengths", "fusions", "others", "losses"]
ROOT = Path(__file__).resolve().parents[1]
ROWS = [(4, 32, 2_048), (4, 32, 8_192), (4, 32, 32_768), (1, 32, 131_072), (1, 16, 2_048)]
SWEEP = [
    Tiles(*tiles)  # type: ignore[arg-type]
    for tiles in [
        (64, 64, 4, 2),
        (64, 64, 4, 1),
        (64, 64, 4, 3),
        (64, 64, 4, 2, True),
        (64, 64, 4, 3, True),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
        (64, 128, 8, 3, True),
        (64, 128, 8, 4, True),
        (128, 64, 8, 2),
        (128, 64, 8, 2, True),
        (128, 64, 8, 3, True),
        (128, 128, 8, 2),
        (128, 128, 8, 2, True),
        (64, 64, 8, 3),
        (64, 128, 8, 1),
        (64, 128, 8, 2, True),
        (128, 64, 8, 1),
        (128, 64, 4, 1),
        (128, 128, 8, 1),
        (64, 128, 4, 2),
        (32, 64, 4, 2),
        (32, 64, 4, 3, True),
        (16, 64, 4, 2),
        (16, 64, 4, 4),
    ]
]
SEGMENTS: list[tuple[tuple[int, int, int], tuple[int | None, ...]]] = [
    ((1, 32, 131_072), (None, 1, 4, 8, 16)),
    ((1, 16, 2_048), (None, 1, 4, 8)),
    ((4, 32, 2_048), (None, 2)),
]


# Lightning Attention beside the others.


def inputs(
    B: int, H: int, T: int, sets: int = 1, heads_first: bool = False
) -> tuple[list[Any], Tensor]:
    """(sets of q, k, v and the output's gradient, log_decay by ALiBi)."""
    log_decay = -torch.exp2(-8 * torch.arange(1, H + 1, device="cuda") / H)
    shape = (B, H, T, 128) if heads_first else (B, T, H, 128)
    tensors = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        for _ in range(sets)
    ]
    for q, k, v, _ in tensors:
        k.mul_(0.1)
        for x in (q, k, v):
            x.requires_grad_()
    return tensors, log_decay


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
            tensors, log_decay = inputs(B, H, T, 8 if small else 1, name in HEADS_FIRST)
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
        tensors, log_decay = inputs(1, 32, T)
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


def fusion_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """SimpleRMSNorm, alone and with what stands around it, and swish with LRPE, beside torch, eager
    and compiled.

    q, k and the gate are views of one projection's output, as in the model. One tensor is [2, 8192,
    4096] in bfloat16."""
    B, T, H, V = 2, 8_192, 32, 128
    x, update = (torch.randn(B, T, H * V, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k, _, gate = torch.randn(B, T, H, 4, V, device="cuda", dtype=torch.bfloat16).unbind(-2)
    theta, positions = 10_000 ** -torch.rand(H, V, device="cuda"), torch.arange(T, device="cuda")
    unit = x.numel() * 2 / bandwidth / 1e9

    def alone(x: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (simple_rms_norm(x, backend=backend),)

    def times_gate(x: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (simple_rms_norm(x, gate=gate, backend=backend),)

    def after_update(x: Tensor, update: Tensor, backend: str) -> tuple[Tensor, ...]:
        return add_rms_norm(x, update, backend=backend)

    def turned(q: Tensor, k: Tensor, theta: Tensor, backend: str) -> tuple[Tensor, ...]:
        return swish_lrpe(q, k, theta, positions, backend=backend)

    cases: list[tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], int, int]] = [
        (alone, [x], 2, 5),
        (times_gate, [x, gate], 3, 8),
        (after_update, [x, update], 4, 8),
        (turned, [q, k, theta], 6, 14),
    ]
    for function, inputs, forward_units, both_units in cases:
        leaves = [x.detach().requires_grad_() for x in inputs]
        forms: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "ours": functools.partial(function, backend="triton"),
            "eager": functools.partial(function, backend="torch"),
            "compiled": torch.compile(functools.partial(function, backend="torch")),
        }
        if function is alone:
            forms["F.rms_norm"] = lambda x: (F.rms_norm(x, x.shape[-1:], eps=1e-6),)
        names = {
            alone: "norm",
            times_gate: "norm, gate",
            after_update: "residual, norm",
            turned: "swish, LRPE",
        }
        row: dict[str, Any] = {
            "op": names[function],
            "floor_forward_ms": forward_units * unit,
            "floor_both_ms": both_units * unit,
            "contenders": {},
        }
        for name, form in forms.items():
            with torch.no_grad():
                found: dict[str, Any] = {
                    "forward_ms": attempt(
                        functools.partial(median_ms, functools.partial(form, *leaves))
                    )
                }
            gradients = [torch.randn_like(y) for y in form(*leaves)]

            def both(
                form: Callable[..., Any] = form,
                gradients: list[Tensor] = gradients,
                leaves: Any = leaves,
            ) -> Any:
                return torch.autograd.grad(form(*leaves), leaves, gradients)

            found["both_ms"] = attempt(functools.partial(median_ms, both))
            found["both_graph_ms"] = attempt(functools.partial(graph_ms, [both], 4))
            found["both_bytes"] = attempt(functools.partial(peak_bytes, both))
            row["contenders"][name] = found
        yield row


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
                n: _distance(x, y) for n, x, y in zip(names, results(loss, *few), true, strict=True)
            }

        call = functools.partial(results, loss, *many)
        row["both_ms"] = attempt(functools.partial(median_ms, call))
        row["bytes"] = attempt(functools.partial(peak_bytes, call))
        found = attempt(errors)
        yield row | (found if isinstance(found, dict) else {"error": found})


# Correctness of every configuration that may be chosen.


def _error(
    forward: bool,
    tiles: Tiles,
    segments: int | None,
    K: int,
    V: int,
    dtype: torch.dtype,
    lengths: Any,
) -> float | str:
    """The largest error of output and state, or of the gradients, in units of plain torch's: at
    most 2 is right.

    Two roundings of float32 are the least unit, as in the tests.
    """
    sys.path.insert(0, str(ROOT / "tests" / "ops"))
    import oracle

    case = oracle.draw(
        200,
        K,
        V,
        rows=2,
        decays=[0.0, -0.02, -0.7],
        dtype=dtype,
        lengths=lengths,
        device="cuda",
        seed=K + V,
    )
    case = case.to(dtype, state=torch.float32)
    arguments = (case.q, case.k, case.v, case.log_decay, case.state, case.cu_seqlens)

    def call() -> tuple[Tensor, ...]:
        if forward:
            return kernels.forward(*arguments, tiles=tiles, segments=segments)
        return kernels.backward(
            *arguments, case.d_output, case.d_last, tiles=tiles, segments=segments
        )

    names = ("output", "last") if forward else ("d_q", "d_k", "d_v", "d_state")
    found, again = (dict(zip(names, call(), strict=True)) for _ in range(2))
    if lost := [name for name in names if not found[name].isfinite().all()]:
        return f"not finite: {', '.join(lost)}"
    if other := [name for name in names if not torch.equal(found[name], again[name])]:
        return f"another result the second time: {', '.join(other)}"
    in_dtype = case.to(dtype)
    true, plain = oracle.exact(in_dtype), oracle.plain(in_dtype)
    unit = 2 * torch.finfo(torch.float32).eps
    return max(
        oracle.distance(x, true[name]) / max(oracle.distance(plain[name], true[name]), unit)
        for name, x in found.items()
    )


def check(quick: bool) -> Iterator[dict[str, Any]]:
    """Every configuration that may be chosen, in several processes, as compiling takes longer than
    running."""
    widths = [(128, 128), (64, 64), (256, 128)]
    if not quick:
        widths += [(128, 256), (256, 256), (16, 16), (96, 160), (33, 47)]
    shared = kernels._device(torch.cuda.current_device())[1]
    cases: list[tuple[int, list[int] | None]] = [
        (1, None),
        (3, None),
        (1, [70, 0, 130]),
        (2, [70, 0, 130]),
    ]
    calls = []
    for (K, V), dtype in itertools.product(widths, [torch.bfloat16, torch.float16, torch.float32]):
        wide = max(K, V)
        walks = [
            kernels.choices(wide, wide, dtype, shared, paired=paired) for paired in (True, False)
        ]
        passes = {
            "forward": kernels.choices(K, V, dtype, shared),
            "backward": [*walks[0], *walks[1]],
        }
        brief = quick and (dtype != torch.bfloat16 or (K, V) != (128, 128))
        for name, options in passes.items():
            found = list(dict.fromkeys(options))[: 1 if brief else None]
            # as in small calls
            found += [dataclasses.replace(x, described=False) for x in found if x.described]
            for tiles, (segments, lengths) in itertools.product(found, cases[:: 3 if brief else 1]):
                calls.append((name == "forward", tiles, segments, K, V, dtype, lengths))
    workers = max(1, min(12, (os.cpu_count() or 1) - 2))
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        for call, (error, seconds) in zip(calls, pool.map(_checked, calls), strict=True):
            forward, tiles, segments, K, V, dtype, lengths = call
            yield {
                "pass": "forward" if forward else "backward",
                "K": K,
                "V": V,
                "dtype": str(dtype),
                "tiles": dataclasses.astuple(tiles),
                "segments": segments,
                "packed": lengths is not None,
                "error_over_plain": error,
                "seconds": seconds,
                "right": isinstance(error, float) and error <= 2,
            }


def _checked(call: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return attempt(lambda: _error(*call)), time.perf_counter() - begin


def sweep(
    shapes: list[tuple[int, int, int, int | None]], candidates: list[Tiles]
) -> Iterator[dict[str, Any]]:
    """Forward and backward kernels alone with every configuration, and how far each is from the
    first one's result."""
    seen = _kernels()
    for B, H, T, segments in shapes:
        ((q, k, v, g),), log_decay = inputs(B, H, T)
        q, k, v = (x.detach() for x in (q, k, v))
        wanted: list[Tensor] = []
        for tiles in candidates:
            chosen: dict[str, Any] = {"tiles": tiles, "segments": segments}
            forward = functools.partial(kernels.forward, q, k, v, log_decay, **chosen)
            backward = functools.partial(
                kernels.backward, q, k, v, log_decay, None, None, g, None, **chosen
            )
            row: dict[str, Any] = {
                "B": B,
                "H": H,
                "T": T,
                "segments": segments,
                "tiles": dataclasses.astuple(tiles),
            }
            for name, call in (("forward", forward), ("backward", backward)):
                begin = time.perf_counter()
                row[f"{name}_ms"] = attempt(functools.partial(_kernel_ms, call, B * H * T < 2**18))
                row[f"{name}_seconds"] = time.perf_counter() - begin
            found = attempt(functools.partial(_outputs, forward, backward))
            if isinstance(found, list):
                wanted = wanted or found
                row["distance"] = [_distance(x, y) for x, y in zip(found, wanted, strict=True)]
            if (count := _kernels()) > seen:  # else the kernels compiled last are of another row
                row["resources"], seen = attempt(_resources), count
            yield row
            del found
        del wanted


def _outputs(forward: Callable[[], Any], backward: Callable[[], Any]) -> list[Tensor]:
    """The output of forward, and dq, dk and dv of backward."""
    return [forward()[0], *backward()[:3]]


def _kernel_ms(call: Callable[[], Any], small: bool) -> float:
    return graph_ms([call]) if small else median_ms(call, budget_ms=60)


def _distance(found: Tensor, want: Tensor) -> float:
    return ((found.float() - want.float()).norm() / want.float().norm()).item()


def _compiled() -> dict[str, list[Any]]:
    kernels = {"forward": device_code.forward_kernel, "backward": device_code.backward_kernel}
    index = torch.cuda.current_device()
    return {name: list(kernel.device_caches[index][0].values()) for name, kernel in kernels.items()}


def _kernels() -> int:
    return sum(map(len, _compiled().values()))


def _resources() -> dict[str, Any]:
    """Registers and spills of the kernels compiled last."""
    found = {}
    for name, compiled in _compiled().items():
        if compiled:
            found[name] = (
                getattr(compiled[-1], "n_regs", None),
                getattr(compiled[-1], "n_spills", None),
            )
    return found


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
    ((q, k, v, g),), log_decay = inputs(B, H, T)
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
        checked = part("check: error in units of plain torch's, at most 2", check(quick))
        wrong = [row for row in checked if not row["right"]]
        print(f"{len(wrong)} of {len(checked)} configurations are wrong", flush=True)
    if options.sweep:
        part("sweep", sweep([(4, 32, 8_192, 1)], SWEEP[:5] if quick else SWEEP))
        part(
            "segments",
            sweep(
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
