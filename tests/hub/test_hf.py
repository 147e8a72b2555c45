"""Our folders in transformers: its own ways of loading, generating, training and saving, against
our own numbers."""

from __future__ import annotations

import copy
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.config import TRANSFORMER
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference.engine import Session
from transnormer.inference.sampling import Sampling

from ..conftest import PUBLISHED, REPOSITORY, TEXT
from ..lazy import Lazy

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")
peft, trl = Lazy("peft"), Lazy("trl")

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


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a kind, as our own `save_pretrained` writes it."""
    parent = tmp_path_factory.mktemp("folders")
    for name, kind in KINDS.items():
        model = small(**kind)
        model.tokenizer = load_tokenizer(prepared)
        model.save_pretrained(parent / name)
    return {name: parent / name for name in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, tuple[LanguageModel, hf.TransNormerForCausalLM]]:
    return {
        name: (transnormer.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder))
        for name, folder in folders.items()
    }


@pytest.fixture(params=KINDS)
def both(request, loaded) -> tuple[LanguageModel, hf.TransNormerForCausalLM]:
    """Our model and transformers' of the same folder."""
    return loaded[request.param]


@pytest.fixture
def tied(loaded) -> tuple[LanguageModel, hf.TransNormerForCausalLM]:
    return loaded["tied"]


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    return shutil.copytree(folders["untied"], tmp_path / "copy")


def draw(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length))


def padded(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, width] with arbitrary padding at the left, and their mask."""
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return draw(len(lengths), width), mask


def cache_of(output):
    return output[hf.CACHE]


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


# The configuration.


def test_the_configuration_is_ours_and_survives(folders, tmp_path) -> None:
    for folder in folders.values():
        config = transformers.AutoConfig.from_pretrained(folder)
        assert type(config) is hf.TransNormerConfig
        config.use_cache, config.output_hidden_states = False, True  # a Trainer sets the first
        config.save_pretrained(tmp_path)
        assert ModelConfig.from_json(tmp_path / "config.json") == config.own()
        assert transformers.AutoConfig.from_pretrained(tmp_path).own() == config.own()
        again = hf.TransNormerConfig(**json.loads(json.dumps(config.to_dict())))
        assert again.own() == config.own()
        assert "layer_types" not in config.to_diff_dict() or config.own().layer_types
    assert hf.TransNormerConfig(hidden_size=64, num_attention_heads=4).head_dim == 16
    assert hf.TransNormerConfig(**hf.TransNormerConfig().to_dict()).own() == ModelConfig()


def test_a_configuration_that_no_model_can_have_is_refused(copied) -> None:
    values = json.loads((copied / "config.json").read_text())

    def refused(changes: dict, match: str) -> None:
        (copied / "config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match=match):
            transformers.AutoConfig.from_pretrained(copied)

    refused({"hidden_sise": 3}, "unknown model config key 'hidden_sise'; did you mean hidden_size")
    refused({"auto_map": {"AutoConfig": "evil.Config"}}, "unknown model config key 'auto_map'")
    refused({"mixer": "gal"}, "mixer = 'gal', but must be one of gla, softmax; did you mean gla")
    (copied / "config.json").write_text(
        json.dumps({key: values[key] for key in values if key != "hidden_size"})
    )
    with pytest.raises(
        ValueError, match=r"config\.json: no hidden_size, so the model's shape is not known"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(copied)
    (copied / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(copied)
    config.position_layers = (17,)
    with pytest.raises(ValueError, match="position_layers"):
        transformers.AutoModelForCausalLM.from_config(config)


def test_published_checkpoints_are_sent_to_convert() -> None:
    for auto in (transformers.AutoConfig, transformers.AutoModelForCausalLM):
        with pytest.raises(
            ValueError, match=r"published TransNormerLLM checkpoint.*transnormer convert"
        ):
            auto.from_pretrained(PUBLISHED)


# Generation.


def engine(own: LanguageModel, ids: torch.Tensor, count: int = 9) -> list[int]:
    session = Session(own)
    session.read(ids[0].tolist())
    return list(session.write(count, Sampling(temperature=0)))


def test_greedy_tokens_are_our_engines(both) -> None:
    own, model = both
    ids = draw(1, 17)
    expected = engine(own, ids)
    assert model.generate(ids, **GREEDY)[0, 17:].tolist() == expected
    assert model.generate(ids, use_cache=False, **GREEDY)[0, 17:].tolist() == expected
    assert len(set(expected)) > 2


def test_a_padded_batch_is_its_rows_alone(both) -> None:
    _, model = both
    ids, mask = padded([5, 17, 1, 12], 17)
    batch = model.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)
    again = model.generate(ids, attention_mask=mask, pad_token_id=0, use_cache=False, **GREEDY)
    assert torch.equal(batch, again)
    logits = model(ids, attention_mask=mask).logits
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = ids[row : row + 1, -length:]
        assert torch.equal(batch[row, 17:], model.generate(alone, **GREEDY)[0, length:])
        torch.testing.assert_close(
            logits[row, -length:], model(alone).logits[0], rtol=1e-4, atol=1e-4
        )
    nothing, mask = padded([0, 6], 6)  # a row of padding alone
    logits = model(nothing, attention_mask=mask).logits
    torch.testing.assert_close(logits[1], model(nothing[1:]).logits[0], rtol=1e-4, atol=1e-4)
    every, mask = padded([3, 5], 9)  # no row fills the width
    batch = model.generate(every, attention_mask=mask, pad_token_id=0, **GREEDY)
    assert torch.equal(batch[:1, 9:], model.generate(every[:1, -3:], **GREEDY)[:, 3:])


def test_beams_are_those_without_a_cache_and_score_what_they_say(both) -> None:
    own, model = both
    ids, mask = padded([5, 11], 11)
    options = {
        **GREEDY, "attention_mask": mask, "num_beams": 3, "num_return_sequences": 3,
        "output_scores": True,
        "return_dict_in_generate": True, "pad_token_id": 0, "length_penalty": 0.0,
        "eos_token_id": None,
    }  # fmt: skip
    found, without = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert torch.equal(found.sequences, without.sequences)
    torch.testing.assert_close(
        found.sequences_scores, without.sequences_scores, rtol=1e-4, atol=1e-4
    )
    greedy = model.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)
    assert not torch.equal(found.sequences[::3], greedy)  # the beams did change places
    for number, sequence in enumerate(found.sequences):
        text = sequence[None, 11 - (5, 11)[number // 3] :]
        scores = own(text)[0][0].log_softmax(-1)[-10:-1].gather(1, text[0, -9:, None])
        torch.testing.assert_close(
            scores.sum(), found.sequences_scores[number], rtol=1e-4, atol=1e-3
        )


def test_sampling_repeats_with_its_seed(both) -> None:
    _, model = both
    ids = draw(2, 7)

    def sample(seed: int, **options) -> torch.Tensor:
        torch.manual_seed(seed)
        return model.generate(
            ids, do_sample=True, top_k=20, max_new_tokens=12, pad_token_id=0, **options
        )

    assert torch.equal(sample(1), sample(1, use_cache=False))
    assert not torch.equal(sample(1), sample(2))


def test_generations_that_take_turns_do_not_disturb_each_other(both) -> None:
    own, model = both
    texts, logits, caches, written = [draw(1, 9), draw(1, 4)], [], [], ([], [])
    for text in texts:
        output = model(text)
        logits.append(output.logits)
        caches.append(cache_of(output))
    for step, which in itertools.product(range(6), (0, 1)):
        written[which].append(int(logits[which][0, -1].argmax()))
        ids = torch.tensor([written[which][-1:]])
        # the cache under both of its names
        logits[which] = model(ids, **{("past_key_values", "cache")[step % 2]: caches[which]}).logits
    for text, tokens in zip(texts, written, strict=True):
        assert tokens == engine(own, text, 6)


def test_the_state_rides_in_transformers_own_caches(both) -> None:
    own, model = both
    ids, mask = padded([3, 8], 8)
    cache = cache_of(model(ids, attention_mask=mask, use_cache=True))
    _, state = own(ids, pad=torch.tensor([5, 0]))
    assert type(cache) is transformers.DynamicCache
    if own.config.layer_types is not None:
        assert [type(layer).__name__ for layer in cache.layers] == [
            "DynamicSlidingWindowLayer",
            "LinearAttentionLayer",
            "DynamicLayer",
        ]
        assert cache.layers[0].keys.shape == (2, 1, 5, 16)  # of the 8 columns the last ones
        assert cache.layers[2].keys.shape == (2, 1, 8, 16)
        torch.testing.assert_close(cache.layers[1].recurrent_states[0], state.layers[1][0])
        for n in (0, 2):
            keys = cache.layers[n].keys.transpose(1, 2)[1]
            torch.testing.assert_close(keys, state.layers[n][0][1])
        assert cache.layers[1].recurrent_states[1].tolist() == [3, 8]
        return
    if own.config.mixer == "softmax":
        assert {type(layer) for layer in cache.layers} == {transformers.cache_utils.DynamicLayer}
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(cache.layers[1].keys.transpose(1, 2)[1], state.layers[1][0][1])
        return
    assert {type(layer) for layer in cache.layers} == {
        transformers.cache_utils.LinearAttentionLayer
    }
    for layer, (wanted,) in zip(cache.layers, state.layers, strict=True):
        assert torch.equal(layer.recurrent_states[0], wanted)
        assert layer.recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].recurrent_states[1].tolist() == [3, 8] == state.seen.tolist()
    before = [layer.recurrent_states[0].data_ptr() for layer in cache.layers]
    model(draw(2, 200), attention_mask=torch.ones(2, 208), past_key_values=cache)
    # it does not grow
    assert [layer.recurrent_states[0].data_ptr() for layer in cache.layers] == before
    cache.reset()
    assert torch.equal(
        model(ids[1:].repeat(2, 1), past_key_values=cache).logits,
        model(ids[1:].repeat(2, 1)).logits,
    )


def test_a_text_goes_on_from_its_cache(both) -> None:
    _, model = both
    ids, mask = padded([9, 20], 20)
    cache = transformers.DynamicCache(config=model.config)
    model(ids[:, :14], attention_mask=mask[:, :14], **{hf.CACHE: cache})
    fork = copy.deepcopy(cache)
    options = {**GREEDY, "attention_mask": mask, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **{hf.CACHE: cache}, **options), expected)
    assert torch.equal(model.generate(ids, **{hf.CACHE: fork}, **options), expected)
    with torch.no_grad():
        read = cache_of(model(ids, attention_mask=mask))
    rest, rest_mask = draw(2, 6), torch.cat([mask, torch.ones(2, 6)], 1)
    pieces = model(rest, attention_mask=rest_mask, **{hf.CACHE: read}).logits
    whole = model(torch.cat([ids, rest], 1), attention_mask=rest_mask).logits[:, -6:]
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    pieces.sum().backward()  # though the cache was updated in place
    if {*model.config.layer_types} == {"linear_attention"}:
        with pytest.raises(
            ValueError, match="the cache has read 26 tokens: nothing is left to read"
        ):
            model.generate(ids, **{hf.CACHE: read}, **options)


def test_assisted_decoding_only_where_tokens_can_be_taken_back(loaded) -> None:
    ids = draw(1, 30)
    ids[0, 15:] = ids[0, :15]  # so that a look-up finds something
    for name in ("softmax", "alibi"):
        _, model = loaded[name]
        other = hf.TransNormerForCausalLM(model.config).eval()
        expected = model.generate(ids, **GREEDY)
        for helper in (
            {"prompt_lookup_num_tokens": 3},
            {"assistant_model": model},
            {"assistant_model": other},
        ):
            assert torch.equal(model.generate(ids, **helper, **GREEDY), expected)
        with pytest.raises(ValueError, match="cannot assist: its state cannot be rolled back"):
            model.generate(ids, assistant_model=loaded["tied"][1], **GREEDY)
    for name in ("tied", "untied", "mixed"):
        for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": loaded["softmax"][1]}):
            with pytest.raises(
                ValueError, match="assisted generation is not supported with stateful models"
            ):
                loaded[name][1].generate(ids, **helper, **GREEDY)


def test_pipelines(folders, loaded) -> None:
    for name in ("tied", "softmax"):
        write = transformers.pipeline("text-generation", model=str(folders[name]))
        prompts = ["First Citizen:", "O", "Speak, speak. What say you"]
        texts = write(prompts, batch_size=3, return_full_text=False, **GREEDY)
        own = loaded[name][0]
        for prompt, (text,) in zip(prompts, texts, strict=True):
            ids = torch.tensor([own.tokenizer.encode(prompt).ids])
            assert text["generated_text"] == own.tokenizer.decode(engine(own, ids))


# What a call takes and gives.


def test_embeddings_in_the_place_of_ids(both) -> None:
    _, model = both
    ids, mask = padded([4, 9], 9)
    vectors = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=vectors).logits, model(ids).logits)
    options = {**GREEDY, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(
        model.generate(inputs_embeds=vectors, **options), model.generate(ids, **options)[:, 9:]
    )
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": vectors}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)


def test_hidden_states_are_every_layers_input_and_the_heads(both) -> None:
    own, model = both
    ids, mask = padded([6, 13], 13)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == own.config.num_hidden_layers + 1
    for row, length in ((0, 6), (1, 13)):
        inputs: list[torch.Tensor] = []
        head, _ = own.hidden(ids[row : row + 1, -length:], inputs=inputs)
        for found, wanted in zip(states, [*inputs, head], strict=True):
            torch.testing.assert_close(found[row, -length:], wanted[0], rtol=1e-4, atol=1e-4)
    assert model(ids).hidden_states is None
    steps = model.generate(
        ids, output_hidden_states=True, return_dict_in_generate=True, **GREEDY
    ).hidden_states
    assert [len(step) for step in steps] == [4] * 9


def test_the_loss_is_the_models_and_gradients_accumulate(both) -> None:
    own, model = both
    ids = draw(4, 21)
    labels = ids.clone()
    labels[0, 3:11] = labels[3, :] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    own.zero_grad()
    model.zero_grad()
    loss = own.loss(ids, targets)
    loss.backward()
    output = model(ids, labels=labels)
    output.loss.backward()
    assert cache_of(output) is None if hf.CACHE in output else True
    torch.testing.assert_close(output.loss, loss)
    wide = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wide)
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, p in own.named_parameters():
        torch.testing.assert_close(whole[name], p.grad)
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        kept = model(ids[rows], labels=labels[rows], num_items_in_batch=count, logits_to_keep=1)
        assert kept.logits.shape == (len(ids[rows]), 1, VOCAB)
        kept.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name])
    loss, logits = model(ids, labels=labels, return_dict=False)[:2]
    assert torch.equal(logits, output.logits)


def test_logits_to_keep(tied) -> None:
    _, model = tied
    ids = draw(2, 9)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    torch.testing.assert_close(
        model(ids, logits_to_keep=torch.tensor([0, 4])).logits, logits[:, [0, 4]]
    )


def test_checkpointed_gradients_are_the_same(both, monkeypatch) -> None:
    _, model = both
    ids, calls = draw(2, 15), []
    model = copy.deepcopy(model).train()
    for layer in model.layers:
        forward = layer.mixer.forward
        monkeypatch.setattr(
            layer.mixer, "forward", lambda *args, forward=forward: calls.append(1) or forward(*args)
        )
    model(ids, labels=ids).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert len(calls) == 3
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=True).loss.backward()
    assert len(calls) == 9  # each layer once more in the backward pass
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, whole[name])
    assert torch.equal(model.eval().generate(ids, **GREEDY), both[1].generate(ids, **GREEDY))


def test_right_padding_is_read_and_a_cache_refused(both) -> None:
    _, model = both
    ids, mask = draw(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    output = model(ids, attention_mask=mask)
    assert hf.CACHE not in output
    torch.testing.assert_close(
        output.logits[0, :7], model(ids[:1, :7]).logits[0], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="no cache can go on from rows padded at the right"):
        model.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)


def test_packed_rows_are_their_texts_alone(both) -> None:
    _, model = both
    texts = [draw(1, length) for length in (5, 1, 9)]
    row, places = (
        torch.cat(texts, 1),
        torch.cat([torch.arange(text.shape[1]) for text in texts])[None],
    )
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    packings = (
        {"position_ids": places},
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9},
    )
    for packing in packings:
        output = model(row, **packing)
        assert hf.CACHE not in output
        for start, text in zip((0, 5, 6), texts, strict=True):
            alone = model(text).logits[0]
            torch.testing.assert_close(
                output.logits[0, start : start + len(alone)], alone, rtol=1e-4, atol=1e-4
            )
        with pytest.raises(ValueError, match="no cache can go on from packed rows"):
            model(row, use_cache=True, **packing)


def test_what_cannot_be_read_right_is_refused(both) -> None:
    _, model = both
    ids, holed = draw(2, 6), torch.ones(2, 6)
    holed[1, 2] = 0
    with pytest.raises(ValueError, match="attention_mask has a hole: padding between the tokens"):
        model(ids, attention_mask=holed)
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, T\] with T at least 6; got \[2, 1, 6, 6\]"
    ):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    for places in (
        torch.arange(6) + 1,
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.tensor([0, 1, 2, 2, 3, 4]),
    ):
        with pytest.raises(ValueError, match="position_ids must go on from the tokens read"):
            model(ids, position_ids=places[None])
    with pytest.raises(ValueError, match="position_ids must go on"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 2, 3, 4]]))
    cache = cache_of(model(ids))
    with pytest.raises(ValueError, match=r"tokens read \(\[6, 6\]\)"):
        model(ids, position_ids=torch.arange(6)[None], past_key_values=cache)
    late = torch.cat([torch.ones(2, 6), holed], 1)
    late[1, 6:9] = 0
    with pytest.raises(ValueError, match="hole: padding after tokens that were read before"):
        model(ids, attention_mask=late, past_key_values=cache)
    with pytest.raises(ValueError, match="no attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        model(ids, attention_masks=holed)
    last = model.config.layer_types[-1]
    other = {"linear_attention": "full_attention", "full_attention": "linear_attention"}[last]
    layer_types = {
        "full_attention": transformers.cache_utils.DynamicLayer,
        "linear_attention": transformers.cache_utils.LinearAttentionLayer,
    }
    foreign = transformers.DynamicCache(config=model.config)
    foreign.layers = [layer_types[other]()] * 3
    with pytest.raises(
        ValueError,
        match=r"this cache was not made for the model.*DynamicCache\(config=model\.config\)",
    ):
        model(ids, past_key_values=foreign)


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


# Tokenizers.


def test_the_tokenizer_is_ours(folders, loaded, tmp_path) -> None:
    tokenizer, own = (
        transformers.AutoTokenizer.from_pretrained(folders["tied"]),
        loaded["tied"][0].tokenizer,
    )
    text = TEXT.read_text()[:3_000]
    assert tokenizer(text)["input_ids"] == own.encode(text).ids
    assert tokenizer.decode(own.encode(text).ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    assert tokenizer.eos_token == "<|endoftext|>"
    batch = tokenizer(["O", "Speak, speak."], padding=True, return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - 1) + [1]
    shutil.copytree(folders["tied"], tmp_path / "named")
    values = json.loads((tmp_path / "named" / "config.json").read_text())
    (tmp_path / "named" / "config.json").write_text(
        json.dumps({**values, "bos_token_id": 3, "eos_token_id": 5})
    )
    named = transformers.AutoTokenizer.from_pretrained(tmp_path / "named")
    assert (named.eos_token_id, named.bos_token_id, named.pad_token_id) == (5, 3, 5)
    assert named(text)["input_ids"] == own.encode(text).ids
    tokenizer.pad_token = "!"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(folders["tied"] / "config.json", tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == own.encode(text).ids
    assert (again.pad_token, again.eos_token) == ("!", "<|endoftext|>")
    chat = [{"role": "user", "content": "Speak."}]
    assert again.apply_chat_template(chat, tokenize=False) == "user: Speak.\n"
    again.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="unsafe"):
        again.apply_chat_template(chat, tokenize=False)


# Training.


def batches(
    folder: Path, count: int = 24
) -> tuple[list[dict], transformers.DataCollatorForLanguageModeling]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    text = TEXT.read_text()
    data = [tokenizer(text[100 * n : 100 * n + 60 + n]) for n in range(count)]
    return data, transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)


def losses(trainer: transformers.Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIONS = {
    "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant", "seed": 1,
}  # fmt: skip


def test_a_trainer_trains_and_accumulation_changes_nothing(folders, tmp_path) -> None:
    data, collate = batches(folders["untied"])
    runs = []
    for size in (8, 2):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders["untied"])
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(size)),
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            save_steps=6,
            **OPTIONS,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data,
            data_collator=collate,
        )
        runs.append(losses(trainer))
        assert trainer.evaluate()["eval_loss"] < runs[-1][0] - 0.5
        assert trainer.predict(data[:2]).predictions.shape[::2] == (2, VOCAB)
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-3, atol=1e-3)
    assert runs[0][-1] < runs[0][0] - 0.5
    saved = transnormer.load(tmp_path / "8" / "checkpoint-6")
    ids = draw(1, 10)
    assert torch.equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "8" / "checkpoint-6")(
            ids
        ).logits,
        saved(ids)[0],
    )


@pytest.mark.parametrize("name", ["tied", "softmax"])
def test_lora_in_trl_trains_saves_and_merges(folders, name, tmp_path) -> None:
    text = TEXT.read_text()
    from datasets import Dataset

    data = Dataset.from_dict({"text": [text[100 * n : 100 * n + 60 + 5 * n] for n in range(4)]})
    runs = []
    for packing in (
        {},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": False},
    ):
        trainer = trl.SFTTrainer(
            model=str(folders[name]),
            args=trl.SFTConfig(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=4,
                bf16=False,
                save_strategy="no",
                **OPTIONS,
                **packing,
            ),
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(folders[name]),
            peft_config=peft.LoraConfig(r=4, target_modules=sorted(TARGETS), task_type="CAUSAL_LM"),
        )
        runs.append(losses(trainer))
    assert runs[0][-1] < runs[0][0]
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(runs[0]), rtol=1e-3, atol=1e-3)
    model, ids = trainer.model.eval(), draw(2, 15)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (
            expected - transformers.AutoModelForCausalLM.from_pretrained(folders[name])(ids).logits
        ).abs().max() > 1e-2
        model.save_pretrained(tmp_path / "adapter")
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        written = model.generate(input_ids=ids, **GREEDY)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.generate(ids, **GREEDY), written)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            transnormer.load(tmp_path / "merged")(ids)[0], expected, rtol=1e-4, atol=1e-4
        )


def test_a_token_that_pads_and_ends_texts_is_learned(folders) -> None:
    for end, learned in ((0, True), (None, False)):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folders["untied"], pad_token_id=0, eos_token_id=end
        )
        ids = torch.tensor([[5, 0, 9, 7]])
        model(ids, labels=ids).loss.backward()
        assert bool(model.embed_tokens.weight.grad[0].any()) is learned


def test_an_adapter_on_the_head_counts_in_the_loss(folders) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["untied"])
    config = peft.LoraConfig(
        target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model, ids = peft.get_peft_model(model, config), draw(2, 15)
    output = model(input_ids=ids, labels=ids)
    wide = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wide)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)


@pytest.mark.parametrize("width", [1, 6])
def test_generate_goes_on_beside_a_row_that_is_padding_alone(both, width) -> None:
    """It begins a text at place 0; the other row is as it is alone."""
    _, model = both
    ids, mask = padded([0, width], width)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with pytest.warns(UserWarning, match=r"rows \[0\] are padding alone"):
        written = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(written[1:], model.generate(ids[1:], attention_mask=mask[1:], **how))
    begun = written[:1, width : width + 1]
    rest = model.generate(begun, attention_mask=torch.ones_like(begun), **how)
    assert torch.equal(written[:1, width:], rest[:, :5])


def test_weights_assigned_to_a_model_on_meta_bring_its_decays(both) -> None:
    _, model = both
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = draw(2, 9)
    assert torch.equal(empty(ids).logits, model(ids).logits)


# Importing.


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_without_transformers_the_hub_says_what_to_install() -> None:
    done = python("""
import importlib.metadata, sys, transnormer
found = [None, "5.15.2"]
def version(name):
    if not (here := found.pop(0)):
        raise importlib.metadata.PackageNotFoundError(name)
    return here
importlib.metadata.version = version
sys.modules["transformers"] = None
while found:
    try:
        import transnormer.hub
    except ImportError as error:
        print(error)
""")
    assert done.stdout.splitlines() == [
        (
            f"transnormer.hub needs transformers 5.16 or newer, and there is {here}: pip install "
            "'transnormer[hf]'"
        )
        for here in ("none", "5.15.2")
    ], done.stderr


def test_another_librarys_command_knows_our_classes(folders, tmp_path, monkeypatch) -> None:
    (tmp_path / "command.py").write_text(
        "import sys, transformers\n"
        "if __name__ == '__main__':\n"
        "    print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__, "
        "len(sys.argv))\n"
    )
    command = [sys.executable, "-m", "transnormer.hub"]
    done = subprocess.run(
        [*command, "command", folders["tied"]], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["TransNormerConfig", "2"], done.stderr
    # nothing of what torchao says of itself while transformers imports it
    assert done.stderr == ""
    monkeypatch.setattr(sys, "argv", ["transnormer.hub"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("transnormer.hub", run_name="__main__")
    assert str(ended.value).startswith("error: which module?")
