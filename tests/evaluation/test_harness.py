"""The harness over our forward says what it says over its own backend."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from transnormer import LanguageModel, ModelConfig
from transnormer.data.tokenizer import encode
from transnormer.evaluation import continuations
from transnormer.evaluation.perplexity import score_ids
from transnormer.model.state import State

from ..lazy import Lazy
from .conftest import KINDS, SMALL, requests

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

harness = Lazy("transnormer.evaluation.harness")
QUESTION = (
    "Who comes first to the house of the king, and who comes last, when the night is long?\nAnswer:"
)
PAIRS = [
    *(
        (QUESTION, answer)
        for answer in (" the king", " the fool", " nobody at all, for the door is shut", " A", " B")
    ),
    (QUESTION + " the king\n\n" + QUESTION, " the queen"),
    (QUESTION + " the king\n\n" + QUESTION, " the king"),
    ("", "Good morrow"),  # after the prefix token alone
    ("Good ", "morrow"),  # the blank belongs to the continuation
    ("Hi", " there"),
    ("Hi", " there"),
    ("Ünder – 水", " 火"),
    (QUESTION * 2, QUESTION),
]


@pytest.mark.parametrize("batch_tokens", [1, 50, 8_192])
def test_loglikelihoods_equal_the_harness_own_backend(make, llama: HFLM, batch_tokens: int) -> None:
    ours = harness.HarnessLM(make("softmax"), batch_tokens=batch_tokens)
    wanted = llama.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(PAIRS))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)
    # continuations that greedy decoding writes, and some that differ from them in one token
    context = ours.tok_encode(QUESTION)
    greedy = llama.model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[
        0, len(context) :
    ].tolist()
    tokens = [(("", ""), context, greedy[:n]) for n in range(1, 7)]
    tokens += [
        (("", ""), context, [*greedy[:n], (greedy[n] + 1) % 300, *greedy[n + 1 :]])
        for n in range(6)
    ]
    wanted, found = (lm._loglikelihood_tokens(tokens, disable_tqdm=True) for lm in (llama, ours))
    assert [flag for _, flag in found] == [flag for _, flag in wanted] == [True] * 6 + [False] * 6
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_harness_own_backend_reads_our_folders_to_the_same_numbers(
    make, kind: str, tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    import transnormer.hub.hf  # noqa: F401  registers the classes with transformers

    model = make(kind)
    model.save_pretrained(tmp_path)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=4)
    wanted = theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)
    found = harness.HarnessLM(model).loglikelihood(requests(PAIRS))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch_tokens", "shared", "state_bytes"),
    [(8_192, 16, 2**31), (1, 1, 1), (64, 1, 2**17), (300, 5, 2**31)],
)
def test_every_way_of_reading_gives_the_same(
    make,
    kind: str,
    batch_tokens: int,
    shared: int,
    state_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(continuations, "SHARED", shared)
    monkeypatch.setattr(continuations, "STATE_BYTES", state_bytes)
    model = make(kind).double()
    lm = harness.HarnessLM(model, batch_tokens=batch_tokens)
    found = lm.loglikelihood(requests(PAIRS))
    for (context, continuation), (score, greedy) in zip(PAIRS, found, strict=True):
        kept = context.rstrip()
        ids = encode(model.tokenizer, context + continuation)
        first = len(encode(model.tokenizer, kept))
        if not context:
            ids, first = [0, *ids], 1
        with torch.inference_mode():
            logits = model(torch.tensor([ids]))[0][0, first - 1 : -1]
        target = torch.tensor(ids[first:])
        assert score == pytest.approx(
            -F.cross_entropy(logits, target, reduction="sum").item(), abs=1e-8
        )
        assert greedy == bool((logits.argmax(-1) == target).all())


def test_a_common_beginning_is_read_once(make) -> None:
    model = make("linear")
    question, other = (
        encode(model.tokenizer, QUESTION),
        encode(model.tokenizer, "Another, longer: " + QUESTION),
    )
    answers = [
        encode(model.tokenizer, text) for text in (" the king", " the fool and his dog", " A")
    ]
    asked = [(("", ""), prompt, answer) for prompt in (question, other) for answer in answers]
    read: list[tuple[int, int]] = []
    lm = harness.HarnessLM(model, progress=lambda *counts: read.append(counts))
    lm._loglikelihood_tokens(asked)
    tokens = len(question) + len(other) + 2 * sum(len(answer) - 1 for answer in answers)
    assert read[-1] == (tokens, tokens)
    # with examples before both questions
    examples = question * 2
    asked = [(("", ""), examples + prompt, answer) for _, prompt, answer in asked]
    lm._loglikelihood_tokens(asked)
    assert read[-1] == (tokens + len(examples),) * 2


def test_a_batch_keeps_to_its_tokens_and_states(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("linear")
    prompts = [encode(model.tokenizer, f"{n} {QUESTION}") for n in range(9)]
    asked = [(("", ""), prompt, [n, n]) for n, prompt in enumerate(prompts)]

    def batches(**options: Any) -> list[int]:
        read = [0]
        harness.HarnessLM(
            model, progress=lambda done, _: read.append(done), **options
        )._loglikelihood_tokens(asked)
        return [after - before for before, after in itertools.pairwise(read)]

    total = sum(len(prompt) + 1 for prompt in prompts)
    assert batches() == [total]
    some = batches(batch_tokens=total // 3)
    assert (max(some) <= total // 3, 3 <= len(some) <= 5, sum(some)) == (True, True, total)
    assert max(batches(batch_tokens=7)) == 7  # of one prompt at a time
    monkeypatch.setattr(
        continuations,
        "STATE_BYTES",
        2 * State.new(model).layers[0][0].nbytes + 1,
    )
    assert len(batches()) == 9  # the state of both layers, twice, is more
    monkeypatch.setattr(continuations, "STATE_BYTES", 3 * State.new(model).nbytes)
    assert len(batches()) == 3


def test_long_texts_carry_the_state_or_are_read_in_windows(make, llama: HFLM) -> None:
    texts = [QUESTION * 3, "Short.", ""]
    asked = requests([(text,) for text in texts], "loglikelihood_rolling")
    model = make("softmax")
    whole = harness.HarnessLM(model, batch_tokens=20).loglikelihood_rolling(asked)
    ids = [encode(model.tokenizer, text) for text in texts]
    assert whole[:2] == pytest.approx([-score_ids(model, [0, *row]) for row in ids[:2]], abs=1e-3)
    assert whole[2] == 0
    assert whole == pytest.approx(llama.loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)
    assert len(ids[0]) > 3 * 16
    llama._max_length = 16
    try:
        windows = llama.loglikelihood_rolling(asked, disable_tqdm=True)
        cut = llama.loglikelihood(requests(PAIRS[:2]), disable_tqdm=True)
    finally:
        llama._max_length = None
    assert harness.HarnessLM(model, max_length=16).loglikelihood_rolling(asked) == pytest.approx(
        windows, abs=1e-3
    )
    assert abs(windows[0] - whole[0]) > 0.1
    ours = harness.HarnessLM(model, max_length=16).loglikelihood(requests(PAIRS[:2]))
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in cut], abs=1e-3)


def test_learned_positions_end_where_their_table_does(make) -> None:
    model = make("softmax", position="ape", max_position_embeddings=24)
    lm = harness.HarnessLM(model)
    assert lm.max_length == 24
    ((score, _),) = lm.loglikelihood(requests([(QUESTION, " the king")]))
    ids = encode(model.tokenizer, QUESTION + " the king")
    count = len(ids) - len(encode(model.tokenizer, QUESTION))
    with torch.inference_mode():
        logits = model(torch.tensor([ids[-25:-1]]))[0][0, -count:]
    assert score == pytest.approx(
        -F.cross_entropy(logits, torch.tensor(ids[-count:]), reduction="sum").item(), abs=1e-4
    )


def test_written_text_equals_the_harness_own_backend(make, llama: HFLM) -> None:
    model = make("softmax")
    free = {"until": [], "max_gen_toks": 24, "do_sample": False}

    def written(lm: HFLM | harness.HarnessLM, *settings: dict) -> list[str]:
        contexts = (QUESTION, "The king")
        asked = requests(
            [(context, dict(words)) for words in settings for context in contexts], "generate_until"
        )
        # a character of which only some bytes were written shows in theirs
        return [text.rstrip("\ufffd") for text in lm.generate_until(asked, disable_tqdm=True)]

    ours = harness.HarnessLM(model)
    texts = written(ours, free)
    assert texts == written(llama, free)
    assert all(texts)
    stops = {**free, "until": [texts[0][5:7], texts[1][-3:-1]]}
    assert written(ours, stops) == written(llama, stops) != texts
    drawn = {**free, "do_sample": True, "temperature": 0.7, "top_k": 5}
    assert written(ours, drawn) == written(ours, drawn) != texts
    with pytest.raises(ValueError, match="num_beams"):
        written(ours, {**free, "num_beams": 4})


def test_scores_that_are_not_finite_are_refused(make) -> None:
    model = make("linear")
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(ValueError, match="a score is not a finite number"):
        harness.HarnessLM(model).loglikelihood(requests(PAIRS[:3]))


def test_a_model_without_tokenizer_or_end_of_text_is_refused(make) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        harness.HarnessLM(LanguageModel(ModelConfig(**SMALL)))
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = make("linear")
    model.tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    model.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="no end-of-text token"):
        harness.HarnessLM(model).loglikelihood(requests([("", "a b")]))
    model = LanguageModel(ModelConfig(**SMALL, eos_token_id=8))
    model.tokenizer = harness.HarnessLM.tokenizer or Tokenizer(
        models.BPE(vocab={"a": 0}, merges=[])
    )
    assert harness.HarnessLM(model).prefix_token_id == 8
