"""Generation: what is drawn, what stops it, and that the state is all there is."""

from __future__ import annotations

import itertools

import pytest
import torch

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference import engine
from transnormer.inference.engine import PIECE, Session, generate_text
from transnormer.inference.sampling import Sampling, sample

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(prepared) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.3,
    )
    model = LanguageModel(config).eval()
    model.tokenizer = load_tokenizer(prepared)
    return model


def test_greedy_text_is_what_the_whole_forward_says(model: LanguageModel) -> None:
    session = Session(model)
    ids = model.tokenizer.encode("First Citizen:\nSpeak").ids
    session.read(ids[:3])
    session.read(ids[3:])
    written = list(session.write(30, GREEDY))
    for token in written:
        logits, _ = model(torch.tensor([ids]))
        assert token == int(logits[0, -1].argmax())
        ids.append(token)


def test_writing_goes_on_where_it_stopped_and_forks_do_not_meet(model: LanguageModel) -> None:
    session = Session(model)
    session.read([5, 6, 7])
    whole = list(session.write(20, GREEDY))
    session = Session(model)
    session.read([5, 6, 7])
    first = list(itertools.islice(session.write(20, GREEDY), 8))
    fork = session.fork()
    assert list(itertools.islice(fork.write(20, GREEDY), 3)) == whole[8:11]
    fork.read([9])
    list(fork.write(5, GREEDY))
    assert first + list(session.write(12, GREEDY)) == whole


def test_a_long_prompt_is_read_in_pieces(model: LanguageModel) -> None:
    ids = torch.randint(300, (PIECE + 100,)).tolist()
    session = Session(model)
    session.read(ids)
    logits, _ = model(torch.tensor([ids]))
    assert next(session.write(1, GREEDY)) == int(logits[0, -1].argmax())
    assert session.state.seen.tolist() == [PIECE + 100]


def test_seeds_repeat_and_differ(model: LanguageModel) -> None:
    def text(seed: int) -> str:
        return "".join(generate_text(model, "O ", max_tokens=40, sampling=Sampling(seed=seed)))

    assert text(1) == text(1) != text(2)


def test_the_pieces_are_the_text(model: LanguageModel) -> None:
    for seed in range(2):
        session, sampling = Session(model), Sampling(seed=seed, temperature=2.0)
        session.read(model.tokenizer.encode("When").ids)
        ids = list(session.write(50, sampling))
        text = "".join(generate_text(model, "When", max_tokens=50, sampling=sampling))
        assert text == model.tokenizer.decode(ids)


def test_stop_strings_end_the_text_before_them(model: LanguageModel) -> None:
    options = {"max_tokens": 120, "sampling": Sampling(seed=5, temperature=1.5)}
    text = "".join(generate_text(model, "When", **options))
    for start, length in ((10, 1), (20, 7), (40, 15)):
        stop = text[start : start + length]
        cut = "".join(generate_text(model, "When", stop=["never there", stop], **options))
        assert cut == text[: text.index(stop)]
    assert "".join(generate_text(model, "When", stop=["\x00never"], **options)) == text


def test_the_end_of_text_ends_it(model: LanguageModel) -> None:
    session = Session(model)
    session.read([5])
    first = next(session.write(1, GREEDY))
    session = Session(model)
    session.read([5])
    assert list(session.write(10, GREEDY, end=first)) == []
    session.read([8])  # the end was read too
    assert session.state.seen.tolist() == [3]


def test_memory_of_a_token_does_not_grow(model: LanguageModel) -> None:
    session, sizes = Session(model), []
    session.read([5])
    for _ in session.write(600, Sampling(seed=1)):
        sizes.append(session.state.nbytes)
    assert len(set(sizes)) == 1
    assert session.state.seen.item() == 600


def test_filters_keep_the_likeliest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]]))

    def drawn(**options) -> set[int]:
        return {int(sample(logits, Sampling(**options), generator)) for _ in range(400)}

    assert drawn(temperature=0) == {1}
    assert drawn(temperature=1, top_k=2, top_p=1) == {1, 2}
    assert drawn(temperature=1, top_p=0.5) == {1}
    assert drawn(temperature=1, top_p=0.6) == {1, 2}
    assert drawn(temperature=1, top_p=0.76) == {1, 2, 3}
    assert drawn(temperature=1, top_p=1) == {0, 1, 2, 3}
    assert drawn(temperature=1e-3, top_p=1) == {1}
    counts = torch.zeros(4)
    for _ in range(4_000):
        counts[int(sample(logits, Sampling(temperature=1, top_p=1), generator))] += 1
    assert (counts / 4_000 - logits.exp()[0]).abs().max() < 0.04


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused_however_tokens_are_drawn(
    wrong: float, temperature: float
) -> None:
    logits = torch.tensor([[0.0, wrong, 1.0]])
    with pytest.raises(ValueError, match="logits are not finite"):
        sample(logits, Sampling(temperature=temperature), torch.Generator())


def test_a_read_that_is_interrupted_goes_on_where_it_stopped(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PIECE", 8)
    ids = torch.randint(300, (21,)).tolist()
    told: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 1:
            raise KeyboardInterrupt

    session, whole = Session(model), Session(model)
    with pytest.raises(KeyboardInterrupt):
        session.read(ids, interrupt)
    session.read([7], interrupt)
    whole.read([*ids, 7])
    assert told == [(8, 21), (8, 14), (14, 14)]
    assert list(session.write(5, GREEDY)) == list(whole.write(5, GREEDY))


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 2}],
)
def test_sampling_that_makes_no_sense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = "):
        Sampling(**bad)


def test_what_cannot_be_generated_says_why(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="outside the model's vocabulary of 300"):
        Session(model).read([300])
    with pytest.raises(ValueError, match="nothing was read yet"):
        next(Session(model).write(1))
    bare = LanguageModel(model.config)
    with pytest.raises(ValueError, match="no tokenizer"):
        transnormer.generate(bare, "hello")
    with pytest.raises(ValueError, match="max_tokens = -3, but must be 0 or more"):
        transnormer.generate(model, "hello", max_tokens=-3)
    with pytest.raises(ValueError, match="stop: an empty string"):
        transnormer.generate(model, "hello", stop="")
