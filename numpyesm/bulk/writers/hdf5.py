"""HDF5 in the layout of UniProt's embedding downloads, one dataset per id; docs/scaling.md describes it.

The vectors of a record are attributes of its dataset; further arrays lie in groups of their own, such as
`file["contacts/P12345"]`.
"""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py

from ...results import Field
from ...threads import WorkerPool
from ..journal import Row
from ..settings import Settings
from . import METADATA_KEY, described, free_name

# The output whose dataset is named by the id alone: the first of these that is there.
_MAIN = ("per_token", "mean", "bos", "contacts", "logits", "attentions", "classes")


def write(rows: Iterator[Row], settings: Settings, about: dict[str, Any], path: Path) -> None:
    """Write all records."""
    # Signal handlers run, and raise, in the main thread only: HDF5 calls our `write`, and must not see that.
    stop = threading.Event()
    WorkerPool(1).run_together(lambda _: _write(rows, settings, about, path, stop), 1, stop.set)


def _write(rows: Iterator[Row], settings: Settings, about: dict[str, Any], path: Path, stop: threading.Event) -> None:
    main, others, attributes = _places(settings)
    with closing(UnfailingFile(path)) as disk:
        # 1.8 is old enough for every reader and has no limit on the size of an attribute.
        with h5py.File(disk, "w", libver=("v108", "v110")) as file:
            file.attrs["model_name"] = about["model"]
            file.attrs[METADATA_KEY] = json.dumps(about)
            for field in others:
                file.create_group(field.name).attrs["original_id"] = field.name
            for row in rows:
                name = free_name(file.__contains__, hdf5_name(row.id), "#")
                arrays = dict(settings.unpack(row.data, row.length))
                dataset = file.create_dataset(name, data=arrays[main])
                for column, value in described(row, settings).items():
                    attribute = "original_id" if column == "id" else column
                    dataset.attrs[attribute] = _text(value) if isinstance(value, str) else value
                for field in attributes:
                    dataset.attrs[field.name] = arrays[field]
                for field in others:
                    beside = file[field.name].create_dataset(name, data=arrays[field])
                    beside.attrs["original_id"] = _text(row.id)
                disk.check()
                if stop.is_set():
                    return
        disk.check()
        os.fsync(disk.fileno())


def metadata(path: Path) -> Any:
    """Return the metadata of a finished file."""
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs[METADATA_KEY])


def _places(settings: Settings) -> tuple[Field, list[Field], list[Field]]:
    """The output under the bare id, those in groups of their own, and those that are attributes."""
    main = min(settings.fields, key=lambda field: (_MAIN.index(field.kind), -(field.layer or 0)))
    vectors = [field for field in settings.fields if len(settings.shape(field, 1)) == 1 and field != main]
    return main, [field for field in settings.fields if field != main and field not in vectors], vectors


def hdf5_name(id: str) -> str:
    """The id as a name in an HDF5 file, where `/` makes a group and `.` stands for the place itself."""
    name = id.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return name.replace(".", "%2E") if set(name) == {"."} else name


def _text(text: str) -> str:
    """HDF5's strings end at a NUL."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


class UnfailingFile(io.FileIO):
    """A new file whose writes always succeed, also on a full disk; `check` says whether they did.

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
