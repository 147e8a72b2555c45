"""Triton's interpreter in half the time: what it does again at every call, it does once."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest


@contextmanager
def faster_interpreter() -> Iterator[None]:
    """Within, the interpreter replaces the functions of `tl` once a launch and module, makes the
    table of NumPy's dtypes once, and does not look for integers that overflow.

    Triton replaces them at every call of one kernel's function by another and leaves them replaced,
    so that the second time changes nothing. Kernels that are compiled look for no overflow either,
    and shapes of tests are far from it."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    pointer = numpy_dtype(tl.uint64)  # as Triton holds one
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[int] = set()

    def replace_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return None
        replaced.add(module)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **meta: Any) -> None:
        replaced.clear()
        launch(self, *arguments, **meta)

    def numpy_dtype_of(kind: Any) -> Any:
        return pointer if kind.scalar.is_ptr() else numpy_dtype(kind.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype_of)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield
