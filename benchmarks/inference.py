"""Decoding: the time and memory of a token after a short and a long text, TransNormerLLM beside the
Transformer.

    python benchmarks/inference.py [--size 10m] [--contexts 64 1024 4096 16384] [--tokens 200]
    [--device cpu]

The contexts of one model are decoded in turn, token by token, so that all meet the same moments of
the machine. Also: what `import transnormer` costs beside `import torch`."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from functools import partial

import torch
from lib import record

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.inference.engine import Session
from transnormer.inference.sampling import Sampling


def import_seconds(repeats: int = 7) -> dict[str, float]:
    """Median seconds of importing in a fresh process, the two taken in turn."""
    times: dict[str, list[float]] = {"torch": [], "transnormer": []}
    for _ in range(repeats):
        for module, seen in times.items():
            code = (
                f"import time; t = time.perf_counter(); import torch, {module}; "
                "print(time.perf_counter() - t)"
            )
            seen.append(
                float(
                    subprocess.run(
                        [sys.executable, "-c", code], capture_output=True, text=True
                    ).stdout
                )
            )
    return {
        f"import_{module}_s": round(statistics.median(seen), 3) for module, seen in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="10m")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1_024, 4_096, 16_384])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, imports = [], import_seconds()
    print(imports)
    for name, kind in (("transnormer", {}), ("transformer", TRANSFORMER)):
        model = LanguageModel(ModelConfig.named(options.size, **kind)).to(options.device).eval()
        sessions, times = {}, {}
        for context in options.contexts:
            sessions[context] = Session(model)
            sessions[context].read(torch.randint(model.config.vocab_size, (context,)).tolist())
            times[context] = [0.0] * 0
        writers = {
            n: session.write(options.tokens + 12, Sampling(temperature=0))
            for n, session in sessions.items()
        }
        for token in range(options.tokens + 10):
            for context, writer in writers.items():
                took = record.time_ms(partial(next, writer), options.device)
                if token >= 10:
                    times[context].append(took)
        for context, writer in writers.items():
            state = sessions[context].state
            assert state is not None
            rows.append(
                {
                    "model": name,
                    "size": options.size,
                    "context_tokens": context,
                    "token_ms": round(statistics.median(times[context]), 3),
                    "peak_bytes": record.peak_bytes(partial(next, writer), options.device),
                    "state_bytes": state.nbytes,
                }
            )
            print(rows[-1])
    print(record.save("inference", options.device, rows, **imports))


if __name__ == "__main__":
    main()
