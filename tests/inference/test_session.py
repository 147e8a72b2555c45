"""Generation: what is drawn, what stops it, and that the state is all there is."""

from __future__ import annotations

import itertools

import pytest
import torch

import transnormer
from transnormer import LanguageModel, ModelConfig
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference import session as session_module
from transnormer.inference.sampling import NOT_FINITE, Sampling, SamplingBatch, _uniform, sample
from transnormer.inference.session import PIECE, Session, generate_text

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
    options = {"max_tokens": 120, "sampling": Sampling(seed=6, temperature=1.5)}
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
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]]))

    def drawn(**options) -> set[int]:
        return {*draws(logits, 400, **options).tolist()}

    assert drawn(temperature=0) == {1}
    assert drawn(temperature=1, top_k=2, top_p=1) == {1, 2}
    assert drawn(temperature=1, top_p=0.5) == {1}
    assert drawn(temperature=1, top_p=0.6) == {1, 2}
    assert drawn(temperature=1, top_p=0.76) == {1, 2, 3}
    assert drawn(temperature=1, top_p=1) == {0, 1, 2, 3}
    assert drawn(temperature=1e-3, top_p=1) == {1}
    assert drawn(temperature=1, top_p=1, min_p=0.4) == {1, 2}
    assert drawn(temperature=0.5, top_p=1, min_p=0.2) == {1, 2}  # after temperature: 0.25 and 0.09
    for options in ({"top_p": 1}, {"top_p": 1, "top_k": 4}):
        counts = draws(logits, 4_000, temperature=1, **options).bincount(minlength=4)
        assert (counts / 4_000 - logits.exp()[0]).abs().max() < 0.04


def draws(logits: torch.Tensor, count: int, **options) -> torch.Tensor:
    """So many draws in a row from one row's logits, each as the row of a batch."""
    samplings = SamplingBatch.of([Sampling(**{"seed": 0, **options})] * count, logits.device)
    return sample(logits.expand(count, -1), samplings, torch.arange(count))


def test_each_row_is_drawn_as_if_it_were_alone() -> None:
    logits = 3 * torch.randn(6, 500)
    settings = [
        Sampling(seed=1),
        Sampling(temperature=0),
        Sampling(seed=2, top_k=3, temperature=2.0),
        Sampling(seed=1, top_p=0.4, temperature=5.0),
        Sampling(seed=9, temperature=1.0, top_p=1),
        Sampling(seed=2**63 - 1, top_k=400, temperature=3.0),
    ]
    for number in torch.randint(10_000, (20,)):
        alone = [
            sample(logits[row : row + 1], SamplingBatch.of([one], logits.device), number[None])
            for row, one in enumerate(settings)
        ]
        order = torch.randperm(6).tolist()
        together = SamplingBatch.of([settings[row] for row in order], logits.device)
        found = sample(logits[order], together, number.expand(6))
        assert found.tolist() == [int(alone[row]) for row in order]


def test_numbers_drawn_are_uniform_and_those_of_neighbouring_seeds_unrelated() -> None:
    seeds, numbers = torch.arange(300)[:, None], torch.arange(300)
    drawn = _uniform(*torch.broadcast_tensors(seeds, numbers))
    assert drawn.dtype == torch.float64
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = (drawn * 100).long().flatten().bincount(minlength=100)
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square of 99 degrees: p > 0.0007
    wave = drawn - 0.5
    for first, second in (
        (wave[1:], wave[:-1]), (wave[:, 1:], wave[:, :-1]), (wave[1:, :-1], wave[:-1, 1:])
    ):  # fmt: skip
        assert (first * second).mean().abs() * 12 < 4 / 300


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused_however_tokens_are_drawn(
    wrong: float, temperature: float
) -> None:
    logits = torch.tensor([[0.0, wrong, 1.0]])
    good = torch.tensor([[0.0, 9.0, 1.0]])
    samplings = SamplingBatch.of([Sampling(temperature=temperature)] * 2, logits.device)
    found = sample(torch.cat([logits, good]), samplings, torch.zeros(2, dtype=torch.int64))
    assert found.tolist() == [NOT_FINITE, 1]


def test_a_read_that_is_interrupted_goes_on_where_it_stopped(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PIECE", 8)
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


@pytest.mark.parametrize("kind", [{}, {"mixer": "softmax", "position": "rope"}], ids=str)
def test_writing_that_is_interrupted_anywhere_goes_on_where_it_stopped(
    kind: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a step, when some layers have moved on already."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, initializer_range=0.3, **kind,
    )  # fmt: skip
    model = LanguageModel(config).double().eval()
    monkeypatch.setattr(
        session_module, "LEAST_CAPACITY", 4
    )  # so that memory is enlarged on the way
    session, whole = Session(model), Session(model)
    for one in (session, whole):
        one.read([3, 4])
    wanted = list(whole.write(30, GREEDY))
    step, calls, found = model.layers[1].step_, [], []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(model.layers[1], "step_", interrupted)
    while len(found) < 30:
        try:
            for token in session.write(30 - len(found), GREEDY):
                found.append(token)
        except KeyboardInterrupt:
            continue
    assert found == wanted
    session.read([])
    whole.read([])
    assert session.state.seen.tolist() == whole.state.seen.tolist() == [32]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 2},
        {"min_p": -0.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
)
def test_sampling_that_makes_no_sense_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} = "):
        Sampling(**bad)


def test_what_cannot_be_generated_says_why(model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="outside the model's vocabulary of 300"):
        Session(model).read([300])
    with pytest.raises(ValueError, match="nothing was read yet"):
        next(Session(model).write(1))
    with pytest.raises(ValueError, match=r"repetition_penalty and bias need a transnormer.Engine"):
        next(Session(model).write(1, Sampling(bias={3: 1.0})))
    bare = LanguageModel(model.config)
    with pytest.raises(ValueError, match="no tokenizer"):
        transnormer.generate(bare, "hello")
    with pytest.raises(ValueError, match="max_tokens = -3, but must be 0 or more"):
        transnormer.generate(model, "hello", max_tokens=-3)
    with pytest.raises(ValueError, match="stop: an empty string"):
        transnormer.generate(model, "hello", stop="")
