"""What a call of the model in transformers takes and gives, against our own numbers."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from transnormer import TRANSFORMER, ModelConfig, layer_config
from transnormer.model import mixers

from ..lazy import Lazy
from ..model.test_calls import TWIN, Twin
from .models import GREEDY, VOCAB, cache_of, draw, padded, small

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")


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


def test_a_mixer_whose_state_has_no_place_in_a_cache_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(layer_config.MIXERS, "twin", TWIN)
    monkeypatch.setitem(mixers.MIXERS, "twin", Twin)
    config = ModelConfig(
        vocab_size=29, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, mixer="twin"
    )
    model = hf.TransNormerForCausalLM(hf.TransNormerConfig(**dataclasses.asdict(config)))
    with pytest.raises(
        ValueError, match=r"mixer twin keeps 2 tensors a layer.*no place; transnormer.generate"
    ):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)


def test_convolutions_without_a_linear_layer_have_no_place_in_a_cache(tmp_path) -> None:
    own = small(**TRANSFORMER, convolution="heads")
    own.save_pretrained(tmp_path)
    model, ids = hf.TransNormerForCausalLM.from_pretrained(tmp_path), draw(2, 6)
    output = model(ids)
    torch.testing.assert_close(output.logits, own(ids)[0])
    assert hf.CACHE not in output
    with pytest.raises(ValueError, match="no place for the convolutions of softmax layers"):
        model(ids, use_cache=True)
    written = model.generate(ids, do_sample=False, max_new_tokens=3, use_cache=False)
    assert written.shape == (2, 9)
