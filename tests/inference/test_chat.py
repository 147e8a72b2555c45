"""A conversation: what the model reads turn by turn, what stops an answer, and what can be taken
back."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from transnormer import LanguageModel, ModelConfig
from transnormer.data.chat import DEFAULT, Template, conversations
from transnormer.data.tokenizer import load_tokenizer
from transnormer.inference import sampling
from transnormer.inference import session as session_module
from transnormer.inference.chat import Conversation, talk
from transnormer.inference.sampling import Sampling
from transnormer.inference.session import generate_text


@pytest.fixture(scope="module")
def model(prepared: Path) -> LanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    model = LanguageModel(config).eval()
    model.tokenizer = load_tokenizer(prepared)
    return model


@pytest.fixture(scope="module")
def template(model: LanguageModel) -> Iterator[Template]:
    with Template(DEFAULT, model.tokenizer) as template:
        yield template


@pytest.fixture
def start(model: LanguageModel, template: Template) -> Callable[..., Conversation]:
    """Conversations of few tokens, with the template or, where `plain`, without one."""

    def start(plain: bool = False, **options) -> Conversation:
        options = {"max_tokens": 6, "sampling": Sampling(seed=1), **options}
        return Conversation(model, None if plain else template, **options)

    return start


def turn(conversation: Conversation, text: str) -> str:
    conversation.hear(text)
    return "".join(conversation.answer())


def seen(conversation: Conversation) -> int:
    """How many tokens the state has read, or is going to read before the next."""
    session = conversation._session.fork()
    session.read([])
    return int(session.state.seen)


@pytest.mark.parametrize("how", ["cut off", "stopped", "ended"])
def test_the_next_turn_stands_behind_the_end_of_the_answer(start, how: str) -> None:
    conversation = start(max_tokens=6 if how == "cut off" else 10_000, system="Be brief.")
    conversation.hear("Hello")
    prompt = seen(conversation)
    assert prompt == len(conversation.template.parts(conversation.messages)[0].ids)
    if how == "ended":  # by the token that it is going to draw first
        fork = conversation._session.fork()
        conversation._end = next(fork.write(1, Sampling(seed=1)))
    answer, pieces = conversation.answer(), []
    for piece in answer:
        pieces.append(piece)
        if how == "stopped":
            conversation.stop()
    assert conversation.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "".join(pieces)},
    ]
    assert bool(pieces) == (how != "ended")
    written = {"cut off": 6, "stopped": 1, "ended": 0}[how]
    assert seen(conversation) - prompt - 1 in range(written, written + 4)  # of a character, perhaps
    turn(conversation, "And now?")
    assert [message["role"] for message in conversation.messages[3:]] == ["user", "assistant"]


def test_without_a_template_the_model_goes_on_from_a_line(start, model: LanguageModel) -> None:
    options = {"max_tokens": 40, "sampling": Sampling(seed=2, temperature=2.0)}
    whole = "".join(generate_text(model, "Hello\n", **options))
    stop = whole[5:7]
    assert turn(start(plain=True, stop=stop, **options), "Hello") == whole[: whole.index(stop)]
    assert turn(start(plain=True, **options), "Hello") == whole.split("\n\n")[0]


@pytest.mark.parametrize("plain", [False, True])
def test_what_was_said_can_be_taken_back(start, plain: bool) -> None:
    conversation = start(plain)
    first = turn(conversation, "Hello")
    conversation.fork()
    second, messages = turn(conversation, "And now?"), conversation.messages
    assert turn(conversation, "And then?")
    conversation.undo()
    assert conversation.messages == messages
    conversation.back()
    assert len(conversation.messages) == 2
    assert turn(conversation, "And now?") == second
    conversation.reset()
    assert conversation.messages == []
    assert turn(conversation, "Hello") == first
    with pytest.raises(ValueError, match="/fork remembered nothing"):
        conversation.back()


@pytest.mark.parametrize("plain", [False, True])
def test_a_saved_conversation_goes_on_and_is_a_record_of_data(
    start, plain: bool, tmp_path: Path
) -> None:
    conversation, other = start(plain), start(plain)
    with pytest.raises(ValueError, match="nothing was said yet"):
        conversation.save(tmp_path / "talk")
    turn(conversation, "Hello")
    path = conversation.save(tmp_path / "talk")
    assert path == tmp_path / "talk.jsonl"
    (record,) = conversations([path], "messages")
    other.load(path)
    assert other.messages == conversation.messages == record.content
    assert turn(other, "And now?")
    with pytest.raises(ValueError, match=r"talk\.jsonl exists"):
        conversation.save(path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match=r"talk\.jsonl: must hold one conversation"):
        other.load(path)
    assert len(other.messages) == 4


# The terminal.


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def say(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Talk in a terminal, or through a pipe; returns what came to standard output and error."""

    def say(conversation: Conversation, content: bytes, kind: type = Terminal) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(content), encoding="utf-8"))
        talk(conversation, "runs/demo")
        out, error = capsys.readouterr()
        return out, error

    return say


def users(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def test_a_greeting_says_what_there_is_and_a_pipe_is_not_greeted(start, say) -> None:
    _, error = say(start(), b"")
    for word in (
        "runs/demo",
        "Ctrl-C",
        "Ctrl-D",
        "/reset",
        "/fork",
        "/back",
        "/save",
        "/load",
        "/help",
    ):
        assert word in error
    assert say(start(), b"", io.TextIOWrapper) == ("> \n", "")


def test_empty_lines_wrong_bytes_and_wrong_commands_end_nothing(start, say, tmp_path: Path) -> None:
    conversation = start()
    lines = [
        b"",
        b"  ",
        b"one",
        b"\xff\xfe",
        b"/what",
        b"/save",
        b"/back",
        b"/load nowhere.jsonl",
        b" /two",
        b"/3",
    ]
    _, error = say(conversation, b"\n".join(lines) + b"\n")
    assert users(conversation) == ["one", " /two", "/3"]
    for message in (
        "not UTF-8",
        "there is no /what",
        "/save needs",
        "remembered nothing",
        "nowhere.jsonl",
    ):
        assert f"{message}" in error
    with pytest.raises(ValueError, match="there is no /what"):
        say(conversation, b"/what\n", io.TextIOWrapper)


def test_commands_do_what_the_greeting_says(start, say, tmp_path: Path) -> None:
    conversation = start()
    say(conversation, b"one\n/fork\ntwo\n/back\nthree\n")
    assert users(conversation) == ["one", "three"]
    path = str(tmp_path / "talk").encode()
    say(conversation, b"/save " + path + b"\n/reset\nfour\n/quit\nfive\n")
    assert users(conversation) == ["four"]
    say(conversation, b"/load " + path + b".jsonl\n")
    assert users(conversation) == ["one", "three"]


def test_a_line_that_goes_wrong_is_taken_back(start, say, monkeypatch) -> None:
    conversation = start()
    turn(conversation, "one")
    before = seen(conversation)

    def broken(*_: object) -> None:
        raise ValueError("the model's logits are not finite")

    with monkeypatch.context() as patch:
        patch.setattr(session_module, "sample", broken)
        _, error = say(conversation, b"two\n")
    assert "error: the model's logits are not finite" in error
    assert (users(conversation), seen(conversation)) == (["one"], before)
    with monkeypatch.context() as patch:
        patch.setattr(conversation.template, "parts", lambda *_: signal.raise_signal(signal.SIGINT))
        _, error = say(conversation, b"two\n")
    assert "Stopped; this line is taken back" in error
    assert (users(conversation), seen(conversation)) == (["one"], before)


def test_ctrl_c_ends_the_answer_alone(start, say, monkeypatch) -> None:
    conversation, drawn = start(max_tokens=10_000), []

    def sample(*arguments):
        drawn.append(sampling.sample(*arguments))
        if len(drawn) in (5, 9):
            signal.raise_signal(signal.SIGINT)
        return drawn[-1]

    monkeypatch.setattr(session_module, "sample", sample)
    before = signal.getsignal(signal.SIGINT)
    say(conversation, b"one\ntwo\n")
    assert users(conversation) == ["one", "two"]
    assert len(drawn) == 9
    assert signal.getsignal(signal.SIGINT) is before
