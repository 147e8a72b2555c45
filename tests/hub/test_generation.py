"""Generation in transformers against our own engine: batches, beams, caches."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from ..lazy import Lazy
from .models import GREEDY, cache_of, draw, engine, padded

hf, transformers = Lazy("transnormer.hub.hf"), Lazy("transformers")


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
