"""Training speed, one contender after another in one run: a step is loss, backward, clip and AdamW
on random ids.

    python benchmarks/train.py [--size 10m] [--lengths 512 4096] [--batch-tokens 4096] [--repeats 5]
    python benchmarks/train.py --device cuda --size 385m [--lengths 2048 8192 32768] [--batch-tokens
    32768]
        [--contenders transnormer llama softmax retnet ...] [--million] [--profile]
        [--name train_float8] [--commit HASH] [--out FOLDER]

On the CPU TransNormerLLM and the softmax Transformer of the same width and depth take turns. On a
GPU every contender (`lib/trainers.py`) has the GPU to itself: seconds until its first step is done,
the median step, tokens a second, the share of the matrix product's measured rate by the model's own
operations, peak memory and joules a token."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lib import record

from transnormer import TRANSFORMER, LanguageModel, ModelConfig

KINDS = {"transnormer": {}, "transformer": TRANSFORMER}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MILLION = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", default=["10m"])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument(
        "--million", action="store_true", help="also rows of 1,048,576 tokens, in segments"
    )
    parser.add_argument("--profile", action="store_true", help="also where a step's time goes")
    parser.add_argument(
        "--name", default="train", help="of the result: train, train_long, train_float8"
    )
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        on_cpu(options)
    else:
        on_gpu(options)


def on_cpu(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    ceilings = {name: record.matmul_flops("cpu", dtype) for name, dtype in DTYPES.items()}
    for name, ceiling in ceilings.items():
        print(f"matrix product, {name}: {ceiling / 1e9:,.0f} GFLOP/s")
    size = options.size[0]
    models = {name: LanguageModel(ModelConfig.named(size, **kind)) for name, kind in KINDS.items()}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()
    }

    def step(name: str, ids: torch.Tensor, dtype: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = models[name].loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    for length in options.lengths or [512, 4096]:
        for dtype in DTYPES:
            shape = (max(1, (options.batch_tokens or 4096) // length), length + 1)
            ids = torch.randint(models["transnormer"].config.vocab_size, shape)
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(options.repeats + 1):
                for name in models:
                    took = record.time_ms(partial(step, name, ids, dtype), "cpu")
                    if repeat:
                        times[name].append(took)
            for name, model in models.items():
                tokens = shape[0] * length / statistics.median(times[name]) * 1e3
                rows.append(
                    {
                        "model": name,
                        "size": size,
                        "parameters": model.parameter_count(),
                        "seq_len": length,
                        "rows": shape[0],
                        "dtype": dtype,
                        "tokens_per_second": round(tokens, 1),
                        "flop_share": round(
                            tokens * model.flops_per_token(length, chunk=64) / ceilings[dtype], 3
                        ),
                        "times_ms": [round(t, 1) for t in times[name]],
                    }
                )
            ours, theirs = rows[-2:]
            ours["over_transformer"] = round(
                ours["tokens_per_second"] / theirs["tokens_per_second"], 3
            )
            print(
                f"{size}, T = {length}, {dtype}: {ours['tokens_per_second']:,.0f} and "
                f"{theirs['tokens_per_second']:,.0f} tokens/s, {ours['over_transformer']:.2f} times"
            )
    print(record.save("train", "cpu", rows, matmul_flops=ceilings))


def on_gpu(options: argparse.Namespace) -> None:
    from lib import gpu

    # cuDNN's is the fastest softmax attention on Hopper
    for backend in ("flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(False)
    name = torch.cuda.get_device_name()
    slug = record.slug(name)
    path = options.out / f"{options.name}_{slug}_{date.today()}.json"
    result: dict[str, Any] = (
        record.head(options.name, name, options.commit) | gpu.ceilings() | {"rows": []}
    )
    print(result, flush=True)
    for row in gpu_rows(options, result["matmul_tflop_per_second"] * 1e12):
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(
            {
                key: value
                for key, value in row.items()
                if key not in ("note", "times_ms", "profile")
            },
            flush=True,
        )
    print(f"wrote {path}")


def gpu_rows(options: argparse.Namespace, ceiling: float) -> Iterator[dict[str, Any]]:
    from lib import gpu
    from lib.trainers import CONTENDERS

    for size in options.size:
        for length in options.lengths or [2_048, 8_192, 32_768]:
            rows = max(1, (options.batch_tokens or 32_768) // length)
            for name in options.contenders or CONTENDERS:
                row = {"model": name, "size": size, "rows": rows, "seq_len": length}
                found = gpu.attempt(partial(measure, name, size, rows, length, options, ceiling))
                yield row | (found if isinstance(found, dict) else {"error": found})
                _forget()
        if options.million and size == options.size[0]:
            for tokens in (32_768, MILLION):
                row = {
                    "model": "transnormer, in segments of 32,768",
                    "size": size,
                    "rows": 1,
                    "seq_len": tokens,
                }
                found = gpu.attempt(partial(measure_segments, size, tokens))
                yield row | (found if isinstance(found, dict) else {"error": found})
                _forget()


def measure(
    name: str, size: str, rows: int, length: int, options: argparse.Namespace, ceiling: float
) -> dict[str, Any]:
    from lib import gpu
    from lib.trainers import CONTENDERS

    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    trainer = CONTENDERS[name](size)
    ids = torch.randint(ModelConfig.named(size).vocab_size, (rows, length + 1), device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    first_loss = trainer.step(ids).item()
    first = time.perf_counter() - begin
    torch.cuda.empty_cache()
    # which began with steps before the optimizer had its memory
    torch.cuda.reset_peak_memory_stats()
    times = [_event_ms(partial(trainer.step, ids)) for _ in range(options.repeats + 2)][2:]
    energy = gpu.joules(partial(trainer.step, ids), each=4)
    tokens = rows * length / statistics.median(times) * 1e3
    flops = trainer.flops(length)
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "tokens_per_second": round(tokens),
        "flop_share": flops and round(tokens * flops / ceiling, 3),
        "first_step_seconds": round(first, 1),
        "peak_bytes": None if trainer.graph else torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "millijoules_per_token": energy / rows / length * 1e3,
        "times_ms": [round(t, 2) for t in times],
        "losses": [first_loss, trainer.step(ids).item()],
        "note": trainer.note,
    } | ({"profile": gpu.profiled(partial(trainer.step, ids))} if options.profile else {})


def measure_segments(size: str, tokens: int) -> dict[str, Any]:
    """One row of so many tokens, its segments of 32,768 recomputed from the states between them."""
    from lib.trainers import CONTENDERS

    from transnormer.train import segments

    torch.cuda.reset_peak_memory_stats()
    trainer = CONTENDERS["transnormer"](size)
    model = trainer.model
    assert isinstance(model, LanguageModel)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            segments.backward(model, ids[:, :-1], ids[:, 1:], min(32_768, tokens // 2), 1 / tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    times = [_event_ms(step) for _ in range(2 if tokens == MILLION else 8)]
    return {
        "parameters": model.parameter_count(),
        "first_step_seconds": round(first, 1),
        "tokens_per_second": round(tokens / statistics.median(times) * 1e3),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "times_ms": [round(t, 1) for t in times],
    }


def _event_ms(step: Any) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def _forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
