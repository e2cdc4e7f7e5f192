"""What HDF5 needs where a disk may be full: a file whose writes do not fail while it is written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any


class UnfailingFile(io.FileIO):
    """A new file whose writes always succeed; `check` says whether they did.

    HDF5 crashes, or prints tracebacks, if it cannot write while it closes. From the first failure on, what it writes
    is therefore kept in memory: little, if `check` is called between records.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._end = 0
        self._error: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise what went wrong since the file was opened."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        from_end = whence == os.SEEK_END
        return super().seek(self._end + offset if from_end else offset, os.SEEK_SET if from_end else whence)

    def write(self, data: Any) -> int:
        view, start = memoryview(data).cast("B"), self.tell()
        try:
            done = 0
            while self._error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self._error = error
        if self._error is not None:
            self._kept.append((start, bytes(view)))
        self._end = max(self._end, self.seek(start + len(view)))
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view, start = memoryview(buffer).cast("B"), self.tell()
        stop = max(start, min(start + len(view), self._end))
        found = super().readinto(view[: stop - start]) or 0
        view[found : stop - start] = bytes(stop - start - found)
        for at, data in self._kept:
            low, high = max(at, start), min(at + len(data), stop)
            if low < high:
                view[low - start : high - start] = data[low - at : high - at]
        self.seek(stop)
        return stop - start

    def truncate(self, size: int | None = None) -> int:
        self._end = self.tell() if size is None else size
        try:
            if self._error is None:
                super().truncate(self._end)
        except OSError as error:
            self._error = error
        return self._end
