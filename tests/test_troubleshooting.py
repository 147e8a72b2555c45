"""The page on what goes wrong shows what the code says."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest

from .conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
SHOWN = [
    line
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


def sentences() -> Iterator[tuple[str, int]]:
    """Every text of the package as a pattern, what is filled in being anything, and how many words
    are not filled in."""
    for path in sorted((REPOSITORY / "transnormer").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                fixed = [
                    part.value if isinstance(part, ast.Constant) else None for part in node.values
                ]
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in inner
            ):
                fixed = [piece for text in node.value.split("{}") for piece in (text, None)][:-1]
            else:
                continue
            if (said := sum(words(text or "") for text in fixed)) >= 3:  # else it is glue
                yield "".join(".+" if text is None else re.escape(text) for text in fixed), said


def words(text: str) -> int:
    return len(re.findall(r"[a-z]{2,}", text))


@functools.cache
def known() -> list[tuple[re.Pattern[str], int]]:
    return [(re.compile(pattern, re.DOTALL), said) for pattern, said in sentences()]


@pytest.mark.parametrize("line", SHOWN)
def test_what_the_page_shows_can_be_said(line: str) -> None:
    enough = words(line) * 0.23  # of its words, where messages hold messages
    found = (pattern for pattern, said in known() if said >= enough)
    assert any(pattern.fullmatch(text) for pattern in found for text in (line, f"error: {line}")), (
        f"nothing in transnormer/ says {line!r}"
    )
