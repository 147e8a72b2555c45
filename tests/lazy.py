"""Libraries that take seconds to import, and that only some tests need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """A module that is imported when something of it is first used.

    Every worker of the suite imports every test module, but runs only some of the tests. Patch the
    module itself, by its name: an attribute that is set here does not reach it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest looks for its own marks on everything in a module
            raise AttributeError(name)
        return getattr(import_module(self._name), name)
