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
        for record in parse_fasta(io.TextIOWrapper(binary, encoding="utf-8-sig")):
            found = True
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidSequence(f"{name}: the gzip data is damaged or cut short ({error})") from error
    except UnicodeDecodeError as error:
        raise InvalidSequence(f"{name}: not a text file (byte {error.start} is not UTF-8)") from error
    if not found:
        raise InvalidSequence(f"{name}: no sequences in it")


def parse_fasta(lines: Iterable[str]) -> Iterator[Record]:
    """Records from lines of text; without any `>` header each non-empty line is a sequence."""
    header: str | None = None
    parts: list[str] = []
    bare = 0
    for number, raw in enumerate(lines, start=1):
        line = raw.strip()
        if not line or line.startswith(";"):
            continue
        if line.startswith(">"):
            if bare:
                raise InvalidSequence(f"line {number}: a FASTA header after {bare} lines that belong to no record")
            if header is not None:
                yield _record(header, parts)
            header, parts = line[1:].strip(), []
        elif header is None:
            bare += 1
            yield Record(str(bare), "", clean_sequence(line))
        else:
            parts.append(line)
    if header is not None:
        yield _record(header, parts)


def _record(header: str, parts: list[str]) -> Record:
    sequence = clean_sequence("".join(parts))
    if not sequence:
        raise InvalidSequence(f"record {header!r} has no sequence")
    return Record(header.split()[0] if header else "", header, sequence)


def clean_sequence(text: str) -> str:
    """Upper case (`<mask>` kept), without blanks and without one trailing `*`."""
    residues = "".join(text.split()).removesuffix("*")
    return "<mask>".join(part.translate(_UPPER) for part in _MASK.split(residues))
