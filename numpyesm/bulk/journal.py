"""What a run has read and computed, on disk in `OUT.partial/`: the same command goes on from here.

Four files. `journal.sqlite` lists the records in input order, the distinct sequences, and where each one's numbers lie;
`sequences.txt` holds the distinct sequences, one a line; `results.bin` the numbers, one blob behind the other;
`lock` is held by the run. Nothing of a record is kept in memory, however long the input.

Numbers are appended and synced before the journal names them, in one transaction: what a crash leaves behind the last
named blob is cut off. The order in which sequences were computed does not matter, and any engine may go on.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from ..errors import BulkError
from ..files import sync_folder

_SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE sequences (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, length INTEGER NOT NULL, copies INTEGER NOT NULL
);
CREATE TABLE records (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL, description TEXT NOT NULL, length INTEGER NOT NULL,
    number INTEGER, reason TEXT
);
CREATE TABLE results (number INTEGER PRIMARY KEY, offset INTEGER NOT NULL, size INTEGER NOT NULL, crc INTEGER NOT NULL);
"""
_CHUNK = 1024


class Pending(NamedTuple):
    """A sequence that has to be computed."""

    number: int
    sequence: str


class Row(NamedTuple):
    """A record with its numbers."""

    position: int
    id: str
    description: str
    length: int
    digest: bytes
    data: bytes


class Rejected(NamedTuple):
    """A record that could not be embedded."""

    position: int
    id: str
    description: str
    length: int
    reason: str


class Totals(NamedTuple):
    """How much there is, or how much of it is done."""

    records: int
    sequences: int
    residues: int


class Journal:
    """The state of one run in `folder`, which the caller has locked.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # We hold the folder's lock; SQLite's own ones are unreliable on network file systems.
        path = quote(str((folder / "journal.sqlite").absolute()))
        self._db = sqlite3.connect(f"file:{path}?nolock=1", uri=True, isolation_level=None)
        try:
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA cache_size=-16000")
            self._db.execute("PRAGMA temp_store=FILE")
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._db.executescript("BEGIN;" + _SCHEMA + "COMMIT;")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise readable_error(error, folder) from error
        self._spool: IO[bytes] | None = None
        self._results: IO[bytes] | None = None
        self._end = 0
        self._waiting: list[tuple[int, int, int, int]] = []
        self.waiting_bytes = 0

    # -- about the run ------------------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """Something noted about the run."""
        row = self._db.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, value: str) -> None:
        """Note something about the run."""
        self._db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (key, value))

    def totals(self) -> Totals:
        """What was read: records that can be embedded, distinct sequences, residues of these."""
        return self._sums("")

    def done(self) -> Totals:
        """What of it is computed."""
        return self._sums("JOIN results USING (number)")

    def _sums(self, join: str) -> Totals:
        query = f"SELECT total(copies), count(*), total(length) FROM sequences {join}"
        return Totals(*map(int, self._db.execute(query).fetchone()))

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def read_completely(self) -> bool:
        """Whether the whole input has been taken in."""
        return self.get("input") is not None

    def begin_reading(self) -> None:
        """Start on the input; what an interrupted reading left is dropped."""
        self._db.execute("BEGIN")
        for table in ("sequences", "records", "results"):
            self._db.execute(f"DELETE FROM {table}")
        self._spool = open(self.folder / "sequences.txt", "wb")  # noqa: SIM115
        (self.folder / "results.bin").unlink(missing_ok=True)
        self._next_number = 0

    def add_record(self, position: int, id: str, description: str, sequence: str, digest: bytes) -> None:
        """A record that can be embedded; its sequence is kept if it is new."""
        assert self._spool is not None
        found = self._db.execute("SELECT number FROM sequences WHERE digest = ?", (digest,)).fetchone()
        if found is None:
            number = self._next_number
            self._next_number += 1
            self._db.execute("INSERT INTO sequences VALUES (?, ?, ?, 1)", (number, digest, len(sequence)))
            self._spool.write(sequence.encode("ascii") + b"\n")
        else:
            number = found[0]
            self._db.execute("UPDATE sequences SET copies = copies + 1 WHERE number = ?", (number,))
        self._db.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, ?, NULL)", (position, id, description, len(sequence), number)
        )

    def add_rejected(self, rejected: Rejected) -> None:
        """A record that cannot be embedded, and why."""
        position, id, description, length, reason = rejected
        self._db.execute(
            "INSERT INTO records VALUES (?, ?, ?, ?, NULL, ?)", (position, id, description, length, reason)
        )

    def finish_reading(self, fingerprint: str) -> None:
        """The input is at its end; `fingerprint` tells it from others."""
        assert self._spool is not None
        self._spool.flush()
        os.fsync(self._spool.fileno())
        self._spool.close()
        self._spool = None
        sync_folder(self.folder)
        self.put("input", fingerprint)
        self._db.execute("COMMIT")

    # -- computing ----------------------------------------------------------------------------------------------

    def begin_computing(self) -> None:
        """Open the results, cut to what is named in the journal."""
        end = self._db.execute("SELECT coalesce(max(offset + size), 0) FROM results").fetchone()[0]
        path = self.folder / "results.bin"
        self._results = open(path, "r+b" if path.exists() else "w+b", buffering=0)  # noqa: SIM115
        size = self._results.seek(0, os.SEEK_END)
        spool = self.folder / "sequences.txt"
        if size < end or not spool.exists():
            raise BulkError(f"{self.folder} is damaged: results are missing. Begin anew with --restart")
        self._results.truncate(end)
        self._end = end

    def pending(self) -> Iterator[Pending]:
        """Sequences that have no result yet, in input order. Results may be added meanwhile."""
        with open(self.folder / "sequences.txt", "rb") as spool:
            first = 0
            while lines := [line for _, line in zip(range(_CHUNK), spool, strict=False)]:
                done = self._done(first, first + len(lines))
                for number, line in enumerate(lines, start=first):
                    if number not in done:
                        yield Pending(number, line[:-1].decode("ascii"))
                first += len(lines)

    def _done(self, first: int, last: int) -> set[int]:
        query = "SELECT number FROM results WHERE number >= ? AND number < ?"
        return {row[0] for row in self._db.execute(query, (first, last))}

    def done_mask(self) -> npt.NDArray[np.uint8]:
        """One bit a distinct sequence, set if it has its result: for workers that read `sequences.txt` themselves."""
        mask = np.zeros(self.totals().sequences, dtype=bool)
        for (number,) in self._db.execute("SELECT number FROM results"):
            mask[number] = True
        return np.packbits(mask)

    def add_result(self, number: int, data: bytes) -> Totals:
        """Append one sequence's numbers, and say what it stands for. They count once `commit` has returned."""
        assert self._results is not None
        self._results.seek(self._end)
        view = memoryview(data)
        while view:
            view = view[self._results.write(view) :]
        self._waiting.append((number, self._end, len(data), zlib.crc32(data)))
        self._end += len(data)
        self.waiting_bytes += len(data)
        query = "SELECT copies, 1, length FROM sequences WHERE number = ?"
        return Totals(*self._db.execute(query, (number,)).fetchone())

    def commit(self) -> None:
        """From here on what was added survives whatever happens."""
        if not self._waiting or self._results is None:
            return
        os.fsync(self._results.fileno())
        self._db.execute("BEGIN")
        try:
            self._db.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", self._waiting)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._waiting = []
        self.waiting_bytes = 0

    # -- writing ------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """Records with their numbers, in input order."""
        # CROSS: SQLite is to keep this order of the tables, so that nothing has to be sorted.
        query = """
            SELECT position, id, description, records.length, digest, offset, size, crc
            FROM records CROSS JOIN sequences USING (number) CROSS JOIN results USING (number) ORDER BY position
        """
        with open(self.folder / "results.bin", "rb") as results:
            for position, id, description, length, digest, offset, size, crc in self._db.execute(query):
                results.seek(offset)
                data = results.read(size)
                if zlib.crc32(data) != crc:
                    raise BulkError(
                        f"{self.folder} is damaged: the numbers of {id!r} do not have their checksum. "
                        "Begin anew with --restart"
                    )
                yield Row(position, id, description, length, digest, data)

    def rejected(self) -> Iterator[Rejected]:
        """Records that could not be embedded, in input order."""
        query = "SELECT position, id, description, length, reason FROM records WHERE reason NOT NULL ORDER BY position"
        return (Rejected(*row) for row in self._db.execute(query))

    def num_rejected(self) -> int:
        """How many these are."""
        return int(self._db.execute("SELECT count(*) FROM records WHERE reason NOT NULL").fetchone()[0])

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        for file in (self._spool, self._results):
            if file is not None:
                file.close()
        self._db.close()


def readable_error(error: sqlite3.Error, folder: Path) -> Exception:
    """An SQLite error as what it means to the user."""
    text = str(error)
    if "disk is full" in text or "disk I/O" in text:
        return OSError(f"{folder} cannot be written ({text})")
    return BulkError(f"{folder}/journal.sqlite cannot be used ({text}). Begin anew with --restart")
