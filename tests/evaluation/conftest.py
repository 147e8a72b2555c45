"""Small models for the harness, and its own backend with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.data.tokenizer import END_OF_TEXT, load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "linear": {},
    "softmax": TRANSFORMER,
    "alibi": TRANSFORMER | {"position": "none", "decay": "alibi"},
}


def requests(arguments: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    """The harness' own requests of a kind, one for each tuple of arguments."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, words, 0, metadata=("task", 0, 1)) for words in arguments]


@pytest.fixture(scope="session")
def make(prepared: Path) -> Callable[..., LanguageModel]:
    """A small model with a tokenizer, the same for the same words."""
    tokenizer = load_tokenizer(prepared)

    def build(kind: str, **changes: Any) -> LanguageModel:
        torch.manual_seed(1)
        model = LanguageModel(ModelConfig(**{**SMALL, **KINDS[kind], **changes})).eval()
        model.tokenizer = tokenizer
        return model

    return build


@pytest.fixture(scope="session")
def llama(make: Callable[..., LanguageModel]) -> HFLM:
    """The softmax model's weights in transformers' own Llama, in the harness' own backend."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = make("softmax")
    config = model.config
    names = {
        "mixer_norm": "input_layernorm", "glu_norm": "post_attention_layernorm",
        "mixer.out_proj": "self_attn.o_proj",
        "glu.": "mlp.",
    }  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "qkvu_proj" in name:
            for letter, part in zip(
                "qkv",
                tensor.unflatten(0, (config.num_attention_heads, 3, -1)).unbind(1),
                strict=True,
            ):
                weights[f"model.{name}".replace("mixer.qkvu", f"self_attn.{letter}")] = (
                    part.flatten(0, 1)
                )
        else:
            weights[f"model.{name}"] = tensor
    twin = LlamaForCausalLM(
        LlamaConfig(
            **{key: value for key, value in SMALL.items() if key != "initializer_range"},
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=True,
            max_position_embeddings=4_096,
        )
    ).eval()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the embedding's own
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer, eos_token=END_OF_TEXT)
    return HFLM(twin, tokenizer=tokenizer, batch_size=4)
