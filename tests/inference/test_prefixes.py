"""The store of prefixes: what is written is the same with it and without, and less is read."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.inference.test_engine import GREEDY, MODELS, VOCAB, Poisoned
from tests.model.test_language_model import small
from transnormer import Engine, LanguageModel, RequestSettings, State
from transnormer.inference import prefixes
from transnormer.inference.prefixes import LEAST, Prefixes, count_alike, share_beginnings

ROOM = 2**30  # bytes that hold every state of these tests
ONLY_READ = RequestSettings(max_tokens=0, stop_ids=())


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    torch.manual_seed(0)
    return {name: small(vocab_size=VOCAB, **changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def model(models: dict[str, LanguageModel]) -> LanguageModel:
    return models["convolved"]


def stored(store: Prefixes) -> dict[tuple[int, ...], State]:
    """What the store holds: tokens, and the state after them."""
    found = {}
    for node, state in store._states.items():
        text, each = [], node
        while each is not None:
            text[:0] = each.tokens.tolist()
            each = each.above
        assert len(text) == node.depth
        found[tuple(text)] = state
    return found


def tensors(state: State) -> list[torch.Tensor]:
    return [*(part for layer in state.layers for part in layer), state.seen]


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(1, VOCAB) for _ in range(count)]


def text(*numbers: int) -> list[int]:
    """20 tokens for each number, which are others for each."""
    return [1 + (20 * number + n) % (VOCAB - 1) for number in numbers for n in range(20)]


def written(model: LanguageModel, prompts: list[list[int]], settings: Any = GREEDY) -> list[Any]:
    """What an engine without a store makes of these prompts."""
    return [found.tokens for found in Poisoned(model).generate(prompts, settings)]


# Whatever the store does, texts are the same.


def related_prompt(draw: random.Random, before: list[list[int]]) -> list[int]:
    """A prompt that goes on from a beginning of one before, or from nothing."""
    begin = draw.choice(before) if before and draw.random() < 0.8 else []
    begin = begin[: draw.choice((len(begin), draw.randint(0, len(begin))))][:60]
    return begin + tokens(draw, draw.choice((0, 1, 3, 30))) or [5]


def run_mixture(model: LanguageModel, seed: int) -> Engine:
    draw = random.Random(seed)
    one = model(torch.tensor([tokens(draw, 30)]))[1].nbytes
    limit = draw.choice((one // 2, one, 2 * one, 3 * one, ROOM))
    options = {"slots": draw.choice((1, 2, 4)), "piece": draw.choice((3, 8, 64))}
    engine = Poisoned(model, prefix_bytes=limit, **options)
    asked, ever, left = [], {}, 12
    while left or engine.stats().used or engine.stats().waiting:
        action = draw.random()
        if left and action < 0.4:
            prompt = related_prompt(draw, [prompt for _, prompt, _ in asked])
            settings = RequestSettings(
                max_tokens=draw.choice((0, 1, 6)), seed=draw.randrange(2**63),
                keep=draw.random() < 0.3, stop_ids=(), logprobs=True,
            )  # fmt: skip
            places = [draw.randint(1, len(prompt)) for _ in range(draw.choice((0, 1, 2)))]
            handle = engine.submit(prompt, settings, keep_prefix=places)
            asked.append((handle, prompt, settings))
            left -= 1
        elif asked and action < 0.44:
            draw.choice(asked)[0].cancel()
        elif action < 0.46:
            engine._scheduler.read_again()  # as after a step that was interrupted
            engine._rows = None
        else:
            engine.step()
        for state in engine._prefixes.states:
            ever.setdefault(id(state), (state, [part.clone() for part in tensors(state)]))
        assert engine.stats().prefix_bytes <= limit
    plain = Poisoned(model).generate(*zip(*[one[1:] for one in asked], strict=True))
    for (handle, *_), wanted in zip(asked, plain, strict=True):
        found = handle.result()
        if found.finish_reason == "cancelled":
            assert found.tokens == wanted.tokens[: len(found.tokens)]
        else:
            assert found.tokens == wanted.tokens
            assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-8)
    for state, parts in ever.values():  # also those that were dropped: nothing wrote to them
        assert all(map(torch.equal, tensors(state), parts))
    return engine


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_texts_are_the_same_with_a_store(name: str, models: dict[str, LanguageModel]) -> None:
    hits = 0
    for seed in range(6):
        engine = run_mixture(models[name], seed)
        hits += engine.stats().prefix_hits
        for ids, state in stored(engine._prefixes).items():
            _, wanted = models[name](torch.tensor([ids]))
            for part, other in zip(tensors(state), tensors(wanted), strict=True):
                torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-9)
            parts = {part.untyped_storage().data_ptr(): part for part in tensors(state)}
            assert sum(part.untyped_storage().nbytes() for part in parts.values()) == state.nbytes
    assert hits > 5


@pytest.mark.proof
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_two_hundred_mixtures_with_a_store(name: str, models: dict[str, LanguageModel]) -> None:
    for seed in range(1_000, 1_200):
        run_mixture(models[name], seed)


# What is kept, and what is read.


def read_counts(engine: Engine, prompts: list[list[int]], **options: Any) -> list[int]:
    """How many tokens are read for each of these prompts, one after another."""
    counts, before = [], engine.stats().tokens_read
    for prompt in prompts:
        engine.submit(prompt, ONLY_READ, **options).result()
        counts.append(engine.stats().tokens_read - before)
        before = engine.stats().tokens_read
    return counts


def test_a_miss_reveals_the_branch_point(model: LanguageModel) -> None:
    engine = Poisoned(model, prefix_bytes=ROOM)
    prompts = [[*text(1, 2), *text(n)] for n in (3, 4, 5, 6)]
    assert read_counts(engine, prompts) == [59, 59, 19, 19]
    assert [*stored(engine._prefixes)] == [tuple(text(1, 2))]
    stats = engine.stats()
    assert (stats.prefix_hits, stats.tokens_saved, stats.prefix_states) == (2, 80, 1)
    assert stats.prefix_bytes == model(torch.tensor([text(1, 2)]))[1].nbytes
    assert stats.state_bytes == engine._slots.nbytes + stats.prefix_bytes
    # beyond a state that is there, the next branch point; the last has nothing left to read
    deeper = [[*text(1, 2, 3, 7), 1, n] for n in (2, 3, 4)]
    assert read_counts(engine, deeper) == [41, 21, 0]
    assert [len(ids) for ids in stored(engine._prefixes)] == [40, 60, 81]


def test_few_tokens_in_common_are_not_worth_a_state(model: LanguageModel) -> None:
    for common, states in ((LEAST - 1, 0), (LEAST, 1)):
        engine = Poisoned(model, prefix_bytes=ROOM)
        read_counts(engine, [[*text(1)[:common], 7 + n] for n in range(2)])
        assert engine.stats().prefix_states == states


def test_states_are_kept_where_the_caller_says(model: LanguageModel) -> None:
    """The end of a system prompt, and of the last user turn, as a chat names them."""
    engine = Poisoned(model, prefix_bytes=ROOM)
    system, turn = text(1)[:4], [*text(1)[:4], *text(2)]
    assert read_counts(engine, [turn], keep_prefix=[4, len(turn)]) == [23]
    assert [*stored(engine._prefixes)] == [tuple(system), tuple(turn[:-1])]
    assert read_counts(engine, [[*system, *text(3)], [*turn, 8, 9], turn]) == [19, 2, 0]
    for places in ([0], [5, 25], [-1]):
        with pytest.raises(ValueError, match=r"keep_prefix = .* of a prompt of 24 tokens"):
            engine.submit(turn, keep_prefix=places)


def test_the_state_of_a_request_that_is_kept_is_found_again(model: LanguageModel) -> None:
    engine = Poisoned(model, prefix_bytes=ROOM)
    first = engine.submit(text(1), dataclasses.replace(GREEDY, keep=True))
    more = [*text(1), *first.result().tokens, 7, 8]
    assert read_counts(engine, [more]) == [2]
    assert written(model, [more]) == [engine.submit(more, GREEDY).result().tokens]


def test_a_state_is_never_that_of_the_whole_prompt(model: LanguageModel) -> None:
    """A decoding step reads the last token, so a request begins before it; also where the prompt is
    a beginning of what is stored, or all of it."""
    engine = Poisoned(model, prefix_bytes=ROOM)
    read_counts(engine, [text(1, 2)], keep_prefix=[20, 30])
    for prompt, count in ((text(1, 2)[:20], 19), (text(1, 2)[:21], 0), (text(1, 2)[:30], 9)):
        assert read_counts(engine, [prompt]) == [count]
        assert [engine.submit(prompt, GREEDY).result().tokens] == written(model, [prompt])
    assert read_counts(engine, [[1], [2], text(1)[:1]]) == [0, 0, 0]


def test_requests_that_come_together_read_a_beginning_few_times(model: LanguageModel) -> None:
    """As many at once as a step reads tokens of; the others begin from what those have left."""
    prompts = [[*text(1, 2, 3), *text(n)[:5]] for n in range(4, 14)]
    engine = Poisoned(model, slots=10, piece=64, prefix_bytes=ROOM)
    results = engine.generate(prompts, GREEDY)
    assert [found.tokens for found in results] == written(model, prompts)
    assert engine.stats().prefix_hits == 8
    assert engine.stats().tokens_read == 2 * 64 + 8 * 4


def test_without_a_budget_nothing_is_kept_and_nothing_cut(model: LanguageModel) -> None:
    engine = Poisoned(model)
    handle = engine.submit(text(1, 2), dataclasses.replace(GREEDY, keep=True), keep_prefix=[3])
    assert engine._scheduler.next_pieces() == [(handle._request, 39)]
    assert read_counts(engine, [text(1, 2)] * 3) == [39 + 39, 39, 39]
    stats = engine.stats()
    assert (stats.prefix_hits, stats.prefix_states, stats.prefix_bytes) == (0, 0, 0)
    assert not engine._prefixes._root.below
    with pytest.raises(ValueError, match="prefix_bytes = -1, but must be 0 or more"):
        Engine(model, prefix_bytes=-1)


# What is dropped.


def state_bytes(model: LanguageModel) -> int:
    return model(torch.tensor([[1]]))[1].nbytes


def test_the_least_recently_used_state_goes_first(model: LanguageModel) -> None:
    engine = Poisoned(model, prefix_bytes=2 * state_bytes(model) + 1)
    a, b, c = text(1), text(2), text(3)
    read_counts(engine, [a, b], keep_prefix=[10])
    assert read_counts(engine, [a[:15]]) == [4]
    assert read_counts(engine, [c], keep_prefix=[10]) == [19]
    assert [*stored(engine._prefixes)] == [tuple(a[:10]), tuple(c[:10])]
    assert read_counts(engine, [b[:12], a[:12]]) == [11, 1]
    read_counts(engine, [c], keep_prefix=[10])  # kept again: used, and not held twice
    assert engine.stats().prefix_bytes == 2 * state_bytes(model)
    small_store = Poisoned(model, prefix_bytes=state_bytes(model) - 1)
    assert read_counts(small_store, [a] * 3, keep_prefix=[10]) == [19] * 3
    assert small_store.stats().prefix_states == 0


def test_what_a_waiting_request_begins_from_stays(model: LanguageModel) -> None:
    engine = Poisoned(model, slots=1, prefix_bytes=state_bytes(model))
    a, b = text(1), text(2)
    read_counts(engine, [a], keep_prefix=[10])
    first = engine.submit(b, GREEDY, keep_prefix=[10])
    second = engine.submit([*a[:10], 9], GREEDY)
    first.result()
    assert [*stored(engine._prefixes)] == [tuple(a[:10])]
    second.result()
    assert engine.stats().prefix_hits == 1
    read_counts(engine, [text(3)], keep_prefix=[10])  # now nobody waits for it
    assert [*stored(engine._prefixes)] == [tuple(text(3)[:10])]


def test_a_state_that_is_not_finite_is_not_kept(model: LanguageModel) -> None:
    engine, state = Engine(model, prefix_bytes=ROOM), model(torch.tensor([text(1)]))[1]
    for layer, part in ((0, 0), (1, -1)):
        broken = state.clone()
        broken.layers[layer][part].view(-1)[3] = torch.inf
        engine._prefixes.keep(text(1), broken)
        assert engine.stats().prefix_states == 0
    engine._prefixes.keep(text(1), state)
    state.layers[0][0].fill_(torch.nan)  # a copy was kept
    assert all(part.isfinite().all() for part in tensors(stored(engine._prefixes)[tuple(text(1))]))


def test_prefixes_are_forgotten_when_weights_change() -> None:
    model = small(vocab_size=VOCAB)
    engine = Poisoned(model, prefix_bytes=ROOM)
    read_counts(engine, [text(1)], keep_prefix=[10])
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight *= 1.5
    engine.forget_prefixes()
    assert (engine.stats().prefix_states, engine.stats().prefix_bytes) == (0, 0)
    assert [engine.submit(text(1), GREEDY).result().tokens] == written(model, [text(1)])


def test_a_store_that_never_hits_says_so_once(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(prompts: Callable[[int], list[int]]) -> int:
        caplog.clear()
        engine = Engine(model, slots=2, prefix_bytes=ROOM)
        engine.generate([prompts(n) for n in range(130)], ONLY_READ)
        return len(caplog.records)

    with caplog.at_level(logging.WARNING, logger="transnormer"):
        assert warned(lambda n: [1 + n, 5]) == 1
        assert "none of the first 50 requests began with a stored prefix" in caplog.text
        assert warned(lambda n: [*text(1), 1 + n, 5]) == 0


# The trie by itself.


def test_the_trie_finds_what_a_search_through_all_texts_finds(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "REMEMBERED", 90)
    draw, state = random.Random(0), State.new(model)
    store = Prefixes(model, 6 * state.nbytes)
    prompts: list[tuple[int, ...]] = []
    kept: list[tuple[int, ...]] = []
    for _ in range(1_500):
        ids = tuple(draw.choice((1, 2, 3)) for _ in range(draw.randint(1, 12)))
        if draw.random() < 0.5:
            store._remember(np.array(ids, np.int32))
            prompts = [*(each for each in prompts if each != ids), ids]
            while sum(map(len, prompts)) > 90:
                del prompts[0]
        else:
            store.keep(ids, state)
            kept = [*(each for each in kept if each != ids), ids][-6:]
        assert [*stored(store)] == kept
        ids = tuple(draw.choice((1, 2, 3)) for _ in range(draw.randint(1, 12)))
        node, (_, alike) = store._deepest(np.array(ids)), store._walk(np.array(ids))
        begins = [len(each) for each in kept if ids[: len(each)] == each]
        assert (node.depth if node else 0) == max(begins, default=0)
        each = [count_alike(np.array(ids), np.array(other)) for other in (*prompts, *kept)]
        assert alike == max(each, default=0)
    store.forget()
    assert not stored(store)


def test_an_interruption_leaves_an_empty_store(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Poisoned(model, prefix_bytes=ROOM)
    read_counts(engine, [text(1)], keep_prefix=[10])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = engine.submit(text(2), GREEDY, keep_prefix=[10])
    with monkeypatch.context() as patched:
        patched.setattr(State, "clone", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.stats().prefix_states == 0
    assert [handle.result().tokens] == written(model, [text(2)])


def test_prompts_that_share_a_beginning_are_told_from_others() -> None:
    assert share_beginnings([text(1, n) for n in (2, 3, 4)])
    assert not share_beginnings([text(1, 2), text(1, 3), text(2, 3), text(1)[:LEAST]])
    assert not share_beginnings([])
