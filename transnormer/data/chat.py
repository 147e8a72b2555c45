"""Conversations: reading records of them, and encoding them by a chat template.

A conversation is a list of messages, {"role": "system" | "user" | "assistant", "content": text}.
What the assistant says is learned, together with the token that ends it; everything else is only
read.
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

from .documents import Document, Record, normalised, read_records, require_unicode
from .tokenizer import encode, require_end_of_text, tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Messages = list[dict[str, str]]  # each of a "role" and a "content"

FORMATS = ("messages", "prompt", "alpaca")
ROLES = ("system", "user", "assistant")
FILE = "chat_template.jinja"  # stands beside tokenizer.json; transformers gives it this name
LARGEST_TEMPLATE_BYTES = 2**18
RENDER_SECONDS = 2.0  # the limit of processor time for one conversation
RENDER_BYTES = 2**29  # the limit of memory for the process that renders
RENDER_CHARS = 2**22  # the limit of characters that a template may write at a time

# This template needs no new token: it writes ordinary text, and the end of text, which every
# tokenizer here has and no message can spell.
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
# This template leaves a prompt and its completion as they are.
PLAIN = """\
{%- for message in messages %}
    {{- message['content'] }}
    {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
"""


def conversations(inputs: Sequence[str | Path], format: str) -> Iterator[Document[Messages]]:
    """The conversations of JSON lines and parquet files in order, each the content of a document.

    format: says what a record holds. That is a list of messages for "messages"; a prompt and its
        completion for "prompt"; an instruction, perhaps an input, and an output for "alpaca".
        Line ends become "\\n".

    Raises ValueError with one line that names the file, and the line or row, of a record that does
    not fit.
    """
    if format == "messages":
        read = read_records(inputs, ["messages"])
        found = ((each, each.content["messages"]) for each in read)
    elif format == "prompt":
        read = read_records(inputs, ["prompt", "completion"])
        found = ((each, _to_messages(each, ["prompt"], "completion")) for each in read)
    elif format == "alpaca":
        read = read_records(inputs, ["instruction", "output"], ["input"])
        found = ((each, _to_messages(each, ["instruction", "input"], "output")) for each in read)
    else:
        raise ValueError(f"format {format!r} is unknown; there are {', '.join(FORMATS)}")
    return (Document(each.id, _checked(each.id, given), each.metadata) for each, given in found)


def _to_messages(document: Document[Record], asked: Sequence[str], said: str) -> Messages:
    """A user's message from the fields `asked`, and the assistant's from the field `said`."""
    where, record = document.id, document.content
    names = (*asked, said)
    texts = {name: require_unicode(record.get(name, ""), f"{where}: {name!r}") for name in names}
    question = "\n\n".join(texts[name] for name in asked if texts[name])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": texts[said]}]


def _checked(where: str, messages: Any) -> Messages:
    """The messages, once each is known to have a role and a text, with nothing else."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of messages, not {_shown(messages)}")
    clean = []
    for number, message in enumerate(messages, start=1):
        what = f"{where} message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{what}: must hold role and content, not {_shown(message)}")
        if (role := message.get("role")) not in ROLES:
            raise ValueError(f"{what}: role {role!r} is not one of {', '.join(ROLES)}")
        for key, value in message.items():
            if key not in ("role", "content") and value not in (None, [], {}):
                raise ValueError(f"{what}: {key!r} is not supported, only role and content are")
        content = normalised(require_unicode(message.get("content"), f"{what}: content"))
        clean.append({"role": message["role"], "content": content})
    if not any(message["role"] == "assistant" for message in clean):
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return clean


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


# Templates.


def read_template(path: str | Path) -> str:
    """The source of a template.

    Raises FileNotFoundError where there is no such file, and ValueError where it is too large or
    not UTF-8. Both name the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _decode_template(path.read_bytes(), path)


def find_template(folder: str | Path, tokenizer: Tokenizer) -> str | None:
    """The source of the template in the folder of a model or a prepared folder, or None.

    It stands in FILE or in tokenizer_config.json. Where tokenizer_config.json names other special
    tokens than `Template` would give, they are set at the top of the source, so that it needs no
    file beside it. Raises ValueError that names the file where it is damaged or too large, or where
    it holds several templates.
    """
    folder = Path(folder)
    config = _tokenizer_config(folder / "tokenizer_config.json")
    if (folder / FILE).is_file():
        source = read_template(folder / FILE)
    elif "chat_template" in config:
        source = config["chat_template"]
    else:
        return None
    ours = special_tokens(tokenizer) if config else {}
    theirs = {name: config.get(name, token) for name, token in ours.items()}
    differing = {name: token for name, token in theirs.items() if token != ours[name]}
    sets = (f"{{% set {name} = {json.dumps(token)} %}}" for name, token in differing.items())
    return "".join(sets) + source


def choose_template(
    tokenizer: Tokenizer,
    format: str,
    folder: Path,
    given: str | Path | None,
) -> str:
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
    """The values of tokenizer_config.json that are texts: the template, and the special tokens.

    A token may be stored as a record, of which only the text counts. Without a file, this is empty.
    """
    if not path.is_file():
        return {}
    try:
        items = json.loads(path.read_bytes()).items()
        values = {key: value for key, value in items if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if (template := values.get("chat_template")) is not None:
        if not isinstance(template, str):
            file = path.parent / FILE
            raise ValueError(f"{path}: chat_template is not one text; put yours into {file}")
        _decode_template(template.encode(), path)
    for key, value in values.items():
        if isinstance(value, dict):
            values[key] = value.get("content")
    return {key: text for key, text in values.items() if isinstance(text, str)}


def _decode_template(content: bytes, path: Path) -> str:
    if len(content) > LARGEST_TEMPLATE_BYTES:
        raise ValueError(f"{path}: {len(content):,} bytes are too many for a chat template")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables for special tokens that a template may use; each is the end-of-text token.

    Raises ValueError where the tokenizer has no such token, because no turn could end.
    """
    end = require_end_of_text(tokenizer)
    token = tokenizer.get_added_tokens_decoder()[end].content
    return dict.fromkeys(("bos_token", "eos_token", "pad_token"), token)


class Part(NamedTuple):
    """A stretch of a conversation that is either learned or only read.

    bytes: the bytes of its text in UTF-8, without the special tokens.
    """

    ids: list[int]
    learned: bool
    bytes: int


def _unused_character(messages: Sequence[Mapping[str, str]]) -> str:
    """A character that no message holds, of those that Unicode will never assign."""
    candidates = map(chr, range(0xFDD0, 0xFDF0))
    return next(c for c in candidates if not any(c in message["content"] for message in messages))


class Template:
    """A chat template for one tokenizer, rendered in a sandbox by a process that `close` ends.

    Special tokens are tokens where the template writes them, and text where a message spells them.
    The parts of a conversation are encoded one by one, so that the ids of a part never depend on
    what follows it. So training sees the ids that a chat reads turn by turn on one state.

    This does not work on Windows. Raises ValueError with one line where the template does what it
    must not do, or does not fit a conversation.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "the chat template"):
        """name: what messages call the template, for example its file."""
        self.source, self.name = source, name
        self._tokenizer, self._end_of_text = tokenizer, require_end_of_text(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._ids = {token.content: number for number, token in added.items() if token.special}
        self._names = {str(number): content for content, number in self._ids.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
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
        """The id that ends a turn of the assistant."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return self.parts(probe)[-1].ids[-1]

    def parts(self, messages: Sequence[Mapping[str, str]]) -> list[Part]:
        """A conversation in parts that take turns: one is only read, the next is learned.

        A learned part is what the assistant says, up to and with the token that ends it. Where the
        last message is not the assistant's, the last part ends where the assistant would begin.
        Where the template writes nothing before the assistant's first turn, the first part is the
        end of text alone, because a model must read something before it can write; generating from
        an empty prompt begins in the same way.
        """
        # Where the parts end: after this many messages, and whether the assistant's turn has begun.
        cuts: list[tuple[int, bool]] = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                cuts += [(number, True), (number + 1, False)]
        if messages[-1]["role"] != "assistant":
            cuts.append((len(messages), True))
        mark = _unused_character(messages)
        safe = [{**each, "content": self._escape(each["content"], mark)} for each in messages]
        texts = self._ask({"messages": safe, "cuts": cuts})
        parts: list[Part] = []
        done = ""
        for (count, begun), text in zip(cuts, texts, strict=True):
            if not text.startswith(done):
                raise ValueError(
                    f"{self.name} changes what it wrote before when message {count} is there; "
                    "a model that reads turn by turn cannot take back what it has read"
                )
            ends = len(text) if begun else self._end_of_turn(text, len(done))
            parts.append(self._encode(text[len(done) : ends], mark, learned=not begun))
            done = text[:ends]
        if not parts[0].ids:
            parts[0] = Part([self._end_of_text], learned=False, bytes=0)
        return parts

    def _end_of_turn(self, text: str, start: int) -> int:
        """Where the last special token after `start` ends; ValueError if there is none."""
        *_, last = [None, *self._special.finditer(text, start)]
        if last is None:
            raise ValueError(
                f"{self.name} ends what the assistant says with no special token, "
                "so the model could not learn to stop; write {{ eos_token }} there"
            )
        return last.end()

    def _escape(self, content: str, mark: str) -> str:
        """Replace every special token that the content spells by its id between two marks."""
        return self._special.sub(lambda found: f"{mark}{self._ids[found[0]]}{mark}", content)

    def _encode(self, text: str, mark: str, learned: bool) -> Part:
        """Encode rendered text in which messages are escaped."""
        ids: list[int] = []
        size = at = 0
        for found in [*self._special.finditer(text), None]:
            plain = text[at : found.start() if found else len(text)]
            plain = re.sub(f"{mark}(\\d+){mark}", lambda escaped: self._names[escaped[1]], plain)
            ids += encode(self._tokenizer, plain)
            size += len(plain.encode())
            if found:
                ids.append(self._ids[found[0]])
                at = found.end()
        return Part(ids, learned, size)

    def _ask(self, request: dict[str, Any]) -> list[str]:
        """Send one request to the process of render.py, and return the texts that it rendered."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            code = self._process.wait()
            why = f"its process ended with code {code}"
            if code == -signal.SIGPROF:
                why = f"it takes more than {RENDER_SECONDS:g} s"
            raise ValueError(f"{self.name} was stopped: {why}") from None
        if "error" in answer:
            raise ValueError(f"{self.name} was refused: {answer['error']}")
        return list(answer["texts"])
