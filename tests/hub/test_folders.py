"""Our folders in transformers: loaded, saved, and refused where they are not whole."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

import transnormer
from transnormer import LanguageModel

from ..conftest import REPOSITORY
from ..lazy import Lazy
from .models import GREEDY, KINDS, TARGETS, VOCAB, draw, engine, small

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")


# Loading.


def test_the_auto_classes_load_our_folders(both) -> None:
    own, model = both
    assert type(model) is hf.TransNormerForCausalLM
    assert model.config.own() == own.config
    assert not model.training
    names = model.state_dict().keys()
    assert names - {"lm_head.weight"} == own.state_dict().keys() - {"lm_head.weight"}
    assert (model.lm_head.weight is model.embed_tokens.weight) is own.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.head_weight
    assert model.parameter_count() == own.parameter_count() == model.num_parameters()
    ids = draw(2, 30)
    assert torch.equal(model(ids).logits, own(ids)[0])


@pytest.mark.parametrize("option", [{"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}])
def test_weights_become_bfloat16_and_decays_do_not(folders, loaded, option) -> None:
    for name in ("tied", "alibi"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], **option)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        for layer, wanted in zip(model.layers, loaded[name][0].layers, strict=True):
            assert torch.equal(layer.mixer.log_decay, wanted.mixer.log_decay)
            assert layer.mixer.log_decay.dtype == torch.float32
        again = transnormer.load(folders[name], dtype=torch.bfloat16)
        ids = draw(1, 20)
        assert torch.equal(model(ids).logits, again(ids)[0])


@pytest.mark.parametrize("where", ["auto", "cpu", "disk"])
def test_device_maps(folders, both, where, tmp_path) -> None:
    own, _ = both
    name = next(name for name, kind in KINDS.items() if own.config == small(**kind).config)
    options = {"device_map": where}
    if where == "disk":
        places = dict.fromkeys(["embed_tokens", "norm", "lm_head", "layers.0", "layers.2"], "cpu")
        places |= {"layers.1": "disk"} | (
            {} if own.config.tie_word_embeddings else {"lm_head": "disk"}
        )
        options = {"device_map": places, "offload_folder": str(tmp_path)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[name], **options)
    assert (model.layers[1].mixer.out_proj.weight.is_meta) is (where == "disk")
    ids = draw(1, 12)
    assert torch.equal(model.generate(ids, **GREEDY)[0, 12:], torch.tensor(engine(own, ids)))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, own.loss(ids[:, :-1], ids[:, 1:]))


def test_a_new_model_starts_as_ours_does() -> None:
    config = hf.TransNormerConfig(
        vocab_size=2_000,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bias=True,
        pad_token_id=5,
        norm="layernorm",
        tie_word_embeddings=False,
    )
    own, model = LanguageModel(config.own()), transformers.AutoModelForCausalLM.from_config(config)
    drawn = 0
    for name, weight in own.named_parameters():
        found = model.get_parameter(name).detach()
        if 0.01 < weight.std() < 0.03:
            drawn += 1
            assert abs(float(found.std()) - 0.02) < 2e-3, name
        else:  # theta, gains, biases
            assert torch.equal(found, weight), name
    assert drawn == 12
    assert model.embed_tokens.weight[5].eq(0).all()
    with torch.device("meta"):
        assert transformers.AutoModelForCausalLM.from_config(config).device.type == "meta"


def test_weights_that_do_not_fit_are_refused_by_name(copied) -> None:
    weights = load_file(copied / "model.safetensors")
    some, shape = "layers.1.glu.up_proj.weight", list(weights["layers.1.glu.up_proj.weight"].shape)

    def refused(tensors: dict, match: str) -> None:
        save_file(tensors, copied / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=match) as caught:
            transformers.AutoModelForCausalLM.from_pretrained(copied)
        assert "\n" not in str(caught.value)

    refused(
        {k: v for k, v in weights.items() if k != some},
        r"layers\.1\.glu\.up_proj\.weight is missing",
    )
    refused(
        {**weights, "layers.7.norm.weight": torch.ones(2)}, r"layers\.7\.norm\.weight is unknown"
    )
    wrong = f"is \\[{shape[0] - 1}, {shape[1]}\\], not \\[{shape[0]}, {shape[1]}\\]"
    refused(
        {**weights, some: weights[some][1:].clone()}, rf"layers\.1\.glu\.up_proj\.weight {wrong}"
    )
    holed = weights[some].clone()
    holed[3, 3] = torch.nan
    refused({**weights, some: holed}, r"layers\.1\.glu\.up_proj\.weight holds NaN or infinity")
    many = {k: v for k, v in weights.items() if "glu" not in k}
    refused(many, r"layers\.0\.glu\.down_proj\.weight is missing.* and 5 more")


def test_a_tied_head_that_differs_is_refused(folders, tmp_path) -> None:
    copied = shutil.copytree(folders["tied"], tmp_path / "copy")
    weights = load_file(copied / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": torch.ones(VOCAB, 32)},
        copied / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from embed_tokens\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(copied)


def test_weights_assigned_to_a_model_on_meta_bring_its_decays(both) -> None:
    _, model = both
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = draw(2, 9)
    assert torch.equal(empty(ids).logits, model(ids).logits)


# Saving.


def test_shards_are_read_by_both_sides(both, tmp_path) -> None:
    own, model = both
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == own.state_dict().keys()
    ids = draw(1, 20)
    again, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        transnormer.load(tmp_path),
    )
    assert ours.config == own.config
    for name, tensor in own.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again(ids).logits, own(ids)[0])
    model.save_pretrained(tmp_path)  # whole again, over the shards
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(transnormer.load(tmp_path)(ids)[0], own(ids)[0])


def test_shards_that_are_not_whole_are_refused_by_name(tied, tmp_path) -> None:
    tied[1].save_pretrained(tmp_path, max_shard_size="20KB")
    index_file = tmp_path / "model.safetensors.index.json"
    index, shards = json.loads(index_file.read_text()), sorted(tmp_path.glob("model-*.safetensors"))

    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            transnormer.load(tmp_path)

    for text in (
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"norm.weight": "../evil.safetensors"}}',
    ):
        index_file.write_text(text)
        refused(ValueError, r"index\.json: damaged, or not an index of shards")
    index_file.write_text("{")
    refused(ValueError, r"index\.json: not JSON")
    mapped = {**index["weight_map"], "ghost.weight": shards[0].name}
    index_file.write_text(json.dumps({"weight_map": mapped}))
    refused(
        ValueError,
        r"lacks ghost\.weight: it and model\.safetensors\.index\.json are not of one model",
    )
    index_file.write_text(json.dumps(index))
    shutil.copy(shards[1], tmp_path / "kept")
    shutil.copy(shards[0], shards[1])
    refused(ValueError, rf"{shards[1].name} also holds .* are not of one model")
    shutil.copy(tmp_path / "kept", shards[1])
    shards[2].write_bytes(shards[2].read_bytes()[:-10])
    refused(ValueError, rf"{shards[2].name}: truncated")
    shards[2].unlink()
    refused(
        FileNotFoundError,
        rf"{shards[2].name}: no such file, though model\.safetensors\.index\.json names it",
    )
    with pytest.raises(OSError, match=shards[2].name):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_vocabulary_can_grow_and_shrink(folders, tmp_path) -> None:
    for name, size in itertools.product(("tied", "untied", "softmax"), (VOCAB + 7, VOCAB - 5)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
        ids, kept = draw(1, 12).clamp(max=size - 1), min(size, VOCAB)
        before = model(ids).logits
        model.resize_token_embeddings(size)
        assert (
            model.lm_head.weight is model.embed_tokens.weight
        ) is model.config.tie_word_embeddings
        after = model(ids, labels=ids)
        assert after.logits.shape[-1] == size
        torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
        wide = F.cross_entropy(after.logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(after.loss, wide)
        model.save_pretrained(tmp_path)
        assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids)[0], after.logits)


def test_a_model_card_goes_with_every_folder(both, tmp_path) -> None:
    own, model = both
    cards = []
    for number, writer in enumerate((own, model)):
        writer.save_pretrained(tmp_path / str(number))
        cards.append((tmp_path / str(number) / "README.md").read_text())
    assert cards[0] == cards[1]
    _, front, text = cards[0].split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["library_name"] == "transnormer"
    assert matter["pipeline_tag"] == "text-generation"
    assert "license" not in matter
    assert f"{own.parameter_count():,}" in text
    (tmp_path / "0" / "README.md").write_text("mine")
    for writer in (own, model):
        writer.save_pretrained(tmp_path / "0")
        assert (tmp_path / "0" / "README.md").read_text() == "mine"


def test_the_card_says_how_to_load(folders, capsys) -> None:
    text = (folders["tied"] / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    for block, kind in zip(blocks, (LanguageModel, hf.TransNormerForCausalLM), strict=True):
        names = {"folder": folders["tied"]}
        exec(block, names)
        assert type(names["model"]) is kind
        assert capsys.readouterr().out.strip()


def test_the_page_runs_as_it_is_written(folders, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(folders["tied"], tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs" / "hub.md").read_text(), re.DOTALL
    )
    exec("".join(blocks), names := {})
    assert names["lora"].target_modules == TARGETS
    assert "JULIET:" in capsys.readouterr().out
