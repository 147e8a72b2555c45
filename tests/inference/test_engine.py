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
from transnormer.inference.engine import Handle, Result
from transnormer.inference.sampling import Sampling, SamplingBatch, sample
from transnormer.inference.scheduler import Request
from transnormer.inference.text import Decoder

VOCAB, CAPACITY, END = 300, 96, 0
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MODELS: dict[str, dict[str, Any]] = {
    "published": {},
    "convolved": {"convolution": "heads", "qk_norm": True, "head_norm": True},
    "gated decay": {"decay": "gated", "convolution": "input"},
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


@pytest.fixture(scope="module")
def models(prepared: Path) -> dict[str, LanguageModel]:
    torch.manual_seed(0)
    found = {name: small(vocab_size=VOCAB, **changes) for name, changes in MODELS.items()}
    for model in found.values():
        model.tokenizer = load_tokenizer(prepared)
    return found


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
    draw = Sampling(
        **{
            name: getattr(settings, name)
            for name in ("temperature", "top_k", "top_p", "min_p", "seed")
        }
    )
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
    assert found.tokens == wanted.tokens
    assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)
    assert found.error is None
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
        bias={draw.randrange(VOCAB): draw.choice((3.0, -5.0, float("-inf")))}
        if draw.random() < 0.2
        else {},
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
    for seed in range(6):
        assert run_mixture(models[name], seed, tmp_path) >= 3


@pytest.mark.proof
@pytest.mark.parametrize("name", MODELS)
def test_two_hundred_mixtures(name: str, models: dict[str, LanguageModel], tmp_path: Path) -> None:
    for seed in range(1_000, 1_200):
        run_mixture(models[name], seed, tmp_path)
