"""FASTA into records that can be embedded and records that cannot, one at a time."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from ..alphabet import check_letters
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..fasta import Record, scan_fasta
from .settings import Settings

# A map of 16,384 by 16,384 is a gigabyte in float32; it is held three times while windows are averaged.
MOST_RESIDUES_OF_CONTACTS = 16384


class Item(NamedTuple):
    """A record of the input.

    Attributes
    ----------
    position : int
        Its place in the whole input, from 1.
    id : str
        The header's first word; `sequence_<position>` if there is none.
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


class Reader:
    """All records of the inputs, in order.

    Parameters
    ----------
    inputs : sequence of str or path
        FASTA files, plain or gzip, or `-` for standard input.
    settings : Settings
        What makes a record unfit, and which share of the records is wanted.
    """

    def __init__(self, inputs: Sequence[str | os.PathLike[str]], settings: Settings) -> None:
        if not inputs:
            raise InvalidOption("no input: name at least one FASTA file")
        if [os.fspath(name) for name in inputs].count("-") > 1:
            raise InvalidOption("standard input (-) can be read once only")
        self._inputs = inputs
        self._settings = settings
        self._fingerprint = hashlib.blake2b(digest_size=16)
        self.records = 0

    def __iter__(self) -> Iterator[Item]:
        for name in self._inputs:
            for record, problem in scan_fasta(_source(name), first=self.records + 1):
                self.records += 1
                sequence = record.sequence.encode()
                digest = hashlib.sha256(sequence).digest()
                self._fingerprint.update(record.description.encode() + b"\n" + digest)
                if self._settings.shard.takes(digest):
                    reason = why_not(record, self._settings) if problem is None else problem
                    yield Item(self.records, record.id, record.description, record.sequence, digest, reason)
        if not self.records:
            raise InvalidSequence(f"{', '.join(os.fspath(name) for name in self._inputs)}: no sequences in it")

    def fingerprint(self) -> str:
        """Tells this input from others, headers and sequences counted, once all records have been taken."""
        return f"{self.records}:{self._fingerprint.hexdigest()}"


def why_not(record: Record, settings: Settings) -> str | None:
    """Why a record cannot be embedded; None if it can."""
    try:
        check_letters(record.sequence)
    except InvalidSequence as error:
        return error.reason
    length = len(record.sequence)
    if length > MAX_RESIDUES and settings.long == "error":
        return (
            f"{length} residues, at most {MAX_RESIDUES} fit the model "
            "(--long windows averages overlapping windows, --long truncate takes the beginning)"
        )
    if settings.long == "windows" and "contacts" in settings.include and length > MOST_RESIDUES_OF_CONTACTS:
        return f"{length} residues, contact maps end at {MOST_RESIDUES_OF_CONTACTS}"
    return "no sequence" if not length else None


def _source(name: str | os.PathLike[str]) -> str | Path | io.BufferedReader:
    if os.fspath(name) == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    path = Path(name)
    if path.is_dir():
        raise InvalidSequence(f"{path} is a folder, expected a FASTA file")
    return path
