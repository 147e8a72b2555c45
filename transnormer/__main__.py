"""The command line's first instructions, as `transnormer` and as `python -m transnormer`."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line. Ctrl-C ends it with exit code 130 and without a traceback, from the
    first import on."""
    # else it is ignored: a job in the background
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    from .cli import main

    try:
        main()
    finally:  # a second Ctrl-C, while Python shuts down, is as quiet
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, but in the midst of an import end at once.

    Every verb imports for seconds. Libraries written in C swallow an exception raised there, or
    print it and go on, so that Ctrl-C would be lost; and nothing is open yet that would have to be
    closed."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
