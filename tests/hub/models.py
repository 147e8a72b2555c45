"""Small models of every kind, and what the tests read with them."""

from __future__ import annotations

import torch

from transnormer import LanguageModel, ModelConfig
from transnormer.config import TRANSFORMER
from transnormer.inference.sampling import Sampling
from transnormer.inference.session import Session

from ..lazy import Lazy

hf = Lazy("transnormer.hub.hf")

VOCAB = 300
KINDS = {
    "tied": {},
    "untied": {
        "tie_word_embeddings": False,
        "position_layers": "all",
        "gate_rank": 5,
        "embed_scale": True,
    },
    "softmax": TRANSFORMER,
    "alibi": {"mixer": "softmax", "tie_word_embeddings": False, "position": "none"},
    "mixed": {
        "layer_types": ["sliding_attention", "linear_attention", "full_attention"],
        "softmax": {"window": 6, "num_key_value_heads": 1},
    },
    "convolved": {
        "layer_types": ["sliding_attention", "linear_attention", "full_attention"],
        "softmax": {"window": 6, "num_key_value_heads": 1},
        "convolution": "heads",
        "qk_norm": True,
        "head_norm": True,
    },
}
TARGETS = {"qkvu_proj", "out_proj", "gate_proj", "up_proj", "down_proj"}
GREEDY = {"do_sample": False, "max_new_tokens": 9}


def small(**changes) -> LanguageModel:
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(0)
    return LanguageModel(config).eval()


def draw(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length))


def padded(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, width] with arbitrary padding at the left, and their mask."""
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return draw(len(lengths), width), mask


def cache_of(output):
    return output[hf.CACHE]


def engine(own: LanguageModel, ids: torch.Tensor, count: int = 9) -> list[int]:
    session = Session(own)
    session.read(ids[0].tolist())
    return list(session.write(count, Sampling(temperature=0)))
