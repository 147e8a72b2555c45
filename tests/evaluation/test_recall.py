"""Tasks of recall: what they ask can be answered from the row, and answers are counted right."""

from __future__ import annotations

import pytest
import torch

from transnormer import LanguageModel, ModelConfig
from transnormer.evaluation import recall


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_every_association_can_be_looked_up() -> None:
    ids, targets = recall.associations(50, 64, 8, 100, generator())
    assert ids.shape == targets.shape == (50, 64)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        table = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(table) == 8
        assert all(key < 50 <= value for key, value in table.items())
        asked = [at for at, target in enumerate(wanted) if target != recall.IGNORED]
        assert len(asked) == 8
        assert min(asked) >= 16
        assert {row[at] for at in asked} == table.keys()
        assert all(wanted[at] == table[row[at]] for at in asked)
    # most queries lie near the pairs
    places = (targets != recall.IGNORED).nonzero()[:, 1]
    assert places.float().median() < 16 + (64 - 16) / 2
    # what a model sees differs from row to row
    assert len({tuple(row) for row in ids[:, :16].tolist()}) == 50
    with pytest.raises(ValueError, match="9 pairs and as many queries do not fit rows of 32"):
        recall.associations(1, 32, 9, 100, generator())


def test_copies_ask_for_what_was_read() -> None:
    ids, targets = recall.copies(4, 11, 30, generator())
    assert torch.equal(ids[:, :5], ids[:, 6:])
    assert not ids[:, 5].any()
    assert torch.equal(targets[:, 5:10], ids[:, :5])
    assert (targets[:, :5] == recall.IGNORED).all()
    assert (targets[:, 10] == recall.IGNORED).all()
    with pytest.raises(ValueError, match="an odd number of tokens"):
        recall.copies(1, 4, 30, generator())


def test_accuracy_counts_the_answers_alone() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    model = LanguageModel(config).eval()
    ids, targets = recall.copies(10, 11, 30, generator())
    likeliest = model(ids)[0].argmax(-1)
    asked = targets != recall.IGNORED
    share = recall.accuracy(model, ids, likeliest.where(asked, recall.IGNORED), rows=3)
    assert share == 1
    wrong = likeliest.where(asked, recall.IGNORED)
    wrong[:5, 5:10] = (wrong[:5, 5:10] + 1) % 30
    assert recall.accuracy(model, ids, wrong) == 0.5


class Reader:
    """A stand-in for `score_requests`: it reads each prompt and answers from it, or guesses."""

    def __init__(self, knows: bool) -> None:
        self.knows, self.lengths = knows, set()

    def __call__(self, model, requests, batch_tokens):
        scores = []
        for request in requests:
            prompt = model.tokenizer.decode(request.tokens[: request.first].tolist())
            answer = model.tokenizer.decode(request.tokens[request.first :].tolist())
            self.lengths.add(request.first)
            thing = prompt.rpartition("The number of the ")[2].removesuffix(" is")
            told = f"The number of the {thing} is{answer}." in prompt
            scores.append((float(told if self.knows else not told), False))
        return scores


@pytest.mark.parametrize("knows", [True, False])
def test_a_needle_is_in_its_prompt(knows: bool, make, monkeypatch) -> None:
    model = make("linear")
    reader = Reader(knows)
    monkeypatch.setattr(recall, "score_requests", reader)
    text = list(range(5, 25)) * 50
    found = recall.needles(model, text, [100, 300], [0.0, 0.5, 1.0], trials=4, choices=5)
    assert [(each.length, each.depth) for each in found] == [
        (length, depth) for length in (100, 300) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(each.accuracy == float(knows) for each in found)
    assert reader.lengths == {100, 300}


def test_a_model_is_asked_for_needles(make) -> None:
    model = make("softmax")
    text = list(range(5, 25)) * 50
    found = recall.needles(model, text, [100], [0.5], trials=3, choices=4)
    assert found == recall.needles(model, text, [100], [0.5], trials=3, choices=4)
    assert 0 <= found[0].accuracy <= 1
    with pytest.raises(ValueError, match=r"needs \d+ tokens of text; there are 1000"):
        recall.needles(model, text, [2_000], trials=1)
