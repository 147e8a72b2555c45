"""A conversation with a model on one state, and the terminal in which a person has it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.chat import Messages, conversations
from ..data.tokenizer import encode
from ..files import write_text
from ..model.language_model import LanguageModel
from .sampling import Sampling
from .session import NO_TOKENIZER, Progress, Session, end_token
from .text import Decoder, check_stop, until_stop

if TYPE_CHECKING:
    from ..data.chat import Template

HELP = """\
/reset          begin anew
/fork           remember the conversation as it is now
/back           return to what /fork remembered last
/save FILE      write the conversation to FILE.jsonl, as fine-tuning reads it
/load FILE      go on with a conversation that was saved
/help, /quit"""
BLANK = ("\n\n",)  # where an answer ends by default, without a template
END_KEY = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"


class Conversation:
    """Turns with a model on one state, whose size does not grow.

    With a template the model reads and writes turns as in training. Without one it goes on from
    each line of the user's up to `stop`, by default an empty line.

    messages: what was said so far; ends: the strings at which answers end.
    Raises ValueError where the model has no tokenizer.
    """

    def __init__(
        self,
        model: LanguageModel,
        template: Template | None = None,
        *,
        system: str = "",
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ):
        if model.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        self.model, self.template = model, template
        self._max_tokens, self._sampling = max_tokens, sampling
        self.ends = check_stop(stop) or (() if template else BLANK)
        self._end = template.end if template else end_token(model)
        self._system = [{"role": "system", "content": system}] if system else []
        self._marks: list[tuple[Session, Messages]] = []
        self._stopped = self._ended = False
        self.reset()

    def reset(self) -> None:
        """Begin anew. What `fork` remembered stays."""
        self._session = Session(self.model)
        self._read: list[int] = []  # the user's last turn
        self.messages: Messages = [*self._system]
        self._before = (self._session, self.messages)

    def hear(self, text: str, progress: Progress | None = None) -> None:
        """Read what the user says. progress: see `Session.read`. Raises ValueError where the
        template refuses it."""
        self._before = (self._session.fork(), self.messages)
        self.messages = [*self.messages, {"role": "user", "content": text}]
        if self.template is None:
            self._read = encode(self.model.tokenizer, text + "\n")
        else:
            self._read = self.template.parts(self.messages)[-1].ids
        self._session.read(self._read, progress)

    def answer(self) -> Iterator[str]:
        """What the model says to that, piece by piece; to be taken up to its end."""
        decoder = Decoder(self.model.tokenizer, () if self.template else self._read)
        said = ""
        for piece in until_stop(decoder.stream(self._tokens()), self.ends):
            said += piece
            yield piece
        self.messages = [*self.messages, {"role": "assistant", "content": said}]
        if self.template is None:
            self._session.read(encode(self.model.tokenizer, "\n"))
        elif not self._ended:  # the next turn stands behind its end
            self._session.read([self.template.end])

    def _tokens(self) -> Iterator[int]:
        self._stopped = self._ended = False
        count = 0
        for token in self._session.write(self._max_tokens, self._sampling, self._end):
            yield token
            count += 1
            if self._stopped:
                return
        self._ended = count < self._max_tokens

    def stop(self) -> None:
        """End the answer after the token that is being drawn. A signal handler may call this."""
        self._stopped = True

    def undo(self) -> None:
        """Take the user's last turn and the answer to it back, whole or not."""
        self._session, self.messages = self._before

    def fork(self) -> None:
        """Remember the conversation as it is now, for `back`."""
        self._marks.append((self._session.fork(), self.messages))

    def back(self) -> None:
        """Return to what the last `fork` remembered. Raises ValueError where there is none."""
        if not self._marks:
            raise ValueError("/fork remembered nothing that /back could return to")
        self._session, self.messages = self._marks.pop()

    def save(self, path: str | Path) -> Path:
        """Write the conversation as one record of fine-tuning data; returns the file's path, which
        ends in .jsonl. Raises ValueError where the file exists or nothing was said."""
        path = Path(path)
        if path.suffix != ".jsonl":
            path = path.with_name(f"{path.name}.jsonl")
        if path.exists():
            raise ValueError(f"{path} exists; choose another name")
        if self.messages == self._system:
            raise ValueError("nothing was said yet, so there is nothing to save")
        write_text(path, json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        return path

    def load(self, path: str | Path, progress: Progress | None = None) -> None:
        """Read a conversation that was saved, and go on with it. Raises ValueError or OSError that
        names the file where it holds none."""
        messages, *more = (each.content for each in conversations([path], "messages"))
        if more or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{path}: must hold one conversation, which ends with the assistant's turn"
            )
        session = Session(self.model)
        if self.template is None:
            text = "".join(message["content"] + "\n" for message in messages)
            session.read(encode(self.model.tokenizer, text), progress)
        else:
            parts = self.template.parts(messages)
            session.read([token for part in parts for token in part.ids], progress)
        self._session, self.messages = session, messages


@contextmanager
def reading_bar() -> Iterator[Progress]:
    """A `Progress` that draws a bar on standard error while a prompt is read, if that is a terminal
    and the reading takes more than two seconds."""
    from rich.progress import MofNCompleteColumn

    from ..data.prepare import progress_bar

    with progress_bar(MofNCompleteColumn()) as report:
        yield lambda done, total: report("reading the prompt (tokens)", done, total)


# The terminal.


def talk(conversation: Conversation, name: str) -> None:
    """Take turns between the model and standard input until that ends.

    name: what the greeting calls the model. What is not the model's goes to standard error.
    In a terminal Ctrl-C ends an answer, not the conversation, and what is wrong with a line is said
    before the next. Elsewhere KeyboardInterrupt, ValueError and OSError are raised.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        _greet(conversation, name)
    for line in _lines(interactive):
        try:
            if line == "/quit":
                return
            if re.fullmatch(r"/[a-z]+( .*)?", line):
                _say(_obey(conversation, line))
            else:
                _take_turn(conversation, line, interactive)
        except BrokenPipeError:  # nobody reads what is written
            raise
        except (KeyboardInterrupt, ValueError, OSError) as error:
            if not interactive:
                raise
            stopped = isinstance(error, KeyboardInterrupt)
            _say("\nStopped; this line is taken back." if stopped else f"error: {error}")


def _take_turn(conversation: Conversation, line: str, interactive: bool) -> None:
    """Print the answer to a line. What is raised meanwhile leaves the conversation as it was."""
    try:
        with reading_bar() as progress:
            conversation.hear(line, progress)
        with _on_ctrl_c(conversation.stop) if interactive else nullcontext():
            for piece in conversation.answer():
                print(piece, end="", flush=True)
    except BaseException:
        conversation.undo()
        raise
    print()


def _greet(conversation: Conversation, name: str) -> None:
    with suppress(ImportError):  # where there is none, the terminal edits lines itself
        import readline  # noqa: F401  # input() then edits lines and remembers them
    if conversation.template is None:
        where = "an empty line" if conversation.ends == BLANK else "a stop string"
        manner = f"It has no chat template, so it goes on from what you write, up to {where}."
    else:
        manner = "It answers by its chat template."
    _say(f"This is {name}. {manner}")
    _say(f"Ctrl-C ends an answer, {END_KEY} the chat.\n{HELP}")


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, line by line, without empty lines."""
    if hasattr(sys.stdin, "reconfigure"):
        # so that a wrong byte spoils its line alone
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            _say(f"\n({END_KEY} ends the chat)")
            continue
        try:
            line.encode()
        except UnicodeEncodeError as error:
            _say(
                f"error: this line is not UTF-8 at its character {error.start + 1}: write it again"
            )
            continue
        if line.strip():
            yield line


def _obey(conversation: Conversation, line: str) -> str:
    """Do what a command says; returns what to tell of it. Raises ValueError for one that is
    unknown."""
    command, _, argument = (part.strip() for part in line.partition(" "))
    if command in ("/save", "/load") and not argument:
        raise ValueError(f"{command} needs the name of a file")
    if command == "/help":
        return HELP
    if command == "/reset":
        conversation.reset()
        return "The conversation begins anew."
    if command == "/fork":
        conversation.fork()
        return "This point is remembered; /back returns to it."
    if command == "/back":
        conversation.back()
        return f"Back where {len(conversation.messages)} messages were said."
    if command == "/save":
        return f"Saved as {conversation.save(argument)}."
    if command == "/load":
        with reading_bar() as progress:
            conversation.load(argument, progress)
        return f"{len(conversation.messages)} messages were read."
    raise ValueError(f"there is no {command}; a blank before it makes it text. There are\n{HELP}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _on_ctrl_c(ask: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `ask`. A second one raises KeyboardInterrupt, in case the first is not
    obeyed."""

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ask()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
