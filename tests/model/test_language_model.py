"""One forward for every use: whole, in pieces, token by token, packed, left-padded; and what a
model holds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from transnormer import SIZES, TRANSFORMER, LanguageModel, ModelConfig, State
from transnormer.files import read_tensors, write_tensors
from transnormer.layer_config import ACTIVATIONS, FULL, GLUS, LINEAR, NORMS, SLIDING
from transnormer.model.language_model import init_weights
from transnormer.model.layers import LRPE, ShortConvolution, TokenPositions

SMALL = {
    "vocab_size": 29,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
KINDS = [
    {"mixer": mixer, "position": position, "position_layers": layers, "decay": decay}
    for mixer, (position, layers), decay in itertools.product(
        ("gla", "softmax"),
        (
            ("lrpe", "first"),
            ("lrpe", "all"),
            ("lrpe", (0, 2)),
            ("rope", "all"),
            ("ape", "first"),
            ("none", "first"),
        ),
        ("alibi", "paper", "none"),
    )
]

KINDS += [
    {"mixer": mixer, "position": "rope", "convolution": place, **more}
    for mixer, place, more in itertools.product(
        ("gla", "softmax"),
        ("input", "heads"),
        ({"position_layers": "all"}, {"qk_norm": True, "gate_rank": 3}),
    )
]

KINDS += [
    {"mixer": "gla", "position": "rope", "position_layers": "all", "decay": decay, **more}
    for decay, more in (
        ("gated", {}),
        ("gated", {"convolution": "input", "head_norm": True, "gate_rank": 3}),
        ("delta", {"convolution": "heads"}),
    )
]
KINDS += [
    {"mixer": "gla", "convolution": place, "qk_norm": True, "head_norm": True, "gate_rank": 3}
    for place in ("input", "heads")
]

STACK = {"layer_types": [LINEAR, SLIDING, FULL], "softmax": {"window": 6}}


def small(dtype: torch.dtype = torch.float64, **changes) -> LanguageModel:
    """A small model whose weights are large enough for every part to matter."""
    model = LanguageModel(ModelConfig(**{**SMALL, "initializer_range": 0.3, **changes}))
    for module in model.modules():
        if isinstance(module, ShortConvolution):  # which starts as the identity
            module.weight.data += 0.3 * torch.randn_like(module.weight)
    return model.to(dtype).eval()


def name(kind: dict) -> str:
    return "-".join(str(value) for value in kind.values())


@pytest.mark.parametrize("kind", KINDS, ids=name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@torch.inference_mode()
def test_every_way_of_reading_gives_the_same(
    kind: dict, dtype: torch.dtype, tolerance: float
) -> None:
    model = small(dtype, **kind)
    ids = torch.randint(29, (2, 70))  # longer than a chunk of the linear mixer
    whole, end = model(ids)
    scale = whole.abs().max()

    def same(logits: torch.Tensor, expected: torch.Tensor) -> None:
        assert (logits - expected).abs().max() <= tolerance * scale

    def same_state(state: State) -> None:
        assert torch.equal(state.seen, end.seen)
        for layer, expected in zip(state.layers, end.layers, strict=True):
            for part, wanted in zip(layer, expected, strict=True):
                assert (part - wanted).abs().max() <= tolerance * max(1, wanted.abs().max())

    for cuts in ([1, 9, 40], [63, 64, 65], range(1, 70)):
        state, pieces = None, []
        for start, stop in itertools.pairwise([0, *cuts, 70]):
            logits, state = model(ids[:, start:stop], state)
            pieces.append(logits)
        same(torch.cat(pieces, dim=1), whole)
        same_state(state)

    # Three packed sequences, one empty, then their continuations packed otherwise.
    row = torch.cat([ids[0, :20], ids[1, :41]])[None]
    packed, state = model(row, cu_seqlens=torch.tensor([0, 20, 20, 61]))
    same(packed[0, :20], whole[0, :20])
    same(packed[0, 20:], whole[1, :41])
    assert state.seen.tolist() == [20, 0, 41]
    row = torch.cat([ids[0, 20:], ids[1, 41:]])[None]
    packed, state = model(row, state, cu_seqlens=torch.tensor([0, 50, 50, 79]))
    same(packed[0, :50], whole[0, 20:])
    same(packed[0, 50:], whole[1, 41:])
    if kind["mixer"] == "gla":
        same_state(state.select([0, 2]))

    # Rows of unequal length, padded at the left with arbitrary tokens; then going on with padding
    # again.
    pad = torch.tensor([13, 0])
    left = torch.cat([torch.randint(29, (1, 13)), ids[:1, :27]], dim=1)
    padded, state = model(torch.cat([left, ids[1:, :40]]), pad=pad)
    same(padded[0, 13:], whole[0, :27])
    same(padded[1], whole[1, :40])
    left = torch.cat([torch.randint(29, (1, 13)), ids[1:, 40:]], dim=1)
    padded, state = model(torch.cat([ids[:1, 27:], left]), state, pad=torch.tensor([0, 13]))
    same(padded[0], whole[0, 27:])
    same(padded[1, 13:], whole[1, 40:])


@pytest.mark.parametrize("decay", ["gated", "delta"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 2_000.0])
def test_decays_that_tokens_set_are_finite(decay: str, scale: float) -> None:
    model = small(decay=decay, decay_scale=scale)
    logits, state = model(torch.randint(29, (1, 100)))
    assert logits.isfinite().all()
    assert all(part.isfinite().all() for layer in state.layers for part in layer)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_no_token_sees_a_later_one(kind: dict) -> None:
    model = small(**kind)
    ids = torch.randint(29, (1, 30))
    changed = ids.clone()
    changed[0, 17:] = (changed[0, 17:] + 1) % 29
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[0, :17], after[0, :17])
    assert (before[0, 17:] - after[0, 17:]).abs().min(-1).values.max() > 1e-6


@pytest.mark.parametrize(
    "switch",
    [
        *({"activation": word} for word in ACTIVATIONS),
        *({"norm": word} for word in NORMS),
        *({"glu": word} for word in GLUS),
        {"gate": False},
        {"gate_rank": 5},
        {"qk_norm": True},
        {"decay": "gated"},
        {"decay": "delta"},
        {"head_norm": True},
        {"convolution": "input"},
        {"convolution": "heads"},
        {"bias": True},
        {"embed_scale": True},
        {"decay_temperature": False},
        {"decay_scale": 3.0},
        {"tie_word_embeddings": False},
        {"head_dim": 5},
        {"num_hidden_layers": 1},
        {"pad_token_id": 3},
        TRANSFORMER,
    ],
    ids=str,
)
def test_every_switch_changes_the_function_and_counts_right(switch: dict) -> None:
    def build(**changes) -> LanguageModel:
        torch.manual_seed(1)
        model = small(**changes)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # gains and biases, away from ones and zeros
                parameter.data += 0.1
        return model

    model, ids = build(**switch), torch.randint(29, (2, 20))
    assert model.parameter_count() == model.config.parameter_count()
    logits, _ = model(ids)
    assert logits.isfinite().all()
    model.loss(ids, ids).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    if switch not in (
        {"activation": "swish"},
        {"norm": "srmsnorm"},
        {"glu": "sglu"},
        {"pad_token_id": 3},
    ):
        plain, _ = build()(ids)
        assert (logits - plain).abs().max() > 1e-6


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, ids = small(), torch.randint(29, (2, 20))
    targets = torch.randint(29, (2, 20))
    targets[0, 5] = -100
    logits, _ = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected)
    padded = model.loss(ids, targets, pad=torch.tensor([4, 0]), reduction="none")
    assert padded[0, :4].eq(0).all()
    alone = F.cross_entropy(model(ids[:1, 4:])[0][0], targets[0, 4:], reduction="none")
    torch.testing.assert_close(padded[0, 4:], alone)


@pytest.mark.parametrize("kind", [{}, STACK], ids=["linear", "stack"])
def test_gradients_flow_through_the_state(kind: dict) -> None:
    model, ids = small(**kind), torch.randint(29, (2, 30))
    grads = []
    for cut in (0, 11):
        model.zero_grad()
        if cut:
            first, state = model(ids[:, :cut])
            logits = torch.cat([first, model(ids[:, cut:], state)[0]], dim=1)
        else:
            logits, _ = model(ids)
        logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for whole, pieces in zip(*grads, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-9)


def test_state_size_is_constant_for_linear_and_grows_for_softmax() -> None:
    for mixer, grows in (("gla", False), ("softmax", True)):
        model = small(torch.float32, mixer=mixer)
        _, short = model(torch.randint(29, (2, 10)))
        _, long = model(torch.randint(29, (2, 200)))
        assert (long.nbytes > short.nbytes) is grows
        if not grows:
            assert short.nbytes == State.new(model, 2).nbytes


def test_state_forks_selects_and_survives_a_file(tmp_path) -> None:
    for mixer in ("gla", "softmax"):
        model, ids = small(mixer=mixer), torch.randint(29, (3, 12))
        _, state = model(ids)
        expected, _ = model(ids[:, :5], state)
        fork = state.clone()
        for layer in fork.layers:
            layer[0].zero_()
        state.save(tmp_path / "state.safetensors")
        for same in (state, State.load(tmp_path / "state.safetensors", model)):
            assert torch.equal(model(ids[:, :5], same)[0], expected)
        picked, _ = model(ids[[2, 0, 0], :5], state.select([2, 0, 0]))
        torch.testing.assert_close(picked, expected[[2, 0, 0]])
        with pytest.raises(ValueError, match="not a state of this model"):
            State.load(tmp_path / "state.safetensors", small(num_hidden_layers=2))
        tensors, metadata = read_tensors(tmp_path / "state.safetensors")
        for held, said in (
            ({name: part for name, part in tensors.items() if name != "0.0"}, metadata),
            (tensors, {"state": "[1,"}),
        ):
            write_tensors(tmp_path / "other.safetensors", held, said)
            with pytest.raises(ValueError, match=r"other\.safetensors: not a state of this model"):
                State.load(tmp_path / "other.safetensors", model)
        with pytest.raises(ValueError, match="layer 0 holds"):
            State.load(tmp_path / "state.safetensors", small(mixer=mixer, head_dim=4))
    with pytest.raises(ValueError, match="state holds 3 rows, the call 1"):
        model(ids[:1], state)


def test_lrpe_is_right_at_position_a_million() -> None:
    config = ModelConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1)
    lrpe = LRPE(config)
    lrpe.reset_parameters()
    positions = torch.tensor([0, 999_999, 1_000_000, 10_000_000])
    turned, _ = lrpe(torch.ones(1, 4, 2, 32), torch.ones(1, 4, 2, 32), TokenPositions(positions))
    for p, position in enumerate(positions.tolist()):
        for h, j in itertools.product(range(2), (0, 1, 7, 31)):
            angle = math.fmod(lrpe.theta[h, j].item() * position, 2 * math.pi)
            assert abs(turned[0, p, h, j].item() - math.cos(angle)) < 1e-6
            assert abs(turned[0, p, h, 32 + j].item() - math.sin(angle)) < 1e-6


def test_only_distances_matter_a_million_tokens_on() -> None:
    for kind in ({"position_layers": "all"}, TRANSFORMER):
        model = small(torch.float32, **kind)
        ids = torch.randint(29, (1, 40))
        fresh = State.new(model)
        near, _ = model(ids, fresh)
        far, _ = (
            model(ids, State(fresh.layers, fresh.seen + 1_000_000))
            if kind is not TRANSFORMER
            else (near, None)
        )
        assert (near - far).abs().max() < 1e-4 * near.abs().max()


def test_decays_are_float32_whatever_happens_to_the_weights() -> None:
    model = small(torch.float32)
    expected = [layer.mixer.log_decay.clone() for layer in model.layers]
    assert 0 < -expected[-1].max() < 1e-6  # bfloat16 would make exp of it 1
    with torch.device("meta"):
        empty = LanguageModel(model.config)
    for changed in (model.bfloat16(), model.half(), model.double(), empty.to_empty(device="cpu")):
        for layer, decay in zip(changed.layers, expected, strict=True):
            assert torch.equal(layer.mixer.log_decay, decay)
    assert not any("log_decay" in key for key in model.state_dict())


def test_named_sizes_have_the_papers_parameter_counts() -> None:
    at_64000 = {"385m": 398_984_192, "1b": 1_020_266_496, "3b": 2_911_111_680, "7b": 6_836_719_616}
    at_50272 = {"385m": 384_926_720, "1b": 992_151_552, "3b": 2_875_968_000, "7b": 6_780_489_728,
                "13b": 12_620_108_800, "65b": 63_527_723_008}  # fmt: skip
    for size in SIZES:
        with torch.device("meta"):
            model = LanguageModel(ModelConfig.named(size))
            smaller = LanguageModel(ModelConfig.named(size, vocab_size=50_272))
        assert (
            model.parameter_count()
            == model.config.parameter_count()
            == at_64000.get(size, model.parameter_count())
        )
        assert smaller.parameter_count() == at_50272.get(size, smaller.parameter_count())
    assert ModelConfig.named("175b").intermediate_size == 32_768


def test_the_published_architecture_scales_embeddings_as_its_checkpoints_do() -> None:
    scaled = {size for size in SIZES if ModelConfig.published(size).embed_scale}
    assert SIZES.keys() - scaled == {"3b", "7b"}
    assert not ModelConfig.published("1b", embed_scale=False).embed_scale
    for size in SIZES:  # and is that of the defaults in all else
        assert ModelConfig.published(size, embed_scale=False) == ModelConfig.named(size)


def test_flops_are_what_is_counted() -> None:
    model = small(torch.float32, num_hidden_layers=2, position="none")
    linear = sum(p.numel() for name, p in model.named_parameters())
    heads, k = 3, 8
    assert model.flops_per_token(512) == 6 * linear + 3 * 2 * heads * (2 * 128 * 2 * k + 4 * k * k)
    baseline = small(torch.float32, num_hidden_layers=2, **TRANSFORMER)
    linear = sum(p.numel() for p in baseline.parameters())
    assert baseline.flops_per_token(512) == 6 * linear + 3 * 2 * heads * 2 * 256 * 2 * k


def test_weights_survive_a_folder(tmp_path) -> None:
    for kind in ({}, {"tie_word_embeddings": False, "position_layers": (0, 2)}, TRANSFORMER):
        model, ids = small(torch.float32, **kind), torch.randint(29, (2, 20))
        model.save_pretrained(tmp_path)
        again = LanguageModel.from_pretrained(tmp_path)
        assert again.config == model.config
        assert torch.equal(again(ids)[0], model(ids)[0])
        assert (
            LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16).head_weight.dtype
            == torch.bfloat16
        )


def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path) -> None:
    model = small(torch.float32)
    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(model.config.replace(intermediate_size=41).to_json())
    with pytest.raises(
        ValueError, match=r"layers\.0\.glu\.gate_proj\.weight is \[40, 24\], not \[41, 24\]"
    ):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(model.config.replace(gate_rank=2).to_json())
    with pytest.raises(ValueError, match=r"mixer\.gate_proj\.0\.weight is missing"):
        LanguageModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_sise": 24}')
    with pytest.raises(
        ValueError, match=r"unknown model config key 'hidden_sise'; did you mean hidden_size\?"
    ):
        LanguageModel.from_pretrained(tmp_path)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, other = small(torch.float32), small(torch.float32, num_hidden_layers=2)
    init_weights(one, 7)
    init_weights(other, 7)
    for parameter_name, parameter in other.named_parameters():
        assert torch.equal(parameter, dict(one.named_parameters())[parameter_name])
    init_weights(other, 8)
    assert not torch.equal(other.head_weight, one.head_weight)
    wide = LanguageModel(
        ModelConfig(vocab_size=2_000, hidden_size=256, num_hidden_layers=1, pad_token_id=5)
    )
    assert abs(float(wide.embed_tokens.weight.std()) - 0.02) < 2e-4
    assert wide.embed_tokens.weight[5].eq(0).all()
    theta = wide.layers[0].mixer.position.theta.flatten()
    torch.testing.assert_close(
        theta[[0, 1, 255]], torch.tensor([1.0, 10_000 ** (-2 / 256), 10_000 ** (-510 / 256)])
    )


def test_calls_that_do_not_fit_say_so() -> None:
    model = small()
    ids = torch.randint(29, (2, 6))
    with pytest.raises(ValueError, match="ids must be"):
        model(ids[0])
    with pytest.raises(ValueError, match="one row of packed sequences; got 2 rows"):
        model(ids, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"pad must be \[2\]"):
        model(ids, pad=torch.tensor([1]))
    for wrong in ([0, 5], [0, 7, 5, 6], [0, 3, 9]):
        with pytest.raises(ValueError, match="must rise from 0 to T = 6"):
            model(ids[:1], cu_seqlens=torch.tensor(wrong))
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match="pad must be from 0 to T = 6"):
            model(ids, pad=torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids[:1], pad=torch.tensor([1]), cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="past the learned table of 4"):
        small(position="ape", max_position_embeddings=4)(ids)
