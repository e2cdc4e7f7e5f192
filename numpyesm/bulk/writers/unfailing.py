"""What HDF5 needs where a disk may be full and Ctrl-C may come: neither may reach it while it writes."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any


class UnfailingFile(io.RawIOBase):
    """A new file whose writes always succeed; `check` says whether they did.

    HDF5 crashes, or leaves tracebacks, when it cannot write while it closes. From the first failure on, what it writes
    is therefore kept in memory: little, if `check` is called between records.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115
        self._at = 0
        self._end = 0
        self._error: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise what went wrong since the file was opened."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._file.seek(self._at)
                left = view
                while left:
                    left = left[self._file.write(left) :]
            except OSError as error:
                self._error = error
        if self._error is not None:
            self._kept.append((self._at, bytes(view)))
        self._at += len(view)
        self._end = max(self._end, self._at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start, stop = self._at, max(self._at, min(self._at + len(view), self._end))
        self._file.seek(start)
        found = self._file.read(stop - start)
        view[: stop - start] = found.ljust(stop - start, b"\0")
        for at, data in self._kept:
            low, high = max(at, start), min(at + len(data), stop)
            if low < high:
                view[low - start : high - start] = data[low - at : high - at]
        self._at = stop
        return stop - start

    def truncate(self, size: int | None = None) -> int:
        self._end = self._at if size is None else size
        if self._error is None:
            try:
                self._file.truncate(self._end)
            except OSError as error:
                self._error = error
        return self._end

    def sync(self) -> None:
        """Onto the disk with it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class HeldSignals:
    """While it is entered, what Python does on a signal waits for `check`, or for the end.

    A handler may run, and raise, wherever Python code runs: also in the file's own `write`, called by the library.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, Any], Any]] = {}
        self._came: list[int] = []

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():  # handlers run in no other
            for number in signal.valid_signals():
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, lambda number, _: self._came.append(number))
        return self

    def check(self) -> None:
        """Do what was to be done on the signals that came."""
        while self._came:
            number = self._came.pop(0)
            self._handlers[number](number, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is None:
            self.check()
