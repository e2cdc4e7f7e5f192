"""Read FASTA files into records that can be embedded and records that cannot, one at a time."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..alphabet import SequenceNotes
from ..errors import InvalidOption, InvalidSequence
from ..fasta import record_name, scan_fasta
from .settings import Settings

# The most that one row of the journal holds: SQLite has a limit.
MOST_BYTES = 10**9 - 1000


class Item(NamedTuple):
    """A record of the input."""

    position: int  # its place in the whole input, from 1
    id: str  # from the header, see `fasta.record_name`; `sequence_<position>` if there is none
    description: str  # the whole header
    length: int  # letters of the sequence
    digest: bytes | None  # SHA-256 of the sequence; None if it cannot be embedded
    reason: str | None  # why it cannot be embedded
    sequence: str = ""  # in upper case, without blanks and a trailing `*`; empty if the item comes from a journal


class Reader:
    """All records of FASTA files, plain or gzip, or `-` for standard input, in order; `report` is told their number."""

    def __init__(
        self, inputs: Sequence[str | os.PathLike[str]], settings: Settings, report: Callable[[int], None]
    ) -> None:
        if not inputs:
            raise InvalidOption("no input: name at least one FASTA file")
        if [os.fspath(name) for name in inputs].count("-") > 1:
            raise InvalidOption("standard input (-) can be read only once")
        self._inputs, self._settings, self._report = inputs, settings, report
        self._fingerprint = hashlib.blake2b(digest_size=16)
        self.records = 0
        self.notes = SequenceNotes()

    def __iter__(self) -> Iterator[Item]:
        for name in self._inputs:
            source = sys.stdin.buffer if os.fspath(name) == "-" else Path(name)
            for (first_word, description, sequence), problem in scan_fasta(source, first=self.records + 1):
                self.records += 1
                if self.records % 256 == 0:
                    self._report(self.records)
                digest = hashlib.sha256(sequence.encode()).digest()
                self._fingerprint.update(description.encode() + b"\n" + digest)
                if self._settings.shard.takes(digest):
                    reason = problem or self._reason(sequence)
                    id = record_name(first_word, self._settings.ids)
                    if reason is None:
                        self.notes.look(sequence, id)
                    known = None if reason else digest
                    yield Item(self.records, id, description, len(sequence), known, reason, sequence)
        if not self.records:
            names = ("standard input" if os.fspath(name) == "-" else os.fspath(name) for name in self._inputs)
            raise InvalidSequence(f"{', '.join(names)}: no sequences in it")

    def _reason(self, sequence: str) -> str | None:
        """Return why a record cannot be embedded, or None."""
        try:
            self._settings.long.check(sequence, self._settings.outputs)
        except InvalidSequence as error:
            return error.reason
        size = self._settings.num_bytes(len(sequence))
        return f"its outputs take {size / 1e9:.2f} GB, a record may have at most 1 GB" if size > MOST_BYTES else None

    def fingerprint(self) -> str:
        """Identify the input by its headers and sequences, once all records have been read."""
        return f"{self.records}:{self._fingerprint.hexdigest()}"
