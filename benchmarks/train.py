"""Training speed: TransNormerLLM and the softmax Transformer of the same width and depth, interleaved in one run.

    python benchmarks/train.py [--size 10m] [--lengths 512 4096] [--batch-tokens 4096] [--repeats 5] [--device cpu]

A step is loss, backward and AdamW on random ids. Tokens per second are of the median step; the share is of the matrix
product's measured rate, by the model's own operations (`flops_per_token`).
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import record
import torch

from transnormer import TRANSFORMER, LanguageModel, ModelConfig

KINDS = {"transnormer": {}, "transformer": TRANSFORMER}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="10m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, rows = options.device, []
    ceilings = {name: record.matmul_flops(device, dtype) for name, dtype in DTYPES.items()}
    for name, ceiling in ceilings.items():
        print(f"matrix product, {name}: {ceiling / 1e9:,.0f} GFLOP/s")
    models = {name: LanguageModel(ModelConfig.named(options.size, **kind)).to(device) for name, kind in KINDS.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}

    def step(name: str, ids: torch.Tensor, dtype: str) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = models[name].loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    for length in options.lengths:
        for dtype in DTYPES:
            shape = (max(1, options.batch_tokens // length), length + 1)
            ids = torch.randint(models["transnormer"].config.vocab_size, shape, device=device)
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(options.repeats + 1):
                for name in models:
                    took = record.time_ms(partial(step, name, ids, dtype), device)
                    if repeat:
                        times[name].append(took)
            for name, model in models.items():
                tokens = shape[0] * length / statistics.median(times[name]) * 1e3
                rows.append({
                    "model": name, "size": options.size, "parameters": model.parameter_count(), "seq_len": length,
                    "rows": shape[0], "dtype": dtype, "tokens_per_second": round(tokens, 1),
                    "flop_share": round(tokens * model.flops_per_token(length, chunk=64) / ceilings[dtype], 3),
                    "times_ms": [round(t, 1) for t in times[name]],
                })  # fmt: skip
            ours, theirs = rows[-2:]
            ours["over_transformer"] = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3)
            print(f"{options.size}, T = {length}, {dtype}: {ours['tokens_per_second']:,.0f} and "
                  f"{theirs['tokens_per_second']:,.0f} tokens/s, {ours['over_transformer']:.2f} times")  # fmt: skip
    print(record.save("train", device, rows, matmul_flops=ceilings))


if __name__ == "__main__":
    main()
