"""Decoding by the engine: tokens/s of one text and of many, beside what the memory allows and a
LLaMA of transformers.

    python benchmarks/engine.py [--size 385m] [--texts 1 16 64 256] [--contexts 128 16384]
    [--ways parts recorded fused] [--sampling top_p greedy] [--peer] [--device cuda]

Of several contexts only one text is measured. A step reads all weights once, and reads and writes
the state of each text: `gb_per_second` counts these bytes, to be compared with those of a copy."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lib import gpu, record

from transnormer import Engine, LanguageModel, ModelConfig, RequestSettings
from transnormer.model import fused_step
from transnormer.ops import draw

STEPS = 100  # that are timed; as many tokens of each text
WARM = 8
SAMPLING: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "greedy": {"temperature": 0},
}
# Whether steps are recorded as CUDA graphs, blocks take `fused_step`, and drawing takes its kernel.
WAYS = {
    "parts": (False, False, False),
    "recorded": (True, False, False),
    "drawn": (True, False, True),
    "fused": (True, True, True),
}


def weights_bytes(model: torch.nn.Module) -> int:
    """What a step reads of the weights: all, of which the head is one. An embedding that is not
    the head is read a row a text."""
    return sum(p.nbytes for p in model.parameters())


def engine_row(
    model: LanguageModel, texts: int, context: int, way: str, sampling: str, device: str
) -> dict[str, Any]:
    """Median time of a step of so many texts after so many tokens each."""
    records, fused_step.BY_DEFAULT, draw.BY_DEFAULT = WAYS[way]
    engine = Engine(
        model,
        slots=texts,
        capacity=0 if model.config.bounded else context + STEPS + WARM + texts + 8,
        record=records and device == "cuda",
    )
    most = STEPS + WARM + texts + 8  # those that were read first have written some when all have
    settings = RequestSettings(max_tokens=most, stop_ids=(), **SAMPLING[sampling])
    vocab = model.config.vocab_size
    began = time.perf_counter()
    handles = [
        engine.submit(torch.randint(vocab, (context,)).tolist(), settings) for _ in range(texts)
    ]
    while not all(handle.tokens for handle in handles):
        engine.step()
    reading = time.perf_counter() - began
    for _ in range(WARM):
        engine.step()
    times = [record.time_ms(engine.step, device) for _ in range(STEPS)]
    moved = weights_bytes(model) + 2 * engine.stats().state_bytes
    row = {"texts": texts, "context": context, "way": way, "sampling": sampling}
    return row | figures(statistics.median(times), texts, moved) | {"reading_s": round(reading, 3)}


def figures(step_ms: float, texts: int, moved: int) -> dict[str, Any]:
    return {
        "step_ms": round(step_ms, 4),
        "tokens_per_second": round(texts * 1e3 / step_ms, 1),
        "gb_per_second": round(moved / step_ms / 1e6, 1),
    }


def llama_step(config: ModelConfig, texts: int, context: int, device: str) -> Callable[[], Any]:
    """A step of a LLaMA of the same size in transformers: a static cache, one graph (which
    fullgraph=True asserts), greedy. And what its step reads."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=context + 2 * STEPS,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = LlamaForCausalLM(theirs).to(device, dtype).eval()
    cache = StaticCache(config=theirs, max_cache_len=context + 2 * STEPS)
    ids = torch.randint(config.vocab_size, (texts, context), device=device)
    with torch.inference_mode():
        for start in range(0, context, 2_048):
            piece = ids[:, start : start + 2_048]
            model(piece, past_key_values=cache, logits_to_keep=1)
    position = torch.tensor([[context]], device=device)
    token = ids[:, :1].clone()

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        found = model(token, past_key_values=cache, position_ids=position, logits_to_keep=1)
        return found.logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    mode = "reduce-overhead" if device == "cuda" else None
    compiled = torch.compile(step, fullgraph=True, mode=mode)

    @torch.inference_mode()
    def call() -> None:
        token.copy_(compiled(token, position))
        position.add_(1)

    call.moved = sum(p.nbytes for p in model.parameters()) + sum(  # type: ignore[attr-defined]
        layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
    )
    return call


def llama_row(config: ModelConfig, texts: int, context: int, device: str) -> dict[str, Any]:
    call = llama_step(config, texts, context, device)
    for _ in range(WARM):
        call()
    times = [record.time_ms(call, device) for _ in range(STEPS)]
    row = {"texts": texts, "context": context, "way": "LLaMA, transformers", "sampling": "greedy"}
    return row | figures(statistics.median(times), texts, call.moved)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="385m")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 16_384])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--sampling", nargs="+", choices=SAMPLING, default=[*SAMPLING])
    parser.add_argument("--peer", action="store_true", help="a LLaMA of transformers beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    facts = gpu.attempt(gpu.ceilings) if options.device == "cuda" else {}
    config = ModelConfig.published(options.size)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = LanguageModel(config).to(options.device, dtype).eval()
    shortest, *longer = sorted(options.contexts)
    cases = [*((texts, shortest) for texts in options.texts), *((1, each) for each in longer)]
    rows = []
    for texts, context in cases:
        calls = [
            partial(engine_row, model, texts, context, way, sampling, options.device)
            for way in options.ways
            for sampling in options.sampling
        ]
        if options.peer:
            calls.append(partial(llama_row, config, texts, context, options.device))
        for call in calls:
            found = gpu.attempt(call)
            failed = {"texts": texts, "context": context, "failed": found}
            rows.append(failed if isinstance(found, str) else found)
            print(rows[-1], flush=True)
    print(record.save("engine", options.device, rows, size=options.size, ceilings=facts))


if __name__ == "__main__":
    main()
