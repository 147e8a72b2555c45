"""Perplexity has no window edges and the right denominators."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer
from transnormer.evaluation.perplexity import Score, score_documents, score_ids, score_text
from transnormer.model.state import State

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("kind", [{}, TRANSFORMER], ids=["linear", "softmax"])
def test_pieces_do_not_change_the_score(kind: dict) -> None:
    model = LanguageModel(ModelConfig(**SMALL, **kind, initializer_range=0.3)).eval().double()
    ids = torch.randint(300, (150,)).tolist()
    with torch.inference_mode():
        logits, _ = model(torch.tensor([ids]))
        whole = F.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="sum").item()
    for piece in (1, 7, 149, 150, 1_000, None):
        progress = Mock()
        assert score_ids(model, ids, piece=piece, progress=progress) == pytest.approx(
            whole, rel=1e-9
        )
        done = [call.args for call in progress.call_args_list]
        assert done[0] == (0, 149)
        assert done[-1] == (149, 149)
        assert done == sorted(set(done))  # it moves with every piece, and never back
    with pytest.raises(ValueError, match="nothing to predict"):
        score_ids(model, [1])


@pytest.mark.parametrize("kind", [{}, TRANSFORMER], ids=["linear", "softmax"])
@pytest.mark.parametrize("window", [1, 10, 64, 149, 150, 10_000])
def test_windows_are_those_of_the_harness(kind: dict, window: int) -> None:
    """Every token but the first is predicted once, from what its window holds before it."""
    model = LanguageModel(ModelConfig(**SMALL, **kind, initializer_range=0.3)).eval().double()
    ids = torch.randint(300, (150,)).tolist()
    nats = 0.0
    for start in range(0, 149, window):
        stop = min(start + window, 149)
        first = max(0, stop - window)  # the last window is filled with what was predicted already
        with torch.inference_mode():
            logits, _ = model(torch.tensor([ids[first:stop]]))
        targets = torch.tensor(ids[start + 1 : stop + 1])
        nats += F.cross_entropy(logits[0, start - first :], targets, reduction="sum").item()
    for piece in (7, None):
        assert score_ids(model, ids, window=window, piece=piece) == pytest.approx(nats, rel=1e-9)
    with pytest.raises(ValueError, match="window must be 1 or more; got 0"):
        score_ids(model, ids, window=0)


def test_windows_read_no_more_than_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(ModelConfig(**SMALL, **TRANSFORMER)).eval()
    hidden, longest = model.hidden, []

    def watch(
        ids: torch.Tensor, state: State | None, **options: object
    ) -> tuple[torch.Tensor, State]:
        x, state = hidden(ids, state, **options)
        longest.append(int(state.seen.max()))
        return x, state

    monkeypatch.setattr(model, "hidden", watch)
    score_ids(model, torch.randint(300, (100,)).tolist(), window=16, piece=5)
    assert max(longest) == 16


def test_documents_are_scored_each_from_a_fresh_state(prepared) -> None:
    model = LanguageModel(ModelConfig(**SMALL)).eval()
    model.tokenizer = load_tokenizer(prepared)
    texts, progress = ["To be, or not", "Wer?", "that is\nthe question " * 9], Mock()
    total, count = score_documents(model, texts, progress=progress)
    alone = [score_text(model, text) for text in texts]
    assert count == 3
    assert total == alone[0] + alone[1] + alone[2]
    done = [call.args[0] for call in progress.call_args_list]
    assert done == sorted(done)
    assert done[-1] == total.bytes
    assert score_documents(model, iter([])) == (Score(0.0, 0, 0, 0), 0)
    with pytest.raises(ValueError, match="document 2: the text is empty"):
        score_documents(model, ["a b", " "])
    with torch.no_grad():
        model.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="document 1: the model's loss on the text is nan"):
        score_documents(model, texts)


def test_what_no_float_can_hold_is_no_number_in_a_record() -> None:
    record = Score(nats=5_000.0, tokens=5, bytes=10, words=2).record()
    assert (record["loss"], record["perplexity"], record["word_perplexity"]) == (
        1_000.0,
        None,
        None,
    )


def test_bytes_words_and_tokens_are_counted(prepared) -> None:
    model = LanguageModel(ModelConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="no tokenizer"):
        score_text(model, "hello")
    model.tokenizer = load_tokenizer(prepared)
    with pytest.raises(ValueError, match="empty"):
        score_text(model, " \n")
    text = "Ünder the sun\nit rained\n"
    score = score_text(model, text)
    # the first one too, after the end of another text
    assert score.tokens == len(model.tokenizer.encode(text).ids)
    assert score.bytes == len(text.encode()) == len(text) + 1
    assert score.words == 5 + 2
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.bytes)
    assert score.perplexity == pytest.approx(300, rel=0.2)  # untrained: nearly uniform
    assert score + score == Score(
        2 * score.nats, 2 * score.tokens, 2 * score.bytes, 2 * score.words
    )
