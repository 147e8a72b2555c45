"""Runs that are asked to stop: the signals that ask, and when they are obeyed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """The run was asked to stop, and can go on. `signal_number` says who asked."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequests(list[int]):
    """The signals that asked this process to stop. While `at_once` is set, Ctrl-C is obeyed and not
    noted here."""

    at_once = False


@contextmanager
def stop_requests(at_once: bool) -> Iterator[StopRequests]:
    """Note SIGINT, SIGTERM and SIGHUP in a list; a second SIGINT (Ctrl-C) has its usual effect.

    A second SIGTERM does not, because torchrun hands one to its processes again where a scheduler
    has sent it to all.
    at_once: a first SIGINT, too, has its usual effect until the caller clears
    `StopRequests.at_once`."""
    received = StopRequests()
    received.at_once = at_once
    previous: dict[int, Any] = {}

    def note(got: int, frame: object) -> None:
        if got != signal.SIGINT:
            received.append(got)
        elif received.at_once or got in received:
            signal.signal(got, previous[got])
            signal.raise_signal(got)
        else:
            received.append(got)
            # not through sys.stderr, which may be in the middle of a line
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, without saving\n")

    try:
        for asked in STOPS:
            previous[asked] = signal.signal(asked, note)
    except ValueError:  # not the main thread: nobody can signal us
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
