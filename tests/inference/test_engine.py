"""The engine: whoever shares it, each text is what a plain loop over whole passes writes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.model.test_language_model import small
from transnormer import Engine, LanguageModel, RequestSettings
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference.engine import Handle
from transnormer.inference.sampling import Sampling, SamplingBatch, sample
from transnormer.inference.scheduler import Request, Result
from transnormer.inference.text import Decoder

VOCAB, CAPACITY, END = 300, 96, 0
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MODELS: dict[str, dict[str, Any]] = {
    "published": {},
    "convolved": {"convolution": "heads", "qk_norm": True, "head_norm": True},
    "delta rule": {"decay": "delta", "convolution": "input"},
    "softmax": {"mixer": "softmax", "position": "rope"},
    "windows": {
        "num_attention_heads": 4,
        "layer_types": [LINEAR, SLIDING, LINEAR],
        "softmax": {"window": 5, "position": "rope", "num_key_value_heads": 2},
        "convolution": "heads",
    },
    "hybrid": {
        "num_attention_heads": 4,
        "layer_types": [SLIDING, LINEAR, FULL],
        "softmax": {"window": 16, "position": "none", "decay": "alibi"},
        "position": "ape",
        "max_position_embeddings": CAPACITY,
    },
}


def new_models(prepared: Path) -> dict[str, LanguageModel]:
    """A small model of each kind, with the tokenizer of a folder."""
    torch.manual_seed(0)
    found = {name: small(vocab_size=VOCAB, **changes) for name, changes in MODELS.items()}
    for model in found.values():
        model.tokenizer = load_tokenizer(prepared)
    return found


@pytest.fixture(scope="module")
def models(prepared: Path) -> dict[str, LanguageModel]:
    return new_models(prepared)


class Poisoned(Engine):
    """An engine whose slots hold NaN from the time when they are free."""

    def __init__(self, model: LanguageModel, **options: Any):
        super().__init__(model, **{"capacity": CAPACITY, **options})
        self._slots.poison_(range(len(self._slots.seen)))

    def _finish(self, request: Request, reason: str) -> None:
        slot = request.slot
        super()._finish(request, reason)
        if slot is not None:
            self._slots.poison_([slot])


@torch.inference_mode()
def alone(
    model: LanguageModel, prompt: list[int], settings: RequestSettings, written: list[int] = ()
) -> Result:
    """What the request comes to by itself: one forward pass over the whole text for each token.
    written: tokens that are given, not drawn."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    draw = Sampling(**{name: getattr(settings, name) for name in names})
    batch = SamplingBatch.of([draw], torch.device("cpu"))
    tokens, logprobs = [], []
    ends = (END,) if settings.stop_ids is None else settings.stop_ids
    stop = (settings.stop,) if isinstance(settings.stop, str) else settings.stop
    text, reason = "".join(Decoder(model.tokenizer, prompt).stream([])), "length"
    while len(tokens) < settings.max_tokens:
        ids = [*prompt, *tokens]
        logits = model(torch.tensor([ids]))[0][0, -1].clone()
        scores = logits.log_softmax(-1)
        for token in {*ids}:
            penalty = settings.repetition_penalty
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        for token, value in settings.bias.items():
            logits[token] += max(value, -1e9)  # which has no probability either
        token = int(sample(logits[None], batch, torch.tensor([len(tokens)])))
        token = written[len(tokens)] if len(tokens) < len(written) else token
        tokens.append(token)
        logprobs.append(float(scores[token]))
        if token in ends:
            reason = "stop"
            break
        text = "".join(Decoder(model.tokenizer, prompt).stream(tokens))
        if found := [(text.index(one) + len(one), text.index(one)) for one in stop if one in text]:
            text, reason = text[: min(found)[1]], "stop"
            break
    return Result(0, text, tokens, reason, logprobs if settings.logprobs else None)


def check(found: Result, wanted: Result) -> None:
    for name in ("tokens", "text", "finish_reason", "error"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert (found.logprobs is None) == (wanted.logprobs is None)
    if found.logprobs is not None:
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-8)


def drawn_settings(draw: random.Random) -> RequestSettings:
    return RequestSettings(
        max_tokens=draw.choice((0, 1, 4, 9, 14)),
        temperature=draw.choice((0, 0.7, 1, 2)),
        top_k=draw.choice((0, 0, 5, 60)),
        top_p=draw.choice((1, 0.95, 0.6)),
        min_p=draw.choice((0, 0, 0.05)),
        repetition_penalty=draw.choice((1, 1, 1.3)),
        bias=draw.choice(({}, {}, {}, {7: 4.0, 90: -5.0}, {8: float("-inf"), 9: 6.0})),
        seed=draw.randrange(2**63),
        stop=draw.choice(((), (), "e", ("th", "ou"))),
        stop_ids=draw.choice((None, None, range(0, VOCAB, 15))),
        logprobs=draw.random() < 0.4,
        keep=draw.random() < 0.4,
    )


def drawn_prompt(draw: random.Random, most: int) -> list[int]:
    return [draw.randrange(1, VOCAB) for _ in range(draw.choice((1, 2, draw.randint(1, most))))]


class Asked(NamedTuple):
    handle: Handle
    prompt: list[int]
    settings: RequestSettings
    written: list[int]


def run_mixture(model: LanguageModel, seed: int, folder: Path) -> int:
    """Requests that come at random moments, are forked, saved and resumed, or cancelled. Returns
    how many there were, after each was compared with itself alone."""
    draw = random.Random(seed)
    engines = [
        Poisoned(model, slots=draw.choice((1, 2, 3, 5)), piece=draw.choice((1, 3, 8, 64)))
        for _ in range(2)
    ]
    asked: list[tuple[Engine, Asked]] = []
    left = draw.randint(3, 7)
    while left:
        engine, action = draw.choice(engines), draw.random()
        mine = [one for owner, one in asked if owner is engine]
        mine = [one for one in mine if one.handle.finish_reason is None or one.settings.keep]
        if action < 0.15 or (action < 0.3 and not mine):
            prompt, settings = drawn_prompt(draw, 40), drawn_settings(draw)
            asked.append((engine, Asked(engine.submit(prompt, settings), prompt, settings, [])))
            left -= 1
        elif action < 0.3:
            one = draw.choice(mine)
            asked.append(resumed(engine, engines, one, draw, folder / f"{len(asked)}.safetensors"))
            left -= 1
        elif action < 0.33 and mine:
            draw.choice(mine).handle.cancel()
        else:
            engine.step()
    for engine in engines:
        while engine.step():
            pass
        assert engine.stats().used == engine.stats().waiting == 0
    for _, one in asked:
        found, wanted = one.handle.result(), alone(model, *one[1:])
        if found.finish_reason == "cancelled":
            assert found.tokens == wanted.tokens[: len(found.tokens)]
        else:
            check(found, wanted)
    return len(asked)


def resumed(
    engine: Engine, engines: list[Engine], one: Asked, draw: random.Random, path: Path
) -> tuple[Engine, Asked]:
    """A fork of a request, or the same from a file, perhaps in another engine: a copy of it, or
    with more of a prompt and settings of its own."""
    written = one.handle.tokens
    if copied := draw.random() < 0.5:
        settings, more = one.settings, []
        if one.handle.finish_reason is None and draw.random() < 0.5:
            settings = dataclasses.replace(settings, seed=draw.randrange(2**63))
    else:
        settings, more = drawn_settings(draw), drawn_prompt(draw, 8)
        settings = dataclasses.replace(settings, max_tokens=min(settings.max_tokens, 9))
    whole = [*one.prompt, *written, *more]
    if len(whole) + settings.max_tokens > CAPACITY:
        copied, settings, more = True, one.settings, []
    if draw.random() < 0.5:
        handle = engine.fork(one.handle, more, settings)
    else:
        engine.save_state(one.handle, path)
        engine = draw.choice(engines)
        handle = engine.load_state(path, more, settings)
    if copied:
        return engine, Asked(handle, one.prompt, settings, written)
    return engine, Asked(handle, whole, settings, [])


@pytest.mark.parametrize("name", MODELS)
def test_whoever_shares_the_engine_each_text_is_as_if_alone(
    name: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    for seed in range(5):
        assert run_mixture(models[name], seed, tmp_path) >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_write_what_others_do(name: str, models: dict[str, LanguageModel]) -> None:
    wide = {"hidden_size": 64, "num_attention_heads": 4}  # the kernels want heads of 16 and more
    model = small(vocab_size=VOCAB, **{**MODELS[name], **wide}).to("cuda", torch.float32)
    prompts = [[7], [3, 9, 4], [5] * 20, [8] * 11, [2, 6]]
    kinds = ({}, {"temperature": 0}, {"repetition_penalty": 1.5, "bias": {3: 2.0}}, {"top_k": 9})
    found = []
    for record in (False, True):
        engine = Engine(model, slots=3, capacity=CAPACITY, record=record)
        settings = [
            RequestSettings(max_tokens=25 + n, seed=n, logprobs=n == 1, **kinds[n % len(kinds)])
            for n in range(len(prompts))
        ]
        found.append([result.tokens for result in engine.generate(prompts, settings)])
        assert bool(engine._steps._recorded) == record
    assert found[0] == found[1]


@pytest.mark.proof
@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_mixtures(name: str, models: dict[str, LanguageModel], tmp_path: Path) -> None:
    for seed in range(1_000, 1_200):
        run_mixture(models[name], seed, tmp_path)


GREEDY = RequestSettings(temperature=0, max_tokens=6, stop_ids=())
# What went wrong in other engines, each as a test (the mixtures above find most of it, too).


def test_a_state_is_taken_at_its_own_token_while_prompts_are_read_together(
    models: dict[str, LanguageModel],
) -> None:
    """Pieces are cut from each prompt's own first token, whoever is read in the same pass."""
    model, draw = models["convolved"], random.Random(0)
    prompts = [drawn_prompt(draw, 30) for _ in range(6)]
    engine = Poisoned(model, slots=12, piece=16)
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
    forks = []
    while engine.step():
        forks += [(n, engine.fork(handles[n])) for n in range(6)] if len(forks) < 18 else []
    for n, handle in [*enumerate(handles), *forks]:
        check(handle.result(), alone(model, prompts[n], GREEDY))
    kept = engine.submit(prompts[0], dataclasses.replace(GREEDY, keep=True))
    kept.result()
    long = engine.fork(kept, [*range(1, 40)], GREEDY)
    start, last = kept._request.read, len(long._request.ids) - 1
    stops = []
    while pieces := engine._scheduler.next_pieces():
        stops += [stop for _, stop in pieces]
        engine.step()
    assert start % 16
    assert stops == [*range(start + 16 - start % 16, last, 16), last]


@pytest.mark.parametrize("name", ["published", "windows"])
def test_a_slot_keeps_nothing_of_the_text_before(
    name: str, models: dict[str, LanguageModel]
) -> None:
    model, engine = models[name], Poisoned(models[name], slots=1)
    only_read = dataclasses.replace(GREEDY, max_tokens=0, keep=True)
    for prompt in ([5], [7, 8, 9], [6], [5]):
        (found,) = engine.generate([prompt], GREEDY)
        check(found, alone(model, prompt, GREEDY))
        kept = engine.submit(prompt, only_read)
        assert kept.result().tokens == []
        check(engine.fork(kept, settings=GREEDY).result(), alone(model, prompt, GREEDY))


def test_how_a_text_is_drawn_leaves_its_slot_with_it(models: dict[str, LanguageModel]) -> None:
    """Also where a row beside it is biased and penalised."""
    model, engine = models["published"], Poisoned(models["published"], slots=2)
    plain = dataclasses.replace(GREEDY, max_tokens=3)
    other = dataclasses.replace(plain, bias={9: 90.0, 8: 60.0}, repetition_penalty=3)
    asked = [([4], other), ([5, 6], other), ([6, 9], plain), ([7], other), ([8], plain)]
    for result, one in zip(engine.generate(*zip(*asked, strict=True)), asked, strict=True):
        check(result, alone(model, *one))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["convolved", "hybrid"])
def test_rows_that_fill_up_a_step_write_nothing(
    name: str, models: dict[str, LanguageModel]
) -> None:
    engine = Poisoned(models[name], slots=8)
    handles = [engine.submit([1, 2, n + 3], GREEDY) for n in range(5)]  # padded to 8 rows
    while engine.step():
        for layer in engine._slots.layers:
            assert all(part[5:8].isnan().all() for part in layer)
        assert not engine._slots.seen[5:].any()
    for n, handle in enumerate(handles):
        check(handle.result(), alone(models[name], [1, 2, n + 3], GREEDY))


def test_what_follows_a_shared_prompt_reads_it_once(models: dict[str, LanguageModel]) -> None:
    model, engine = models["published"], Poisoned(models["published"], slots=4)
    prompt = [*range(1, 50)]
    shared = engine.submit(prompt, RequestSettings(max_tokens=0, keep=True))
    shared.result()
    assert engine.stats().tokens_read == 48
    forks = [engine.fork(shared, [60 + n], GREEDY) for n in range(4)]
    for n, fork in enumerate(forks):
        check(fork.result(), alone(model, [*prompt, 60 + n], GREEDY))
    stats = engine.stats()
    assert stats.tokens_read == 48 + 4
    assert stats.tokens_written == 24
    assert stats.state_bytes > engine._slots.nbytes
    del shared, forks, fork
    assert engine.stats().state_bytes == engine._slots.nbytes


def test_no_state_is_allocated_for_a_step(models: dict[str, LanguageModel]) -> None:
    engine = Engine(models["hybrid"], slots=3, capacity=CAPACITY)
    held = [part.data_ptr() for layer in engine._slots.layers for part in layer]
    size = engine.stats().state_bytes
    for n in range(5):
        engine.submit([n + 1], dataclasses.replace(GREEDY, max_tokens=3 + n))
    while engine.step():
        assert engine.stats().state_bytes == size
        assert [part.data_ptr() for layer in engine._slots.layers for part in layer] == held


def test_states_are_wide_where_weights_are_narrow() -> None:
    model = small(torch.bfloat16, vocab_size=VOCAB)
    engine = Engine(model, slots=2)
    assert {part.dtype for layer in engine._slots.layers for part in layer} == {torch.float32}
    (found,) = engine.generate([[3, 4, 5]], GREEDY)
    assert len(found.tokens) == 6


def test_logprobs_are_those_of_the_loss(models: dict[str, LanguageModel]) -> None:
    """Also of tokens that were drawn hot, penalised and biased."""
    model, prompt = models["windows"], [4, 5, 6]
    settings = RequestSettings(
        max_tokens=12, seed=1, temperature=2, repetition_penalty=2, bias={7: 3.0}, logprobs=True
    )
    (found,) = Engine(model, slots=2).generate([prompt], settings)
    ids = torch.tensor([[*prompt, *found.tokens]])
    with torch.no_grad():
        loss = model.loss(ids[:, :-1], ids[:, 1:], reduction="none").flatten()
    assert found.logprobs == pytest.approx((-loss[2:]).tolist(), abs=1e-9)


def test_logits_that_are_not_finite_end_one_request_alone(
    models: dict[str, LanguageModel],
) -> None:
    model, engine = models["published"], Engine(models["published"], slots=3)
    settings = dataclasses.replace(GREEDY, max_tokens=9, keep=True)
    handles = [engine.submit([n + 1, 2], settings) for n in range(3)]
    engine.step()
    engine._slots.poison_([handles[1]._request.slot])
    for n in (0, 2):
        check(handles[n].result(), alone(model, [n + 1, 2], settings))
    found = handles[1].result()
    assert (found.finish_reason, len(found.tokens)) == ("error", 1)
    assert "logits are not finite" in found.error
    with pytest.raises(ValueError, match="logits are not finite"):
        list(handles[1])
    with pytest.raises(ValueError, match="has ended, and its state was not kept"):
        engine.fork(handles[1], [5])
    (again,) = engine.generate([[2, 2]], settings)
    check(again, alone(model, [2, 2], settings))


def test_a_long_prompt_keeps_no_short_one_waiting(models: dict[str, LanguageModel]) -> None:
    engine = Engine(models["published"], slots=3, piece=4)
    long, short = engine.submit([5] * 80, GREEDY), engine.submit([7, 8, 9], GREEDY)
    for _ in range(3):
        engine.step()
    assert short.tokens
    assert not long.tokens
    assert long.result().tokens == alone(models["published"], [5] * 80, GREEDY).tokens


def test_a_long_prompt_stops_no_text_that_is_written(models: dict[str, LanguageModel]) -> None:
    model, engine = models["published"], Poisoned(models["published"], slots=2, piece=8)
    short = engine.submit([5], dataclasses.replace(GREEDY, max_tokens=20))
    engine.step()
    long = engine.submit([*range(1, 82)], GREEDY)
    for step in range(1, 11):
        before = engine.stats().tokens_read
        engine.step()
        assert len(short.tokens) == step + 1
        assert engine.stats().tokens_read - before == 8
    assert len(long.tokens) == 1
    check(long.result(), alone(model, [*range(1, 82)], GREEDY))


def test_text_comes_in_pieces_from_whichever_handle_is_asked(
    models: dict[str, LanguageModel],
) -> None:
    model, engine = models["published"], Engine(models["published"], slots=2)
    settings = [
        RequestSettings(seed=n, temperature=1.5, max_tokens=40, stop=stop, stop_ids=())
        for n, stop in enumerate(((), (), "e", ["th", "a"]))
    ]
    handles = [engine.submit("First Citizen", each, id=f"n{n}") for n, each in enumerate(settings)]
    pieces = [[*handle] for handle in (handles[2], *handles)][1:]
    ids = model.tokenizer.encode("First Citizen").ids
    for handle, said, each in zip(handles, pieces, settings, strict=True):
        assert "".join(said) == handle.text == handle.result().text
        assert all(said)
        check(handle.result(), alone(model, ids, each))
    assert [handle.id for handle in handles] == ["n0", "n1", "n2", "n3"]
    assert len([*engine.submit("First Citizen", settings[0])]) > 5
    results = engine.generate(["First Citizen"] * 4, settings)
    assert [found.text for found in results] == [handle.text for handle in handles]
    assert [found.id for found in results] == [6, 7, 8, 9]


def test_an_empty_prompt_begins_a_text(models: dict[str, LanguageModel]) -> None:
    model, told = models["published"], []
    found = Engine(model).generate(["", [END]], GREEDY, lambda *done: told.append(done))
    assert found[0].tokens == found[1].tokens == alone(model, [END], GREEDY).tokens
    assert told == [(1, 2), (2, 2)]
