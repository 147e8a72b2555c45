"""Tables of settings, whatever the settings are: built into dataclasses, changed by overrides,
written as TOML."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Sequence
from datetime import date, time
from typing import Any

from ..layer_config import nearest

_KINDS_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text, in quotes",
}


def build(kind: type, values: object, prefix: str) -> Any:
    """A dataclass from a table, refusing unknown keys and wrong types; ints are taken for
    floats."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} must be a table of settings, not {values!r}")
    hints = typing.get_type_hints(kind)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"unknown key {prefix}{key}{nearest(key, list(hints), prefix)}")
        wanted = hints[key]
        if isinstance(wanted, types.UnionType):  # of something and None, which is its absence
            wanted = typing.get_args(wanted)[0]
        if dataclasses.is_dataclass(wanted):
            built[key] = build(typing.cast(type, wanted), value, f"{prefix}{key}.")
            continue
        if wanted is float and type(value) is int:
            value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{prefix}{key} = {value}, but must be a finite number")
        if typing.get_origin(wanted) is tuple:
            item = typing.get_args(wanted)[0]
            if not isinstance(value, (list, tuple)):
                value = () if value == "" else (value,)
            value = tuple(value)
            kinds = (float, int) if item is float else (item,)
            fits = all(type(part) in kinds for part in value)
        else:
            fits = type(value) is (typing.get_origin(wanted) or wanted)
        if not fits:
            word = _KINDS_IN_WORDS.get(wanted, "a list or table")
            shown = value if isinstance(value, (date, time)) else repr(value)  # TOML has them, too
            raise ValueError(f"{prefix}{key} = {shown}, but must be {word}")
        built[key] = value
    return kind(**built)


def split_overrides(overrides: Sequence[str], example: str = "optim.lr=1e-3") -> dict[str, str]:
    """Setting -> text of `key=value` overrides. Raises ValueError for anything else, and for a
    setting given twice."""
    named: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise ValueError(f"{override!r} is not an override; write key=value, e.g. {example}")
        if key in named:
            raise ValueError(
                f"{key} is given twice, as {named[key]!r} and {text.strip()!r}; write it once"
            )
        named[key] = text.strip()
    return named


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key, and make the tables on the way to it. Raises ValueError where
    one of them is a setting."""
    *tables, last = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {table} is a setting, not a table")
    values[last] = value


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys, and tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def toml_value(value: object) -> str:
    """A value as TOML writes it, a table in one line and without what is None."""
    if isinstance(value, dict):
        items = (f"{key} = {toml_value(item)}" for key, item in value.items() if item is not None)
        return f"{{{', '.join(items)}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
