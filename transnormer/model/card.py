"""The model card that goes with a model's folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..config import ModelConfig
from ..files import write_text
from ..layer_config import POSITIONS, TAPS

CARD = "README.md"


def write_card(folder: Path, config: ModelConfig, parameters: int) -> None:
    """Write README.md where the folder has none: what a person wrote there stays."""
    if not (folder / CARD).exists():
        write_text(folder / CARD, model_card(config, parameters))


def model_card(config: ModelConfig, parameters: int) -> str:
    """Markdown with the front matter that model hubs read. The licence, languages and data are its
    author's to add."""
    tags = ["transnormer"]
    if any(layer.linear for layer in config.layers):
        tags.append("linear-attention")
    return f"""---
library_name: transnormer
pipeline_tag: text-generation
tags:
{chr(10).join(f"- {tag}" for tag in tags)}
---

# TransNormerLLM, {parameters:,} parameters

This is {_kind(config)} (TransNormerLLM, arXiv 2307.14995).

| | |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in _facts(config, parameters).items())}

## Use

With transnormer; `folder` is the one this card lies in:

```python
import transnormer

model = transnormer.load(folder)
print("".join(transnormer.generate(model, "Once", max_tokens=100)))
```

With transformers, which needs no remote code:

```python
import transnormer.hub
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""


def _kind(config: ModelConfig) -> str:
    """What kind of model this is, in words."""
    if config.layer_types is not None:
        return "a language model whose layers have several mixers"
    kinds = {
        "gla": "a language model with linear attention",
        "softmax": "a Transformer language model, a baseline",
    }
    return kinds.get(config.mixer, f"a language model with the mixer {config.mixer}")


def _facts(config: ModelConfig, parameters: int) -> dict[str, str | int]:
    """The rows of the card's table."""
    tied = "tied" if config.tie_word_embeddings else "untied"
    mixer = config.mixer
    if config.layer_types is not None:
        counts = Counter(config.layer_types)
        mixer = ", ".join(f"{word} in {count} layers" for word, count in counts.items())
    return {
        "parameters": f"{parameters:,}",
        "layers": config.num_hidden_layers,
        "width": f"{config.hidden_size:,}",
        "heads": f"{config.num_attention_heads} of {config.head_dim}",
        "inner width": f"{config.intermediate_size:,} ({config.glu})",
        "vocabulary": f"{config.vocab_size:,}, {tied}",
        "token mixer": mixer,
        "positions": f"{config.position}{_positioned_layers(config)}",
        "decay": config.decay,
        "norm": config.norm,
        **_options(config),
        "memory of a text": _memory(config),
    }


def _options(config: ModelConfig) -> dict[str, str]:
    """What the model has that the paper's has not."""
    found = {}
    if config.convolution != "none":
        found["short convolution"] = f"of {TAPS} tokens, {config.convolution}"
    norms = {"q and k": config.qk_norm, "each head's output": config.head_norm}
    if over := [what for what, there in norms.items() if there]:
        found["norms over a head"] = " and ".join(over)
    return found


def _positioned_layers(config: ModelConfig) -> str:
    """Which layers have positions, as the end of a phrase; nothing where none has."""
    if POSITIONS[config.position] is None:
        return ""
    if isinstance(config.position_layers, str):
        return {"first": " in the first layer", "all": " in every layer"}[config.position_layers]
    return f" in layers {list(config.position_layers)}"


def _memory(config: ModelConfig) -> str:
    """How what the model remembers grows with a text."""
    if growth := config.growth_bytes(itemsize=1):
        return f"grows with every token, by {growth:,} numbers"
    if config.linear:
        return "does not grow with the text"
    window = max(layer.window or 0 for layer in config.layers)
    return f"does not grow with the text after {window - 1:,} tokens"
