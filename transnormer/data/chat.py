"""Conversations: records of instruction data in, a chat template over them, ids out with what is to be learned.

A conversation is a list of messages, {"role": "system" | "user" | "assistant", "content": text}. What the assistant
says is learned, with the token that ends it; all else is only read.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .documents import normalised, read_records, require_unicode
from .tokenizer import encode, require_end_of_text, tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMATS = ("messages", "prompt", "alpaca")
ROLES = ("system", "user", "assistant")
FILE = "chat_template.jinja"  # in a folder, beside tokenizer.json; transformers' name for it
LARGEST_TEMPLATE_BYTES = 2**18
RENDER_SECONDS = 2.0  # of processor time, for one conversation
RENDER_BYTES = 2**29  # of memory
RENDER_CHARS = 2**22  # of text at a time

# Only ordinary text and the end of text, which no message can spell: every tokenizer has them, no token is new.
DEFAULT = """\
{%- for message in messages %}
    {{- message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant\\n' }}
{%- endif %}
"""
# Of records with a prompt and its completion, which are text as they are.
PLAIN = """\
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
"""


def conversations(inputs: Sequence[str | Path], format: str) -> Iterator[str]:
    """The conversations of JSON lines and parquet files, in order, each as JSON: a list of checked messages.

    format: what records hold: "messages", a list of them; "prompt", a prompt and its completion; "alpaca", an
    instruction, perhaps an input, and an output. Other fields are passed over. Line ends become "\\n".
    Raises ValueError in one line that names the file and the line or row.
    """
    if format == "messages":
        read = read_records(inputs, ["messages"])
        found = ((where, record["messages"]) for where, record in read)
    elif format == "prompt":
        found = (
            (where, _asked_and_said(where, record, ["prompt"], "completion"))
            for where, record in read_records(inputs, ["prompt", "completion"])
        )
    elif format == "alpaca":
        found = (
            (where, _asked_and_said(where, record, ["instruction", "input"], "output"))
            for where, record in read_records(inputs, ["instruction", "output"], ["input"])
        )
    else:
        raise ValueError(f"format {format!r} is unknown; there are {', '.join(FORMATS)}")
    return (_checked(where, messages) for where, messages in found)


def _asked_and_said(where: str, record: dict[str, Any], asked: Sequence[str], said: str) -> list[dict[str, str]]:
    names = (*asked, said)
    texts = {name: require_unicode(record.get(name, ""), f"{where}: {name!r}") for name in names}
    question = "\n\n".join(texts[name] for name in asked if texts[name])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[said]}]


def _checked(where: str, messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of messages, not {_shown(messages)}")
    clean = []
    for number, message in enumerate(messages, start=1):
        what = f"{where} message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{what}: must hold role and content, not {_shown(message)}")
        if message.get("role") not in ROLES:
            raise ValueError(f"{what}: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
        for key, value in message.items():
            if key not in ("role", "content") and value not in (None, [], {}):
                raise ValueError(f"{what}: {key!r} is not supported, only role and content are")
        content = normalised(require_unicode(message.get("content"), f"{what}: content"))
        clean.append({"role": message["role"], "content": content})
    if not any(message["role"] == "assistant" for message in clean):
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return json.dumps(clean, ensure_ascii=False)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


# Templates.


def read_template(path: str | Path) -> str:
    """A template's source. Raises ValueError or OSError naming the file: too large, not text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _limited(path.read_bytes(), path)


def find_template(folder: str | Path, tokenizer: Tokenizer) -> str | None:
    """The source of the template that a model's or prepared folder holds, in FILE or tokenizer_config.json; or None.

    Where tokenizer_config.json names other tokens than `Template` gives, the source sets them: it stands for itself.
    Raises ValueError naming the file where it is damaged, too large or names several templates.
    """
    folder = Path(folder)
    config = _tokenizer_config(folder / "tokenizer_config.json")
    if (folder / FILE).is_file():
        source = read_template(folder / FILE)
    elif "chat_template" in config:
        source = config["chat_template"]
    else:
        return None
    given = special_tokens(tokenizer) if config else {}
    other = {name: config[name] for name, token in given.items() if config.get(name, token) != token}
    return "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in other.items()) + source


def choose_template(tokenizer: Tokenizer, format: str, folder: Path, given: str | Path | None) -> str:
    """The source of the template that `prepare` uses.

    It is the file `given`; else PLAIN for format "prompt"; else that in the tokenizer's folder,
    or DEFAULT where that has none.
    """
    if given is not None:
        return read_template(given)
    if format == "prompt":
        return PLAIN
    found = find_template(tokenizer_folder(folder), tokenizer) if folder.is_dir() else None
    return DEFAULT if found is None else found


def _tokenizer_config(path: Path) -> dict[str, str]:
    """The texts among what it holds: the template, and tokens, which may be records; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = {key: value for key, value in json.loads(path.read_bytes()).items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if (template := values.get("chat_template")) is not None:
        if not isinstance(template, str):
            raise ValueError(f"{path}: chat_template is not one text; put the one to use into {path.parent / FILE}")
        _limited(template.encode(), path)
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _limited(content: bytes, path: Path) -> str:
    if len(content) > LARGEST_TEMPLATE_BYTES:
        raise ValueError(f"{path}: {len(content):,} bytes are too many for a chat template")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables that a template finds beside the messages: the end of text begins, ends and pads.

    Raises ValueError where the tokenizer has no end of text, because no turn could end.
    """
    end = require_end_of_text(tokenizer)
    return dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.get_added_tokens_decoder()[end].content)


class Part(NamedTuple):
    """A stretch of a conversation: ids; whether they are learned; bytes of their text in UTF-8, special tokens aside."""

    ids: list[int]
    learned: bool
    bytes: int


class Template:
    """A chat template for one tokenizer, rendered in a sandbox, in a process of its own that `close` ends.

    Special tokens count where the template writes them; spelled in a message they are text. The parts of a
    conversation are encoded one by one, so that where they meet never depends on what comes after: training sees the
    same ids as a chat that goes on turn by turn on one state. Not on Windows.
    Raises ValueError in one line for what a template must not do, and where it does not fit a conversation.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template"):
        """name: what errors call the template, e.g. its file."""
        self.source, self.name = source, name
        self._tokenizer, self._end_of_text = tokenizer, require_end_of_text(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._names = {str(number): token.content for number, token in added.items() if token.special}
        self._ids = {content: int(number) for number, content in self._names.items()}
        self._special = re.compile("|".join(map(re.escape, sorted(self._ids, key=len, reverse=True))))
        limits = map(str, (RENDER_SECONDS, RENDER_BYTES, RENDER_CHARS))
        command = [sys.executable, "-P", str(Path(__file__).with_name("render.py")), *limits]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._ask({"source": source, "tokens": special_tokens(tokenizer)})
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """End the process; the template cannot be used any more."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def end(self) -> int:
        """The id that ends what the assistant says."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return self.parts(probe)[-1].ids[-1]

    def parts(self, messages: Sequence[Mapping[str, str]]) -> list[Part]:
        """A conversation as what is read and, in turn, what the assistant says up to its end token.

        Where the last message is not the assistant's, the last part ends where the assistant would
        begin. Where the template writes nothing before the assistant's first turn, the first part is
        the end of text alone, as where a text is generated from an empty prompt: a model must read
        something before it can write.
        """
        cuts: list[tuple[int, bool]] = []  # so many messages, and whether the assistant's turn is begun
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                cuts += [(number, True), (number + 1, False)]
        if messages[-1]["role"] != "assistant":
            cuts.append((len(messages), True))
        mark = next(mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if not any(mark in m["content"] for m in messages))
        safe = [{**message, "content": self._escaped(message["content"], mark)} for message in messages]
        parts: list[Part] = []
        done = ""
        for (count, begun), text in zip(cuts, self._ask({"messages": safe, "cuts": cuts}), strict=True):
            if not text.startswith(done):
                raise ValueError(
                    f"{self.name} changes what it wrote before once message {count} is there: "
                    "a model that reads turn by turn cannot take back what it has read"
                )
            ends = len(text) if begun else self._end_of_turn(text, len(done))
            parts.append(self._encoded(text[len(done) : ends], mark, learned=not begun))
            done = text[:ends]
        if not parts[0].ids:
            parts[0] = Part([self._end_of_text], learned=False, bytes=0)
        return parts

    def _end_of_turn(self, text: str, start: int) -> int:
        """Where the last special token from `start` on ends. Raises ValueError where there is none."""
        *_, last = [None, *self._special.finditer(text, start)]
        if last is None:
            raise ValueError(
                f"{self.name} ends what the assistant says with no special token, so the model could not learn "
                "to stop: write {{ eos_token }} there"
            )
        return last.end()

    def _escaped(self, content: str, mark: str) -> str:
        """The content with the id between two marks for every special token that it spells."""
        return self._special.sub(lambda found: f"{mark}{self._ids[found[0]]}{mark}", content)

    def _encoded(self, text: str, mark: str, learned: bool) -> Part:
        ids: list[int] = []
        size = at = 0
        for found in [*self._special.finditer(text), None]:
            plain = text[at : found.start() if found else len(text)]
            plain = re.sub(f"{mark}(\\d+){mark}", lambda spelled: self._names[spelled[1]], plain)
            ids += encode(self._tokenizer, plain)
            size += len(plain.encode())
            if found:
                ids.append(self._ids[found[0]])
                at = found.end()
        return Part(ids, learned, size)

    def _ask(self, request: dict[str, Any]) -> list[str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            code = self._process.wait()
            late = code == -signal.SIGPROF
            why = f"it takes more than {RENDER_SECONDS:g} s" if late else f"its process ended with code {code}"
            raise ValueError(f"{self.name} was stopped: {why}") from None
        if "error" in answer:
            raise ValueError(f"{self.name} was refused: {answer['error']}")
        return list(answer["texts"])
