"""One JSON line a request, written by a thread of its own so that a stuck pipe stops nobody."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

import orjson

_MAX_WAITING = 10_000


class AccessLog:
    """Lines to a stream, stdout by default; dropped and counted if the reader cannot keep up."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._lines: queue.Queue[bytes | None] = queue.Queue(_MAX_WAITING)
        self.dropped = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin writing."""
        self._thread = threading.Thread(target=self._write, name="numpyesm-access-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and end."""
        if self._thread is not None:
            with suppress(queue.Full):
                self._lines.put(None, timeout=1)
                self._thread.join(timeout=2)

    def add(self, entry: Mapping[str, Any]) -> None:
        """One request."""
        try:
            self._lines.put_nowait(orjson.dumps(entry, option=orjson.OPT_UTC_Z, default=str))
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line.decode() + "\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone
                self.dropped += 1
        with suppress(OSError, ValueError):
            self._stream.flush()
