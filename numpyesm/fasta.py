"""FASTA as people have it: plain or gzip, wrapped lines, CRLF, lower case, a trailing `*`; or one sequence a line."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import NamedTuple

from .errors import InvalidSequence

_GZIP_MAGIC = b"\x1f\x8b"
# Of a line or a record. The longest protein known has 46,000 residues; a chromosome or a gzip bomb is no input here.
_MAX_LETTERS = 1_000_000
_MASK = re.compile("<mask>", re.IGNORECASE)
# ASCII only: str.upper would make SS of the letter ß.
_UPPER = str.maketrans(ascii_lowercase, ascii_uppercase)


class Record(NamedTuple):
    """One sequence with its name: `id` is the header's first word, `description` the whole header."""

    id: str
    description: str
    sequence: str


def read_fasta(source: str | Path | io.BufferedReader) -> Iterator[Record]:
    """Records of a file, or of an open binary stream, one at a time.

    Lower case is raised (`<mask>` is kept), blanks in sequence lines and one trailing `*` a record are dropped.
    Letters are not checked here: the model's error names item and position.

    Raises
    ------
    InvalidSequence
        Text before the first header, a record without a sequence, no record at all, text that is not UTF-8, or a
        gzip stream that is damaged.
    OSError
        The file cannot be read.
    """
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            yield from _read_stream(file, str(source))
    else:
        yield from _read_stream(source, getattr(source, "name", "input"))


def _read_stream(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    binary = gzip.GzipFile(fileobj=stream) if stream.peek(2)[:2] == _GZIP_MAGIC else stream
    found = False
    try:
        for record in parse_fasta(_lines(io.TextIOWrapper(binary, encoding="utf-8-sig"), name)):
            found = True
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidSequence(f"{name}: the gzip data is damaged or cut short ({error})") from error
    except UnicodeDecodeError as error:
        raise InvalidSequence(f"{name}: not a text file (byte {error.start} is not UTF-8)") from error
    if not found:
        raise InvalidSequence(f"{name}: no sequences in it")


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Lines of text, none of them without end: a small gzip file may hold a line of gigabytes."""
    number = 0
    while line := text.readline(_MAX_LETTERS + 1):
        number += 1
        if len(line) > _MAX_LETTERS:
            raise InvalidSequence(f"{name}: line {number} is longer than {_MAX_LETTERS} characters")
        yield line


def parse_fasta(lines: Iterable[str]) -> Iterator[Record]:
    """Records from lines of text; without any `>` header each non-empty line is a sequence."""
    header: str | None = None
    parts: list[str] = []
    bare = letters = 0
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if not line or line.startswith(";"):
            continue
        if line.startswith(">"):
            if bare:
                raise InvalidSequence(f"line {number}: a FASTA header after {bare} lines that belong to no record")
            if header is not None:
                yield _record(header, parts)
            header, parts, letters = line[1:].strip(), [], 0
        elif header is None:
            bare += 1
            sequence = clean_sequence(line)
            if not sequence:
                raise InvalidSequence(f"line {number} has no letters")
            yield Record(str(bare), "", sequence)
        else:
            letters += len(line)
            if letters > _MAX_LETTERS:
                raise InvalidSequence(f"record {header[:80]!r} is longer than {_MAX_LETTERS} letters")
            parts.append(line)
    if header is not None:
        yield _record(header, parts)


def _record(header: str, parts: list[str]) -> Record:
    sequence = clean_sequence("".join(parts))
    if not sequence:
        raise InvalidSequence(f"record {header[:80]!r} has no sequence")
    return Record(header.split()[0] if header else "", header, sequence)


def clean_sequence(text: str) -> str:
    """Upper case (`<mask>` kept), without blanks and without one trailing `*`."""
    residues = "".join(text.split()).removesuffix("*")
    return "<mask>".join(part.translate(_UPPER) for part in _MASK.split(residues))
