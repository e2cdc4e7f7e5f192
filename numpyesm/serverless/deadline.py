"""Answer before Lambda kills the function: an alarm interrupts the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..api.errors import ApiError

# Reserved for writing the refusal, in seconds.
RESERVE = 0.25


@contextmanager
def before_the_deadline(context: Any) -> Iterator[None]:
    """Raise ApiError 503 in the block when the function's time is nearly up.

    Signals reach the main thread only, which is where Lambda calls a function; elsewhere, and without a Lambda context,
    nothing is interrupted.
    """
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    if remaining is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise ApiError(
            503,
            "the function's time was nearly up: send fewer or shorter sequences at a time, or raise the function's "
            "time-out or memory",
            code="server.deadline",
            headers={"Retry-After": "1"},
        )

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining() / 1e3 - RESERVE))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
