"""Published checkpoints: the published code's own numbers, and other configurations against the
paper's equations."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.formats.published import (
    config_from_published,
    load_published,
    own_tensors,
    published_config,
    published_tensors,
)

from ..conftest import PUBLISHED, REPOSITORY


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(PUBLISHED / "expected.safetensors")


def test_logits_loss_and_every_gradient(expected) -> None:
    model, ids = transnormer.load(PUBLISHED), expected["input_ids"].long()
    logits, _ = model(ids)
    assert (logits - expected["logits_train"]).abs().max() < 1e-4
    assert (logits - expected["logits_eval"]).abs().max() < 1e-4
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - expected["loss"].item()) < 1e-5
    loss.backward()
    gradients = published_tensors(
        {name: p.grad for name, p in model.named_parameters()}, model.config
    )
    assert {f"grad.{name}" for name in gradients} == {
        name for name in expected if name.startswith("grad.")
    }
    for name, gradient in gradients.items():
        wanted = expected[f"grad.{name}"]
        assert gradient.shape == wanted.shape
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm(), name


def test_greedy_tokens_with_the_state_in_pieces(expected) -> None:
    model, prompt = transnormer.load(PUBLISHED), expected["greedy_prompt"].long()
    assert model.tokenizer is None
    _, state = model(prompt[:, :50])
    logits, state = model(prompt[:, 50:], state)
    tokens = []
    for _ in range(48):
        tokens.append(int(logits[0, -1].argmax()))
        logits, state = model(torch.tensor([[tokens[-1]]]), state)
    assert tokens == expected["greedy_tokens"].flatten().tolist()


VARIANTS = [
    {},
    {"decoder_attention_heads": 6, "decoder_embed_dim": 30, "hidden_dim": 42},
    {"decoder_attention_heads": 3, "hidden_dim": 24, "no_scale_embedding": False, "bias": True},
    {"decoder_attention_heads": 5, "decoder_embed_dim": 20, "hidden_dim": 20, "glu_dim": -1},
    {"linear_use_lrpe_list": [0, 0, 0, 0]},
    {"linear_use_lrpe_list": [0, 1, 0, 1]},
    {"linear_use_lrpe_list": [], "linear_use_lrpe": 1},
    {"linear_use_lrpe_list": [], "linear_use_lrpe": 0},
    {"norm_type": "layernorm"},
    *({"linear_act_fun": word} for word in
      ("swish", "relu", "elu", "1+elu", "2+elu", "gelu", "sigmoid", "leak", "sine", "exp",
       "something else")),
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_other_published_models_follow_the_equations(change: dict, tmp_path) -> None:
    values = {
        "decoder_embed_dim": 32, "decoder_layers": 4, "decoder_attention_heads": 4,
        "hidden_dim": 32, "glu_dim": 48,
        "vocab_size": 41, "linear_act_fun": "silu", "linear_use_lrpe_list": [1, 0, 0, 0],
        "no_scale_embedding": True,
        "norm_type": "simplermsnorm", "model_type": "transnormer", "pad_token_id": 0, **change,
    }  # fmt: skip
    config = config_from_published(values)
    model = LanguageModel(config.replace(initializer_range=0.2)).double()
    # gains, biases and theta away from their special initial values
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = published_tensors(model.state_dict(), config)
    ids = torch.randint(41, (2, 90))
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    logits, _ = transnormer.load(tmp_path)(ids)
    wanted = _published_logits(tensors, values, ids)
    assert (logits - wanted).abs().max() < 1e-9 * wanted.abs().max()
    back = config_from_published(published_config(config))
    assert back == config.replace(initializer_range=back.initializer_range)


def _published_logits(
    tensors: dict[str, torch.Tensor], values: dict, ids: torch.Tensor
) -> torch.Tensor:
    """The published forward pass written out with T x T masks, from published names, shapes and
    words alone."""
    heads, layers, inner = (
        values["decoder_attention_heads"],
        values["decoder_layers"],
        values["hidden_dim"],
    )
    time = torch.arange(ids.shape[1], dtype=torch.float64)
    act = {
        "silu": F.silu, "swish": F.silu, "relu": F.relu, "elu": F.elu,
        "1+elu": lambda x: 1 + F.elu(x),
        "2+elu": lambda x: 2 + F.elu(x), "gelu": F.gelu, "sigmoid": torch.sigmoid,
        "leak": F.leaky_relu,
        "sine": torch.sin, "exp": lambda x: torch.exp(x - x.max(dim=-1, keepdim=True).values),
    }.get(values["linear_act_fun"], lambda x: x)  # fmt: skip

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if values["norm_type"] == "simplermsnorm":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def slopes(n: int) -> list[float]:
        if math.log2(n).is_integer():
            return [2 ** (-8 * (h + 1) / n) for h in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return slopes(below) + slopes(2 * below)[0::2][: n - below]

    x = tensors["model.embed_tokens.weight"][ids]
    if not values["no_scale_embedding"]:
        x = x * math.sqrt(values["decoder_embed_dim"])
    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, k, v, u = linear(norm(x, f"{at}.token_norm"), f"{at}.token_mixer.qkvu_proj").chunk(
            4, dim=-1
        )
        q, k, v = (
            part.unflatten(-1, (heads, inner // heads)).transpose(1, 2) for part in (q, k, v)
        )
        q, k = act(q), act(k)
        theta = tensors.get(f"{at}.token_mixer.lrpe.theta")
        if theta is not None:
            angle = theta * time[:, None]  # [H, T, hd]
            q, k = (torch.cat([part * angle.cos(), part * angle.sin()], dim=-1) for part in (q, k))
        rate = [slope * (1 - layer / (layers - 1) + 1e-5) for slope in slopes(heads)]
        rate = torch.tensor(rate, dtype=torch.float32).double()
        distance = time[:, None] - time
        mask = torch.exp(-rate[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
        mixed = (((q @ k.transpose(-1, -2)) * mask) @ v).transpose(1, 2).flatten(-2)
        x = x + linear(norm(mixed, f"{at}.token_mixer.norm") * u, f"{at}.token_mixer.out_proj")
        y = norm(x, f"{at}.channel_norm")
        y = linear(y, f"{at}.channel_mixer.l1") * linear(y, f"{at}.channel_mixer.l2")
        x = x + linear(y, f"{at}.channel_mixer.l3")
    return norm(x, "model.final_norm") @ tensors["model.embed_tokens.weight"].T


def test_names_and_shapes_go_both_ways() -> None:
    config = config_from_published(json.loads((PUBLISHED / "config.json").read_text()))
    published = torch.load(PUBLISHED / "pytorch_model.bin", weights_only=True)
    own = own_tensors(published, config)
    back = published_tensors(own, config)
    assert back.keys() == published.keys() - {"lm_head.weight"}
    assert all(torch.equal(back[name], published[name]) for name in back)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(PUBLISHED, tmp_path / "copy")


def test_what_cannot_be_read_faithfully_is_refused_by_name(copy) -> None:
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)

    def refused(tensors: object, match: str) -> None:
        torch.save(tensors, copy / "pytorch_model.bin")
        with pytest.raises(ValueError, match=match):
            transnormer.load(copy)

    some = "model.layers.1.channel_mixer.l2.weight"
    refused(
        {k: v for k, v in weights.items() if k != some},
        r"model\.layers\.1\.channel_mixer\.l2\.weight is missing",
    )
    refused({**weights, some: weights[some][:-1]}, r"l2\.weight is \[175, 64\], not \[176, 64\]")
    refused(
        {**weights, "model.layers.0.surprise": weights[some]},
        r"model\.layers\.0\.surprise is unknown",
    )
    refused(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1},
        "lm_head.weight differs from model.embed",
    )
    refused([1, 2], "something else than named tensors")
    torch.save(weights, copy / "pytorch_model.bin")
    whole = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated"):
        transnormer.load(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        load_published(copy)


class Trap:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("kind", ["zip", "old", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (open, "io.open"),
        (os.mkdir, "posix.mkdir"),
        (Fraction, "fractions.Fraction"),
        (torch.nn.ReLU, "torch.nn.modules"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_pickles_that_would_run_code_do_not_and_name_it(
    copy, tmp_path, function, named, kind
) -> None:
    """torch blocks some modules and not others, and does not know newer protocols: its messages
    differ."""
    trap, weights = tmp_path / "sprung", copy / "pytorch_model.bin"
    content = {"weight": torch.ones(2), "b": Trap(function, str(trap))}
    if isinstance(kind, int):
        weights.write_bytes(pickle.dumps(content | {"weight": 1}, protocol=kind))
    else:
        torch.save(content, weights, _use_new_zipfile_serialization=kind == "zip")
    line = (
        rf"pytorch_model\.bin holds more than tensors: {re.escape(named)}[\w.]*; nothing of it "
        r"was run$"
    )
    with pytest.raises(ValueError, match=line):
        transnormer.load(copy)
    assert not trap.exists()


def test_a_pickle_of_a_whole_model_names_it(copy) -> None:
    torch.save(torch.nn.Linear(2, 2), copy / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"holds more than tensors: torch\.nn\.modules\.linear\.Linear; nothing of it",
    ):
        transnormer.load(copy)


def test_the_documents_say_where_the_checkpoints_are() -> None:
    """`convert` begins with them."""
    for document in ("README.md", "docs/published.md"):
        text = (REPOSITORY / document).read_text()
        assert "Hugging Face Hub" in text
        assert "OpenNLPLab/TransNormerLLM-385M" in text


def test_configurations_without_a_published_word_are_refused() -> None:
    with pytest.raises(ValueError, match="TransNormerLLM3"):
        config_from_published({"decoder_embed_dim": 64, "gate_dim": 16})
    with pytest.raises(
        ValueError, match="unknown published config key 'glu_dims'; did you mean glu_dim"
    ):
        config_from_published({"decoder_embed_dim": 64, "glu_dims": 16})
    with pytest.raises(ValueError, match="2 flags for 24 layers"):
        config_from_published({"decoder_embed_dim": 64, "linear_use_lrpe_list": [1, 0]})
    for change in (
        {"glu": "swiglu"},
        {"decay": "paper"},
        {"gate": False},
        {"norm": "rmsnorm"},
        {"mixer": "softmax"},
        {"layer_types": ["linear_attention", "full_attention"] * 12},
    ):
        with pytest.raises(ValueError, match="the published format knows no"):
            published_config(ModelConfig(hidden_size=32, num_attention_heads=2, **change))
