"""Answering before Lambda kills the function: an alarm interrupts the work."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Kept back for writing the refusal, in seconds.
RESERVE = 0.25


class DeadlinePassed(Exception):
    """The time is nearly up."""


class Deadline:
    """The moment by which an answer must be out; without a Lambda context there is none."""

    def __init__(self, context: Any) -> None:
        remaining = getattr(context, "get_remaining_time_in_millis", None)
        self._end = None if remaining is None else time.monotonic() + remaining() / 1e3 - RESERVE

    def check(self) -> None:
        """Raise DeadlinePassed if the moment is gone."""
        if self._end is not None and time.monotonic() >= self._end:
            raise DeadlinePassed

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """Raise DeadlinePassed inside when the moment comes, in the midst of whatever is being done.

        Signals reach the main thread only, which is where Lambda calls a function; elsewhere nothing is interrupted.
        """
        self.check()
        if self._end is None or threading.current_thread() is not threading.main_thread():
            yield
            self.check()
            return

        def ring(_: int, __: FrameType | None) -> None:
            raise DeadlinePassed

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self._end - time.monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
