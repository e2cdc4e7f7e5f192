"""What HDF5 needs where a disk may be full: a file whose writes do not fail while it is written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class UnfailingFile(io.RawIOBase):
    """A new file whose writes always succeed; `check` says whether they did.

    HDF5 crashes, or prints tracebacks, if it cannot write while it closes. From the first failure on, what it writes
    is therefore kept in memory: little, if `check` is called between records.
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
        view[: stop - start] = self._file.read(stop - start).ljust(stop - start, b"\0")
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
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()
