"""A file of prompts to a file of texts, JSON lines both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from ..data.documents import json_objects, require_unicode
from ..data.tokenizer import encode
from ..files import check_can_write, write_text
from ..model.language_model import LanguageModel
from .engine import Engine
from .prefixes import share_beginnings
from .scheduler import RequestSettings, Result
from .session import NO_TOKENIZER, Progress

# What the keys and values of all texts that are written at a time may take, where layers keep them.
GROWING_BYTES = 2**33
# What a line may set beside its prompt and its id, and the types of the values.
FIELDS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "seed": (int,),
    "stop": (str, list),
}


class Line(NamedTuple):
    """One prompt of a file. where: the file and the line, for messages."""

    where: str
    id: str | int
    prompt: str
    settings: RequestSettings


def read_lines(path: str | Path, settings: RequestSettings) -> list[Line]:
    """The prompts of a file, each with `settings` where its line does not say otherwise.

    Each line that is not blank is an object with a "prompt", perhaps an "id" (by default the number
    of the prompt, from 0), and any of FIELDS; a null counts as absent.
    Raises ValueError or OSError in one line that names the file, and the line that is wrong."""
    path, lines = Path(path), list[Line]()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        for where, record in json_objects(path, file):
            lines.append(_line(where, record, len(lines), settings))
    if not lines:
        raise ValueError(f"{path}: holds no prompt")
    return lines


def _line(where: str, record: dict[str, Any], number: int, settings: RequestSettings) -> Line:
    given = {name: value for name, value in record.items() if value is not None}
    if "prompt" not in given:
        raise ValueError(f"{where}: no field 'prompt'")
    prompt, id = require_unicode(given.pop("prompt"), f"{where}: prompt"), given.pop("id", number)
    if isinstance(id, str):
        require_unicode(id, f"{where}: id")
    elif type(id) is not int:
        raise ValueError(f"{where}: id holds {type(id).__name__}, not a string or a whole number")
    for name, value in given.items():
        if name not in FIELDS:
            known = ", ".join(["id", "prompt", *FIELDS])
            raise ValueError(f"{where}: unknown field {name!r}; a line may have {known}")
        if type(value) not in FIELDS[name]:
            wanted = " or ".join(kind.__name__ for kind in FIELDS[name])
            raise ValueError(f"{where}: {name} holds {type(value).__name__}, not {wanted}")
        for string in value if isinstance(value, list) else ():
            require_unicode(string, f"{where}: {name}")
    try:
        return Line(where, id, prompt, dataclasses.replace(settings, **given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write_texts(
    model: LanguageModel,
    lines: list[Line],
    out: str | Path,
    *,
    slots: int = 16,
    prefix_bytes: int = 2**28,
    progress: Progress | None = None,
) -> None:
    """Write on from each prompt, and at the end all texts to the file `out`, whole or not at all:
    for each a line {"id", "text", "tokens", "finish_reason"}, in the order of the prompts.

    slots: how many are written at a time, or fewer where layers keep all keys and values and these
        would take more than GROWING_BYTES.
    prefix_bytes: of the store of prefixes, which is on where prompts share beginnings.
    progress: called with (texts done, texts in all).
    Raises ValueError naming the line of a prompt that cannot be read, before any is; at the end
    where texts ended with an error, which their lines then hold; OSError naming `out`."""
    check_can_write(out)
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    prompts = [encode(model.tokenizer, line.prompt) for line in lines]
    lengths = [
        max(1, len(ids)) + line.settings.max_tokens
        for ids, line in zip(prompts, lines, strict=True)
    ]
    longest = max(lengths)
    each = 0
    if not model.config.bounded:  # every slot is as large as the longest text
        each = model.config.state_bytes(longest, itemsize=model.head_weight.itemsize)
        if each > GROWING_BYTES:
            where = lines[lengths.index(longest)].where
            raise ValueError(
                f"{where}: a text of {longest:,} tokens needs {each / 2**30:,.0f} GiB of keys and "
                f"values, more than {GROWING_BYTES >> 30}; lower max_tokens"
            )
    engine = Engine(
        model,
        slots=min(slots, len(lines), max(1, GROWING_BYTES // max(1, each))),
        capacity=longest,
        prefix_bytes=prefix_bytes if share_beginnings(prompts) else 0,
    )
    handles = []
    for ids, line in zip(prompts, lines, strict=True):
        try:
            handles.append(engine.submit(ids, line.settings, id=line.id))
        except ValueError as error:
            raise ValueError(f"{line.where}: {error}") from None
    results = []
    for handle in handles:
        results.append(handle.result())
        if progress is not None:
            progress(len(results), len(handles))
    write_text(
        out, "".join(json.dumps(_record(each), ensure_ascii=False) + "\n" for each in results)
    )
    if errors := [result.error for result in results if result.error is not None]:
        raise ValueError(f"{len(errors)} of {len(results)} texts ended with an error: {errors[0]}")


def _record(result: Result) -> dict[str, Any]:
    names = ["id", "text", "tokens", "finish_reason", *(["error"] if result.error else [])]
    return {name: getattr(result, name) for name in names}
