"""Lightning Attention in chunks against plain linear attention (T x T scores and mask), the paper's
comparison.

    python benchmarks/attention.py [--lengths 512 ... 16384] [--heads 2] [--head-dim 64] [--repeats
    3] [--device cpu]

Forward and backward in float32. The plain form is given its mask; neither the mask's time nor its
memory counts."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from lib import record
from torch import Tensor

from transnormer.ops.lightning import lightning_chunked


def decay_mask(log_decay: Tensor, length: int) -> Tensor:
    """[H, T, T] float32: lambda^(i-j) for i >= j, built head by head."""
    place = torch.arange(length, device=log_decay.device, dtype=torch.float32)
    distance = (place[:, None] - place).clamp_(min=0)
    return torch.stack([(distance * rate).exp_().tril_() for rate in log_decay])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1_024, 2_048, 4_096, 8_192, 16_384]
    )
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device, rows = options.device, []
    log_decay = -torch.tensor(
        [2.0 ** (-8 * (h + 1) / options.heads) for h in range(options.heads)], device=device
    )
    for length in options.lengths:
        shape = (1, length, options.heads, options.head_dim)
        inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
        upstream = torch.randn(shape, device=device)
        mask = decay_mask(log_decay, length)

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return ((q @ k.mT * mask) @ v).transpose(1, 2)

        def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lightning_chunked(q, k, v, log_decay)[0]

        def run(
            form: Callable[..., Tensor], inputs: list[Tensor] = inputs, upstream: Tensor = upstream
        ) -> None:
            for x in inputs:
                x.grad = None
            form(*inputs).backward(upstream)

        difference = (plain(*inputs) - chunked(*inputs)).abs().max().item()
        times: dict[str, list[float]] = {"plain": [], "chunked": []}
        for repeat in range(options.repeats + 1):
            for name, form in (("plain", plain), ("chunked", chunked)):
                took = record.time_ms(lambda form=form: run(form), device)  # type: ignore[misc]
                if repeat:
                    times[name].append(took)
        row: dict[str, object] = {
            "seq_len": length,
            "heads": options.heads,
            "head_dim": options.head_dim,
            "difference": difference,
        }
        for name, form in (("plain", plain), ("chunked", chunked)):
            row[f"{name}_ms"] = round(statistics.median(times[name]), 2)
            row[f"{name}_bytes"] = record.peak_bytes(lambda form=form: run(form), device)  # type: ignore[misc]
        rows.append(row)
        print(row)
    print(record.save("attention", device, rows))


if __name__ == "__main__":
    main()
