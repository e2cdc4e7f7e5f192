"""Read FASTA files into records that can be embedded and records that cannot, one at a time."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from ..alphabet import SequenceNotes
from ..errors import InvalidOption, InvalidSequence
from ..fasta import scan_fasta
from .layout import Layout

# The most that one row of the journal holds: SQLite has a limit.
MOST_BYTES = 10**9 - 1000


class Item(NamedTuple):
    """A record of the input.

    Attributes
    ----------
    position : int
        Its place in the whole input, from 1.
    id : str
        From the header, see `Settings.record_id`; `sequence_<position>` if there is none.
    description : str
        The whole header.
    sequence : str
        In upper case, without blanks and a trailing `*`.
    digest : bytes
        SHA-256 of the sequence.
    reason : str or None
        Why it cannot be embedded.
    """

    position: int
    id: str
    description: str
    sequence: str
    digest: bytes
    reason: str | None

    def as_rejected(self) -> Rejected:
        """The record as the list of rejected records has it."""
        return Rejected(self.position, self.id, self.description, len(self.sequence), self.reason or "")


class Rejected(NamedTuple):
    """A record that cannot be embedded."""

    position: int
    id: str
    description: str
    length: int
    reason: str


class Reader:
    """All records of the inputs, in order.

    Parameters
    ----------
    inputs : sequence of str or path
        FASTA files, plain or gzip, or `-` for standard input.
    layout : Layout
        What is to be computed, for which records.
    """

    def __init__(self, inputs: Sequence[str | os.PathLike[str]], layout: Layout) -> None:
        if not inputs:
            raise InvalidOption("no input: name at least one FASTA file")
        if [os.fspath(name) for name in inputs].count("-") > 1:
            raise InvalidOption("standard input (-) can be read once only")
        self._inputs = inputs
        self._layout, self._settings = layout, layout.settings
        self._fingerprint = hashlib.blake2b(digest_size=16)
        self.records = 0
        self.notes = SequenceNotes()

    def __iter__(self) -> Iterator[Item]:
        for name in self._inputs:
            for record, problem in scan_fasta(_source(name), first=self.records + 1):
                self.records += 1
                digest = hashlib.sha256(record.sequence.encode()).digest()
                self._fingerprint.update(record.description.encode() + b"\n" + digest)
                if self._settings.shard.takes(digest):
                    reason = problem or self._reason(record.sequence)
                    id = self._settings.record_id(record.id)
                    if reason is None:
                        self.notes.look(record.sequence, id)
                    yield Item(self.records, id, record.description, record.sequence, digest, reason)
        if not self.records:
            raise InvalidSequence(f"{', '.join(os.fspath(name) for name in self._inputs)}: no sequences in it")

    def _reason(self, sequence: str) -> str | None:
        """Return why a record cannot be embedded, or None."""
        try:
            self._settings.long.check(sequence, self._settings.outputs)
        except InvalidSequence as error:
            return error.reason
        size = self._layout.num_bytes(len(sequence))
        return f"its outputs take {size / 1e9:.2f} GB, a record can have 1 GB" if size > MOST_BYTES else None

    def fingerprint(self) -> str:
        """Identify the input by its headers and sequences, once all records have been read."""
        return f"{self.records}:{self._fingerprint.hexdigest()}"


def _source(name: str | os.PathLike[str]) -> str | Path | io.BufferedReader:
    if os.fspath(name) == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    path = Path(name)
    if path.is_dir():
        raise InvalidSequence(f"{path} is a folder, expected a FASTA file")
    return path
