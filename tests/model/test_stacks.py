"""Stacks of several mixers: every way of reading gives the same, windows are what a loop says, and
layers read settings of their own."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from transnormer import SIZES, TRANSFORMER, LanguageModel, ModelConfig, State
from transnormer.cli.info import _say_model
from transnormer.inference.sampling import Sampling
from transnormer.inference.session import Session
from transnormer.layer_config import FULL, LINEAR, SLIDING, SoftmaxSettings
from transnormer.model import softmax_attention
from transnormer.model.card import model_card
from transnormer.model.layers import TokenPositions
from transnormer.model.softmax_attention import SoftmaxAttention

from .test_language_model import SMALL as BASE
from .test_language_model import STACK as MIXED
from .test_language_model import small as build

SMALL = {**BASE, "num_attention_heads": 4, "initializer_range": 0.3}


def small(dtype: torch.dtype = torch.float64, **changes: Any) -> LanguageModel:
    return build(dtype, **{"num_attention_heads": 4, **changes})


def drawn(seed: int) -> dict[str, Any]:
    """A random stack."""
    draw = random.Random(seed)
    types = [draw.choice((LINEAR, SLIDING, FULL)) for _ in range(3)]
    types[draw.randrange(3)] = draw.choice((SLIDING, FULL))
    position = draw.choice(("rope", "lrpe", "none"))
    heads = draw.choice((2, 4, 6))
    return {
        "mixer": "gla" if LINEAR in types else "softmax",
        "layer_types": types,
        "position": draw.choice(("lrpe", "rope", "none", "ape")),
        "position_layers": draw.choice(("first", "all")),
        "gate_rank": draw.choice((None, 3)),
        "softmax": {
            "position": position,
            "decay": draw.choice(("none", "alibi")),
            "activation": draw.choice(("none", "swish")),
            "gate": draw.random() < 0.5,
            "num_attention_heads": heads,
            "num_key_value_heads": heads if position == "lrpe" else draw.choice((1, 2, heads)),
            "window": draw.choice((2, 5, 16, 100)) if SLIDING in types else None,
        },
        "convolution": draw.choice(("none", "input", "heads")),
        "qk_norm": draw.random() < 0.5,
        "head_norm": draw.random() < 0.5 and LINEAR in types,
    }


@pytest.mark.parametrize("seed", range(12))
@torch.inference_mode()
def test_every_way_of_reading_gives_the_same(seed: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(softmax_attention, "MIN_QUERY_BLOCK", 3)
    model = small(**drawn(seed))
    assert model.parameter_count() == model.config.parameter_count()
    ids = torch.randint(29, (2, 40))
    whole, end = model(ids)

    def same(logits: Tensor, expected: Tensor) -> None:
        assert (logits - expected).abs().max() <= 1e-9 * whole.abs().max()

    for cuts in ([1, 9, 30], range(1, 40)):
        state, pieces = None, []
        for start, stop in itertools.pairwise([0, *cuts, 40]):
            logits, state = model(ids[:, start:stop], state)
            pieces.append(logits)
        same(torch.cat(pieces, dim=1), whole)
        for layer, wanted in zip(state.layers, end.layers, strict=True):
            for part, other in zip(layer, wanted, strict=True):
                assert part.shape == other.shape
                assert (part - other).abs().max() <= 1e-9 * max(1, other.abs().max())

    # Packed sequences, one empty, then their continuations; saved and read between them.
    packed, state = model(
        torch.cat([ids[0, :7], ids[1, :31]])[None], cu_seqlens=torch.tensor([0, 7, 7, 38])
    )
    same(packed[0], torch.cat([whole[0, :7], whole[1, :31]]))
    state.save(tmp_path / "state.safetensors")
    state = State.load(tmp_path / "state.safetensors", model).clone().select([0, 2])
    rest = torch.cat([ids[0, 7:], ids[1, 31:]])[None]
    packed, _ = model(rest, state, cu_seqlens=torch.tensor([0, 33, 42]))
    same(packed[0], torch.cat([whole[0, 7:], whole[1, 31:]]))

    # Rows of unequal length, padded at the left; then on with padding again.
    left = torch.cat([torch.randint(29, (1, 13)), ids[:1, :17]], dim=1)
    padded, state = model(torch.cat([left, ids[1:, :30]]), pad=torch.tensor([13, 0]))
    same(padded[0, 13:], whole[0, :17])
    same(padded[1], whole[1, :30])
    left = torch.cat([torch.randint(29, (1, 13)), ids[1:, 30:]], dim=1)
    padded, _ = model(torch.cat([ids[:1, 17:], left]), state, pad=torch.tensor([0, 13]))
    same(padded[0], whole[0, 17:])
    same(padded[1, 13:], whole[1, 30:])


def looped(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, window: int) -> Tensor:
    """The specification: each query's softmax over the keys that it sees, one after another."""
    _, length, heads, width = q.shape
    group, output = heads // k.shape[2], torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for t, h in itertools.product(range(length), range(heads)):
        first = max(0, t + 1 - window)
        scores = k[0, first : t + 1, h // group] @ q[0, t, h] * width**-0.5
        distances = torch.arange(t - first, -1, -1)
        weights = (scores + log_decay[h].double() * distances).softmax(0)
        output[0, t, h] = weights @ v[0, first : t + 1, h // group]
    return output


@pytest.mark.parametrize("decay", ["none", "alibi"])
@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize(("window", "groups"), [(2, 4), (5, 2), (12, 1), (40, 4)])
def test_a_window_is_what_the_loop_says(
    window: int, groups: int, block: int, decay: str, monkeypatch
) -> None:
    monkeypatch.setattr(softmax_attention, "MIN_QUERY_BLOCK", block)
    settings = {"window": window, "num_key_value_heads": groups, "decay": decay}
    config = ModelConfig(**SMALL, **TRANSFORMER, layer_types=[SLIDING] * 3, softmax=settings)
    mixer = SoftmaxAttention(config, 1).double()
    q, k, v = (torch.randn(1, 23, heads, 6).double() for heads in (4, groups, groups))
    want = looped(q, k, v, mixer.log_decay, window)
    tokens = TokenPositions(torch.arange(23))
    found, state = mixer._attend(q, k, v, None, tokens)
    torch.testing.assert_close(found, want)
    kept = min(23, window - 1)
    for part, whole in zip(state, (k, v), strict=True):
        assert torch.equal(part, whole[:, 23 - kept :])
        assert part.untyped_storage().nbytes() == part.nbytes or kept == 23  # and no more
    state, outputs = None, []
    for t in range(23):
        seen = None if t == 0 else torch.tensor([t])
        one = slice(t, t + 1)
        place = TokenPositions(torch.arange(t, t + 1), seen)
        output, state = mixer._attend(q[:, one], k[:, one], v[:, one], state, place)
        outputs.append(output)
        assert state[0].shape[1] == min(t + 1, window - 1)
    torch.testing.assert_close(torch.cat(outputs, dim=1), want)


def test_no_token_sees_a_later_one_or_one_out_of_the_windows() -> None:
    model = small(**TRANSFORMER, layer_types=[SLIDING] * 3, softmax={"window": 4})
    ids = torch.randint(29, (1, 30))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 29
    differs = (model(ids)[0] - model(changed)[0]).abs().amax(-1)[0] > 1e-12
    # through three layers a token reaches three more for each
    assert differs.nonzero().flatten().tolist() == list(range(10, 10 + 3 * 3 + 1))


def test_layers_have_the_settings_of_their_own() -> None:
    """In a stack with linear layers those of the baseline, in another one the model's."""
    baseline = ModelConfig(**SMALL, **TRANSFORMER)
    assert ModelConfig(**SMALL, layer_types=[LINEAR, LINEAR, FULL]).layers[2] == baseline.layers[2]
    torch.manual_seed(3)
    words = {**TRANSFORMER, "gate": True, "decay": "alibi", "position_layers": [1]}
    uniform = small(**words)
    stacked = small(**words, layer_types=[FULL, SLIDING, FULL])
    stacked.load_state_dict(uniform.state_dict())
    ids = torch.randint(29, (2, 20))
    assert torch.equal(stacked(ids)[0], uniform(ids)[0])
    assert [layer.position for layer in stacked.config.layers] == ["none", "rope", "none"]
    grouped = stacked.config.replace(softmax={"gate": False, "num_key_value_heads": 2})
    assert {(layer.gate, layer.decay, layer.group) for layer in grouped.layers} == {
        (False, "alibi", 2)
    }
    assert stacked.config.replace(layer_types=None) == uniform.config
    mixed = small(**MIXED)
    kinds = [type(block.mixer).__name__ for block in mixed.blocks()]
    assert kinds == ["GatedLinearAttention", "SoftmaxAttention", "SoftmaxAttention"]
    assert [layer.position for layer in mixed.config.layers] == ["lrpe", "rope", "rope"]
    # the first layer of those that read it
    later = mixed.config.replace(layer_types=[FULL, LINEAR, LINEAR], softmax=None)
    assert [layer.position for layer in later.layers] == ["rope", "lrpe", "none"]
    assert mixed.config.log_decay(2) == [0.0] * 4 != mixed.config.log_decay(0)
    assert mixed.blocks()[2].mixer.parts == 3  # no gate


def test_memory_is_what_the_config_says() -> None:
    model = small(torch.float32, **MIXED)
    for length in (3, 10, 30):
        _, state = model(torch.randint(29, (1, length)))
        held = state.nbytes - state.seen.nbytes
        assert held == model.config.state_bytes(length)
    grows = model.config.state_bytes(31) - model.config.state_bytes(30)
    assert grows == model.config.growth_bytes() == 2 * 4 * 24
    assert model.config.growth_bytes(1) * 4 == model.config.growth_bytes()
    convolved = model.config.replace(convolution="heads")
    assert convolved.growth_bytes(1) * 4 == model.config.growth_bytes()
    assert not model.config.bounded
    bounded = model.config.replace(layer_types=[LINEAR, SLIDING, SLIDING])
    assert bounded.bounded
    assert not bounded.linear
    assert bounded.growth_bytes() == 0


def test_a_state_of_other_windows_is_refused(tmp_path) -> None:
    model = small(torch.float32, **MIXED)
    _, state = model(torch.randint(29, (2, 20)))
    state.select([1]).save(tmp_path / "state.safetensors")
    State.load(tmp_path / "state.safetensors", model)
    for types, window in (([LINEAR, FULL, SLIDING], 6), (MIXED["layer_types"], 9)):
        other = small(torch.float32, layer_types=types, softmax={"window": window})
        with pytest.raises(ValueError, match=r"layer 1 holds keys of 5 tokens after 20 were read"):
            State.load(tmp_path / "state.safetensors", other)


def test_sessions_write_with_any_stack(tmp_path) -> None:
    model = small(torch.float32, **MIXED)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    assert again.config == model.config
    session = Session(again)
    session.read([3, 1, 4, 1, 5])
    written = list(session.fork().write(12, Sampling(temperature=0)))
    ids = [3, 1, 4, 1, 5]
    for token in written:
        assert int(model(torch.tensor([ids]))[0][0, -1].argmax()) == token
        ids.append(token)


def test_flops_count_each_layer_for_itself() -> None:
    uniform = small(**TRANSFORMER).flops_per_token(64)
    assert small(**TRANSFORMER, layer_types=[FULL] * 3).flops_per_token(64) == uniform
    slides = small(**TRANSFORMER, layer_types=[SLIDING] * 3, softmax={"window": 16})
    # 1, 2, ..., 16, 16, ... keys; half of the last one is not counted, as without a window
    visible = (16**2 / 2 + 48 * 16) / 64
    assert uniform - slides.flops_per_token(64) == 3 * 3 * 4 * 2 * (32 - visible) * (6 + 6)


def test_the_card_and_info_say_whether_memory_grows(tmp_path, capsys) -> None:
    stacks = {
        "grows with every token, by 48 numbers": MIXED,
        "does not grow with the text after 5 tokens": {
            **MIXED,
            "layer_types": [LINEAR, SLIDING, SLIDING],
        },
        "does not grow with the text |": {},
    }
    told = ["grows by 192 bytes with every token", "grows by 0 bytes a token", "whatever the"]
    for (line, words), said in zip(stacks.items(), told, strict=True):
        model = small(torch.float32, **words)
        text = model_card(model.config, 1)
        assert line in text
        assert ("linear_attention in 1 layers" in text) == bool(words)
        _say_model(model)
        assert said in capsys.readouterr().out


# The record.


def test_a_uniform_stack_is_stored_as_ever() -> None:
    for config in (ModelConfig.named("10m"), ModelConfig.named("10m", **TRANSFORMER)):
        assert not {"layer_types", "softmax"} & config.to_dict().keys()
    spelled_out = ModelConfig(**SMALL, layer_types=[LINEAR] * 3)
    assert spelled_out == ModelConfig(**SMALL)


def test_a_mixed_stack_survives_its_file(tmp_path) -> None:
    config = ModelConfig(**SMALL, **MIXED)
    assert config.softmax == SoftmaxSettings(window=6)
    assert config.to_dict()["layer_types"] == [LINEAR, SLIDING, FULL]
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.from_json(tmp_path / "config.json") == config
    assert config.replace(bias=True).softmax == config.softmax
    assert hash(config) == hash(dataclasses.replace(config))
    assert ModelConfig(**SMALL, layer_types=[LINEAR, FULL, SLIDING]).layers[2].window == 1_024


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layer_types": [LINEAR]}, "layer_types = .* must be a list of 3 layer types"),
        ({"layer_types": "linear"}, "layer_types = 'linear', but must be a list of 3 layer types"),
        ({"layer_types": [FULL] * 3}, "mixer = 'gla', but must be softmax where layer_types has"),
        (
            {"layer_types": [LINEAR, "full_atention", FULL]},
            r"layer_types\[1\] = 'full_atention'.*did you mean full_attention\?",
        ),
        ({"layer_types": [LINEAR, 3, FULL]}, r"layer_types\[1\] = 3, but must be one of linear_"),
        (
            {**MIXED, "mixer": "softmax"},
            "mixer = 'softmax', but must be gla for the linear layers",
        ),
        ({"softmax": {}}, "softmax is set, but no layer is a softmax layer"),
        ({"mixer": "softmax", "head_norm": True}, "head_norm = True, but must be false where no"),
        (
            {"layer_types": [LINEAR, FULL, FULL], "softmax": {"window": 7}},
            "softmax.window = 7, but must be null where no layer is sliding_attention",
        ),
        ({**MIXED, "softmax": {"window": 2**70}}, "null or from 2 to 2,147,483,648"),
        ({**MIXED, "softmax": {"windw": 3}}, r"'softmax.windw'; did you mean softmax.window\?"),
        ({**MIXED, "softmax": 3}, "softmax = 3, but must be a table of settings"),
        ({**MIXED, "softmax": {"window": 1}}, "softmax.window = 1, but must be null or from 2"),
        ({**MIXED, "softmax": {"position": "ape"}}, "softmax.position = 'ape'"),
        ({**MIXED, "softmax": {"position": []}}, r"softmax.position = \[\]"),
        ({**MIXED, "softmax": {"gate": 1}}, "softmax.gate = 1, but must be true or false"),
        ({**MIXED, "softmax": {"num_attention_heads": 5}}, "a divisor of .* 24"),
        ({**MIXED, "softmax": {"num_attention_heads": 8}}, "even with position rope"),
        ({**MIXED, "softmax": {"num_key_value_heads": 3}}, "num_key_value_heads = 3.*divisor of 4"),
        (
            {**MIXED, "softmax": {"num_key_value_heads": 2, "position": "lrpe"}},
            "null with position lrpe",
        ),
        ({**MIXED, "position_layers": [0, 1]}, "numbers of linear layers; see softmax.position"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_other_records_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **words})


def test_named_sizes_take_a_stack() -> None:
    layers = SIZES["10m"]["num_hidden_layers"]
    config = ModelConfig.named(
        "10m",
        layer_types=[LINEAR, SLIDING] * (layers // 2),
        softmax={"num_attention_heads": 10, "num_key_value_heads": 2},
    )
    with torch.device("meta"):
        assert LanguageModel(config).parameter_count() == config.parameter_count()
