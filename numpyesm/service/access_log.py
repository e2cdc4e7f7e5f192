"""One JSON line per request, written by a separate thread so that a stuck pipe stops nothing else."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any, TextIO

from ..formats import json_bytes

_MAX_WAITING = 10_000


class _Quiet(logging.Handler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drop lines that cannot be written: the queue is full, or the reader of the pipe is gone."""


class _ToQueue(_Quiet, QueueHandler): ...


class _ToStream(_Quiet, logging.StreamHandler[TextIO]): ...


class AccessLog:
    """Lines to a stream, stdout by default; dropped if the reader cannot keep up."""

    def __init__(self, stream: TextIO | None = None) -> None:
        waiting: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
        self._logger = logging.Logger("numpyesm.access")
        self._logger.addHandler(_ToQueue(waiting))
        self._listener = QueueListener(waiting, _ToStream(stream or sys.stdout))
        self._listener.start()

    def stop(self) -> None:
        """Write the waiting lines, if the reader takes them within two seconds."""
        stopping = threading.Thread(target=self._finish, daemon=True)
        stopping.start()
        stopping.join(timeout=2)

    def _finish(self) -> None:
        with suppress(queue.Full):  # nobody has read for long
            self._listener.stop()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one entry."""
        self._logger.info("%s", json_bytes(entry).decode())
