"""Perplexity has no window edges and the right denominators."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from transnormer import TRANSFORMER, LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer
from transnormer.evaluation.perplexity import Score, score_ids, score_text

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
    for piece in (1, 7, 149, 150, 1_000):
        progress = Mock()
        assert score_ids(model, ids, piece=piece, progress=progress) == pytest.approx(whole, rel=1e-9)
        progress.assert_called_with(149, 149)
    with pytest.raises(ValueError, match="nothing to predict"):
        score_ids(model, [1])


def test_bytes_words_and_tokens_are_counted(prepared) -> None:
    model = LanguageModel(ModelConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="no tokenizer"):
        score_text(model, "hello")
    model.tokenizer = load_tokenizer(prepared)
    with pytest.raises(ValueError, match="empty"):
        score_text(model, " \n")
    text = "Ünder the sun\nit rained\n"
    score = score_text(model, text)
    assert score.tokens == len(model.tokenizer.encode(text).ids)  # the first one too, after the end of another text
    assert score.bytes == len(text.encode()) == len(text) + 1
    assert score.words == 5 + 2
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / score.bytes)
    assert score.perplexity == pytest.approx(300, rel=0.2)  # untrained: nearly uniform
    assert score + score == Score(2 * score.nats, 2 * score.tokens, 2 * score.bytes, 2 * score.words)
