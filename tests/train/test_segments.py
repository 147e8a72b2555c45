"""Rows in segments: the gradients of the whole row, in the memory of a segment."""

from __future__ import annotations

import pytest
import torch

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.train import segments

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}

SLIDING = {
    "layer_types": ["sliding_attention", "linear_attention", "sliding_attention"],
    "softmax": {"window": 9, "num_key_value_heads": 1},
}


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("segment", [7, 16, 40, 64])
@pytest.mark.parametrize(
    "kind",
    [{}, {"position_layers": "all", "gate_rank": 4, "norm": "rmsnorm"}, SLIDING],
    ids=["plain", "other", "sliding"],
)
def test_gradients_are_those_of_the_whole_row(kind: dict, segment: int) -> None:
    model = LanguageModel(ModelConfig(**SMALL, **kind)).double()
    ids = torch.randint(50, (2, 41))
    targets = ids[:, 1:].clone()
    targets[0, :9] = -100
    whole = model.loss(ids[:, :-1], targets, reduction="sum") / 70
    whole.backward()
    want = gradients(model)
    total = segments.backward(model, ids[:, :-1], targets, segment, 1 / 70)
    assert abs(total.item() - whole.item()) < 1e-12
    found = gradients(model)
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_a_convolution_may_read_what_is_not_trained() -> None:
    """Adapters leave the embedding as it is, and a convolution remembers rows of it."""
    model = LanguageModel(ModelConfig(**SMALL, convolution="input", decay="delta")).double()
    model.embed_tokens.weight.requires_grad_(False)
    ids = torch.randint(50, (2, 41))
    model.loss(ids[:, :-1], ids[:, 1:], reduction="sum").backward()
    want = gradients(model)
    segments.backward(model, ids[:, :-1], ids[:, 1:], 7, 1.0)
    found = gradients(model)
    assert want.pop("embed_tokens.weight") is None is found["embed_tokens.weight"]
    for name, gradient in want.items():
        assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_they_are_not_those_of_a_cut_gradient() -> None:
    model = LanguageModel(ModelConfig(**SMALL)).double()
    ids = torch.randint(50, (1, 41))
    segments.backward(model, ids[:, :-1], ids[:, 1:], 20, 1.0)
    exact = gradients(model)["layers.0.mixer.qkvu_proj.weight"]
    state = None
    for part in (slice(0, 20), slice(20, 40)):
        x, state = model.hidden(ids[:, part], None if state is None else state.clone())
        torch.nn.functional.cross_entropy(
            (x @ model.head_weight.T)[0], ids[0, 1:][part], reduction="sum"
        ).backward()
        state = type(state)(
            [tuple(p.detach() for p in layer) for layer in state.layers], state.seen
        )
    assert (
        gradients(model)["layers.0.mixer.qkvu_proj.weight"] - exact
    ).norm() > 1e-3 * exact.norm()


def test_softmax_attention_is_refused() -> None:
    model = LanguageModel(ModelConfig(**SMALL, **TRANSFORMER))
    with pytest.raises(ValueError, match="needs linear attention"):
        segments.backward(
            model,
            torch.zeros(1, 4, dtype=torch.int64),
            torch.zeros(1, 4, dtype=torch.int64),
            2,
            1.0,
        )
