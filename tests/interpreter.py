"""Triton's interpreter, faster: what it does again at every call of a helper, it does once a
launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest


@contextmanager
def language_replaced_once() -> Iterator[None]:
    """Within, the interpreter replaces the functions of `tl` once a launch and module.

    Triton does so at every call of one kernel's function by another and leaves them replaced, so
    that the second time changes nothing. Looking for them is 40 % of what an interpreted kernel
    takes."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    def replace_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return None
        replaced.add(module)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()
        launch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield
