"""What a run has read and computed, in one SQLite file in `OUT.partial/`: the same command resumes from here.

No records are kept in memory, however long the input. A result counts once its transaction is committed; a crash loses
what was not. Any engine may resume. What is read back is compared with the checksum beside it: letters with the SHA-256
of their sequence, numbers with a CRC-32, records with the input.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..errors import BulkError
from ..files import WriteError, sync_folder
from ..streaming.batches import Pending
from ..streaming.packing import pack
from .reader import Item

FILE = "journal.sqlite"
_SCHEMA = """
BEGIN;
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sequences (
    number INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, letters TEXT NOT NULL, copies INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS records (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL, description TEXT NOT NULL, length INTEGER NOT NULL,
    number INTEGER, reason TEXT
);
CREATE TABLE IF NOT EXISTS done (number INTEGER PRIMARY KEY, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS numbers (number INTEGER PRIMARY KEY, data BLOB NOT NULL);
COMMIT;
"""


class Row(NamedTuple):
    """A record with its numbers."""

    position: int
    id: str
    description: str
    length: int
    digest: bytes
    data: bytes


class Totals(NamedTuple):
    """How much there is, or how much of it is done."""

    records: int
    sequences: int
    residues: int


class Journal:
    """The state of one run in `folder`, which the caller has locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE
        # We hold the folder's lock; SQLite's own locks are unreliable on network file systems. The thread that writes
        # the output reads from here while the main thread waits for it.
        name = quote(str(self.path.absolute()))
        self._db = sqlite3.connect(f"file:{name}?nolock=1", uri=True, check_same_thread=False)
        try:
            # Larger pages carry long rows faster; still larger ones slow down the index of digests.
            for setting in ("page_size=16384", "synchronous=FULL", "cache_size=-16000", "temp_store=FILE"):
                self._db.execute(f"PRAGMA {setting}")
            self._db.executescript(_SCHEMA)
            notes = dict(self._db.execute("SELECT key, value FROM about"))
        except sqlite3.DatabaseError:
            self._db.close()
            raise
        # What describes the run and identifies its input; empty and None until the whole input has been read.
        self.about: dict[str, Any] = json.loads(notes.get("about", "{}"))
        self.fingerprint: str | None = notes.get("input")

    def totals(self, *, done: bool = False) -> Totals:
        """What was read, or the part of it that is done: records, distinct sequences among them, residues of these."""
        join = "JOIN done USING (number)" if done else ""
        query = f"SELECT total(copies), count(*), total(length(letters)) FROM sequences {join}"
        return Totals(*map(int, self._db.execute(query).fetchone()))

    # -- reading ------------------------------------------------------------------------------------------------

    def add_record(self, item: Item) -> None:
        """Add a record, and its sequence if it is new and can be embedded. It counts once `finish_reading` returns."""
        if item.digest is not None:
            known = "ON CONFLICT (digest) DO UPDATE SET copies = copies + 1"
            self._db.execute(f"INSERT INTO sequences VALUES (NULL, ?, ?, 1) {known}", (item.digest, item.sequence))
        number = "(SELECT number FROM sequences WHERE digest = ?)"
        self._db.execute(f"INSERT INTO records VALUES (?, ?, ?, ?, {number}, ?)", item[:6])

    def finish_reading(self, about: dict[str, Any], fingerprint: str) -> None:
        """Commit what was read."""
        notes = (("about", json.dumps(about)), ("input", fingerprint))
        self._db.executemany("INSERT INTO about VALUES (?, ?)", notes)
        self.commit()
        sync_folder(self.folder)
        self.about, self.fingerprint = about, fingerprint

    def records(self, *, rejected: bool = False) -> Iterator[Item]:
        """Yield all records, or those that cannot be embedded, in input order and without their sequences."""
        query = f"""
            SELECT position, id, description, length, digest, reason FROM records LEFT JOIN sequences USING (number)
            {"WHERE reason NOT NULL" if rejected else ""} ORDER BY position
        """
        return starmap(Item, self._db.execute(query))

    # -- computing ----------------------------------------------------------------------------------------------

    def batches(self, budget: int) -> Iterator[list[Pending]]:
        """Yield batches of at most `budget` tokens that lack a result. Results may be added meanwhile.

        They are cut from all sequences, so that a resumed run computes each among the same others as the first would
        have: NumPy's rounding may depend on that.
        """
        for batch in pack(self._sequences(), lambda item: len(item.sequence), budget):
            if not all(item.done for item in batch):
                yield batch

    def _sequences(self) -> Iterator[Pending]:
        query = """
            SELECT number, digest, letters, done.number NOT NULL
            FROM sequences LEFT JOIN done USING (number) ORDER BY number
        """
        for number, digest, letters, done in self._db.execute(query):
            if hashlib.sha256(letters.encode()).digest() != digest:
                raise self._damaged(f"the letters of sequence {number}")
            yield Pending(number, letters, bool(done))

    def add_result(self, number: int, data: bytes) -> Totals:
        """Add the numbers of one sequence, and return what it stands for. They count once `commit` has returned."""
        query = "SELECT digest, copies, 1, length(letters) FROM sequences WHERE number = ?"
        digest, *totals = self._db.execute(query, (number,)).fetchone()
        self._db.execute("INSERT INTO done VALUES (?, ?)", (number, _crc(digest, data)))
        self._db.execute("INSERT INTO numbers VALUES (?, ?)", (number, data))
        return Totals(*totals)

    def commit(self) -> None:
        """Make what was added survive a crash."""
        self._db.commit()

    def rollback(self) -> None:
        """Forget what was added since the last commit."""
        self._db.rollback()

    # -- writing ------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """Records with their numbers, in input order."""
        # CROSS keeps SQLite from another order of the tables, in which it would have to sort.
        query = """
            SELECT position, id, description, records.length, digest, data, crc
            FROM records CROSS JOIN sequences USING (number) CROSS JOIN done USING (number)
            CROSS JOIN numbers USING (number) ORDER BY position
        """
        for *values, crc in self._db.execute(query):
            row = Row(*values)
            if _crc(row.digest, row.data) != crc:
                raise self._damaged(f"the numbers of {row.id!r}")
            yield row

    def _damaged(self, what: str) -> BulkError:
        return BulkError(f"{self.path} is damaged: {what} do not have their checksum. Start over with --restart")

    def close(self) -> None:
        """Close the file; what was not committed is lost."""
        self._db.close()


def _crc(digest: bytes, data: bytes) -> int:
    """Checksum of the numbers of one sequence, which no other sequence's numbers have."""
    return zlib.crc32(data, zlib.crc32(digest))


def readable_error(error: sqlite3.Error, folder: Path) -> Exception:
    """Say what an SQLite error means to the user."""
    text = str(error)
    if "disk is full" in text or "disk I/O" in text:
        return WriteError(errno.ENOSPC, text, str(folder / FILE))
    return BulkError(f"{folder / FILE} cannot be used ({text}). Start over with --restart")
