"""Answering before Lambda kills the function: an estimate before the work, an alarm during it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Kept back for writing the refusal.
RESERVE = 0.25
# Attention's share grows with the length; at this many tokens it takes as long as everything else.
_BALANCE = 2500.0
# What a request takes beside its tokens, in tokens.
_PER_REQUEST = 60.0
# Attention maps take so many times as long.
_DEAR = 1.5
# A short request tells little about a long one: nothing is expected to take more than so many times what was seen.
_REACH = 10.0


class DeadlinePassed(Exception):
    """The time is nearly up."""


class Deadline:
    """The moment by which an answer must be out; never, without a Lambda context."""

    def __init__(self, context: Any) -> None:
        remaining = getattr(context, "get_remaining_time_in_millis", None)
        self._ends = None if remaining is None else time.monotonic() + remaining() / 1e3 - RESERVE

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._ends is None else self._ends - time.monotonic()

    def check(self) -> None:
        """DeadlinePassed if the moment is gone."""
        if self.left <= 0:
            raise DeadlinePassed

    @property
    def has_alarm(self) -> bool:
        """Whether `alarm` can interrupt: signals reach the main thread only, and Windows has none of this kind."""
        return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """DeadlinePassed is raised inside when the moment comes, in the midst of whatever is being done."""
        self.check()
        if self._ends is None or not self.has_alarm:
            yield
            self.check()
            return

        def ring(_: int, __: FrameType | None) -> None:
            raise DeadlinePassed

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.left))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Pace:
    """How long requests have taken in this container."""

    def __init__(self) -> None:
        self._seconds_per_unit: float | None = None
        self._largest = 0.0

    @staticmethod
    def _units(lengths: Sequence[int]) -> float:
        return _PER_REQUEST + sum(n * (1 + n / _BALANCE) for n in lengths)

    def expect(self, lengths: Sequence[int], dear: bool) -> float:
        """Seconds that sequences of these lengths will take; 0 while nothing is known. `dear`: with attention maps."""
        units = min(self._units(lengths), _REACH * self._largest)
        return (self._seconds_per_unit or 0.0) * units * (_DEAR if dear else 1.0)

    def note(self, lengths: Sequence[int], dear: bool, seconds: float) -> None:
        """What a request took: quicker ones count at once, a slow one may have been a neighbour's fault."""
        units = self._units(lengths)
        pace = seconds / units / (_DEAR if dear else 1.0)
        known = self._seconds_per_unit
        self._seconds_per_unit = pace if known is None else min(pace, known * 1.2)
        self._largest = max(self._largest, units)

    def doubt(self) -> None:
        """A request was refused by this estimate, which nothing can prove wrong then: the next ones get a try."""
        if self._seconds_per_unit is not None:
            self._seconds_per_unit /= 2
