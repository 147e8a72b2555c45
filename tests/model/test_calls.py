"""States as values, models without rows, on meta and under autocast, and words that somebody
adds."""

from __future__ import annotations

import pytest
import torch

from transnormer import TRANSFORMER, LanguageModel, ModelConfig, State, layer_config
from transnormer.inference.session import Session
from transnormer.model import layers, mixers
from transnormer.model.card import model_card
from transnormer.model.softmax_attention import SoftmaxAttention

SMALL = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
KINDS = {
    "gla": {},
    "lrpe": {"position_layers": "all"},
    "transformer": TRANSFORMER,
    "alibi": {"mixer": "softmax", "position": "none"},
    "ape": {"position": "ape", "norm": "layernorm"},
    "mixed": {
        "layer_types": ["sliding_attention", "linear_attention", "full_attention"],
        "softmax": {"window": 4, "num_key_value_heads": 1},
    },
}


def small(**changes) -> LanguageModel:
    return LanguageModel(ModelConfig(**{**SMALL, "initializer_range": 0.3, **changes})).eval()


@pytest.fixture(params=KINDS)
def model(request) -> LanguageModel:
    return small(**KINDS[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(29, (3, 12))


# States.


@pytest.mark.parametrize(
    ("rows", "taken"),
    [
        (torch.tensor([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
        (torch.tensor([False] * 3), []),
        ([2, 0, 0, -1], [2, 0, 0, 2]),
        (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
        ([], []),
    ],
    ids=str,
)
def test_rows_are_taken_by_number_or_by_a_mask(rows, taken, model, ids) -> None:
    state = model(ids)[1]
    found = state.select(rows)
    assert torch.equal(found.seen, state.seen[taken])
    for layer, whole in zip(found.layers, state.layers, strict=True):
        assert all(
            torch.equal(part, all_rows[taken]) for part, all_rows in zip(layer, whole, strict=True)
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0.0, 2.0]), "integers, or a mask of 3 bools; got .* torch.float32"),
        ([3], r"holds 3 rows; got \[3\]"),
        ([-4, 0], r"holds 3 rows; got \[-4, 0\]"),
        ([True, False], "the state's 3 rows has as many bools; got 2"),
        (torch.ones(1, 3, dtype=torch.bool), "a mask of 3 bools; got"),
        (1, "integers, or a mask"),
    ],
    ids=str,
)
def test_other_rows_are_refused(rows, message, ids) -> None:
    state = State.new(small(), 3)
    with pytest.raises(ValueError, match=message):
        state.select(rows)


@pytest.mark.parametrize(("one", "other"), [("gla", "transformer"), ("transformer", "gla")])
def test_a_state_of_another_model_is_refused(one, other, ids) -> None:
    for depth, message in (
        (2, "with 2 layers, this one has 3"),
        (4, "with 4 layers, this one has 3"),
    ):
        deeper = small(**{**KINDS[one], "num_hidden_layers": depth})
        with pytest.raises(ValueError, match=message):
            small(**KINDS[one])(ids, deeper(ids)[1])
    state = small(**KINDS[one])(ids)[1]
    with pytest.raises(ValueError, match="the state of a layer is"):
        small(**KINDS[other])(ids, state)
    with pytest.raises(ValueError, match=r"state must be|the state of a layer is"):
        small(**{**KINDS[one], "head_dim": 4})(ids, state)


def test_gradients_go_on_from_what_a_session_read(model) -> None:
    """A state is a value, also where it was made in inference mode."""
    session = Session(model)
    session.read([3, 1, 4, 1, 5])
    ids = torch.tensor([[9, 2, 6]])
    want = [x.detach() for x in model.hidden(torch.tensor([[3, 1, 4, 1, 5]]))[1].layers[0]]
    with torch.inference_mode():
        expected, _ = model(ids, session.state)
    logits, _ = model(ids, session.state)
    torch.testing.assert_close(logits, expected.clone())
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for part, wanted in zip(session.state.layers[0], want, strict=True):
        torch.testing.assert_close(part.clone(), wanted)
    pieces = session.state.select([0, 0])
    model.loss(ids.expand(2, -1), ids.expand(2, -1), pieces).backward()


# No rows.


def test_no_rows_give_no_logits(model) -> None:
    ids = torch.zeros(0, 5, dtype=torch.int64)
    state = None
    for pad in (None, torch.zeros(0, dtype=torch.int64)):
        logits, state = model(ids, state, pad=pad)
        assert logits.shape == (0, 5, 29)
        assert len(state.seen) == 0
    logits.sum().backward()
    assert model.loss(ids, ids) == 0
    assert model(ids[:, :1], state)[0].shape == (0, 1, 29)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[N \+ 1\], N at least 1"):
        model(torch.zeros(1, 0, dtype=torch.int64), cu_seqlens=torch.tensor([0]))


# Devices and precision.


def test_weights_assigned_to_a_model_on_meta_bring_its_decays(model, ids) -> None:
    with torch.device("meta"):
        empty = LanguageModel(model.config)
    assert empty(ids)[0].is_meta if model.config.position in ("none", "ape") else True
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(ids)[0], model(ids)[0])


def test_decays_left_on_meta_are_refused(model, ids) -> None:
    for block in model.blocks():
        block.mixer.log_decay = block.mixer.log_decay.to("meta")
    with pytest.raises(ValueError, match=r"one device; got .*log_decay on meta"):
        model(ids)


def test_a_model_on_meta_tells_the_shapes(model, ids) -> None:
    empty = model.to("meta")
    logits, state = empty(ids.to("meta"))
    assert logits.is_meta
    assert logits.shape == (3, 12, 29)
    assert all(part.is_meta for layer in state.layers for part in layer)


def test_autocast_leaves_softmax_attention_its_decays() -> None:
    """Distances over 256 are no numbers of bfloat16, and far keys would have the decay of
    others."""
    torch.manual_seed(0)
    mixer = SoftmaxAttention(
        ModelConfig(**SMALL, mixer="softmax", position="none", decay_scale=0.02), 0
    )
    q, k, v = (torch.randn(1, 1_500, 3, 8) for _ in range(3))
    tokens = layers.TokenPositions(torch.arange(1_500))
    want, _ = mixer._attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = mixer._attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, tokens)
    assert torch.equal(found, want)


# Words that somebody adds. `tests/test_contributing.py` adds more of them to a copy of the package.


@pytest.fixture
def add(monkeypatch):
    """Adds a word to layer_config.py with its facts, and to its table in the model."""

    def add(tables: str, word: str, facts: object, made: object) -> None:
        monkeypatch.setitem(getattr(layer_config, tables), word, facts)
        monkeypatch.setitem(getattr(mixers if tables == "MIXERS" else layers, tables), word, made)

    return add


def test_every_word_has_its_facts_and_its_class() -> None:
    assert layer_config.MIXERS.keys() == mixers.MIXERS.keys()
    assert layer_config.NORMS.keys() == layers.NORMS.keys()
    assert {
        word for word, facts in layer_config.POSITIONS.items() if facts
    } == layers.POSITIONS.keys()
    assert set(layer_config.ACTIVATIONS) == layers.ACTIVATIONS.keys()
    assert set(layer_config.GLUS) == layers.GLUS.keys()


def test_a_new_position_is_called(add, ids) -> None:
    class Reversed(torch.nn.Module):
        def __init__(self, _: ModelConfig):
            super().__init__()

        def forward(self, q, k, tokens):
            sign = torch.where(tokens.positions % 2 == 0, 1, -1)[:, None, None]
            return q * sign, k

    add("POSITIONS", "reversed", layer_config.PositionFacts(), Reversed)
    torch.manual_seed(1)
    model = small(position="reversed")
    torch.manual_seed(1)
    plain = small(position="none")
    assert (model(ids)[0] - plain(ids)[0]).abs().max() > 1e-3
    assert model.config.parameter_count() == model.parameter_count()
    assert "reversed in the first layer" in model_card(model.config, 1)


class Twin(mixers.GatedLinearAttention):
    """The state in two halves, as a mixer with two states would have it."""

    def new_state(self, rows):
        return tuple(super().new_state(rows)[0].chunk(2, -1))

    def forward(self, x, state, tokens):
        y, (after,) = super().forward(x, None if state is None else (torch.cat(state, -1),), tokens)
        return y, tuple(after.chunk(2, -1))


TWIN = layer_config.MixerFacts(fixed_state=True, norm=True)


def test_a_new_mixer_is_carded_written_with_and_not_planned_without_a_measurement(add, ids) -> None:
    from transnormer.planning.speed import passes_share

    add("MIXERS", "twin", TWIN, Twin)
    model = small(mixer="twin")
    assert model.config.parameter_count() == model.parameter_count()
    whole, _ = model(ids)
    _, state = model(ids[:, :5])
    torch.testing.assert_close(model(ids[:, 5:], state)[0], whole[:, 5:], rtol=1e-4, atol=1e-4)
    card = model_card(model.config, 1)
    assert "with the mixer twin" in card
    assert "does not grow" in card
    assert model.flops_per_token(64) == small().flops_per_token(64)
    with pytest.raises(
        ValueError, match=r"no run with model.mixer = twin was measured: plans know gla, softmax"
    ):
        passes_share(model.config)


def test_softmax_alone_is_refused_where_a_size_is_changed() -> None:
    with pytest.raises(
        ValueError, match=r"mixer = softmax alone keeps .*lrpe.*alibi.*swish.*TRANSFORMER"
    ):
        ModelConfig.named("10m", mixer="softmax")
    for words in (TRANSFORMER, {"mixer": "softmax", "position": "rope"}):
        assert ModelConfig.named("10m", **words).mixer == "softmax"
