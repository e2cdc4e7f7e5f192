"""FASTA as people have it: plain or gzip, wrapped lines, CRLF, lower case, a trailing `*`; or one sequence a line."""

from __future__ import annotations

import codecs
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
MAX_LETTERS = 1_000_000
# Of these, a trailing `*` taken off leaves more than are allowed.
_TOO_MANY = MAX_LETTERS + 2
_MASK = re.compile("<mask>", re.IGNORECASE)
_OTHER_FILES = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"PK\x03\x04", "a zip archive"),
)
# ASCII only: str.upper would make SS of the letter ß.
_UPPER = str.maketrans(ascii_lowercase, ascii_uppercase)


class Record(NamedTuple):
    """One sequence with its name: `id` is the header's first word, `description` the whole header."""

    id: str
    description: str
    sequence: str


def read_fasta(source: str | Path | io.BufferedReader, *, tolerant: bool = False) -> Iterator[Record]:
    """Records of a file, or of an open binary stream, one at a time.

    Lower case is raised (`<mask>` is kept), blanks in sequence lines and one trailing `*` a record are dropped.
    Letters are not checked here: the model's error names item and position.

    Parameters
    ----------
    source : str, path or binary stream
    tolerant : bool
        For bulk work, where one odd record must not stop a million others: a record without a sequence is returned
        as it is, one of more than `MAX_LETTERS` cut to a little more than that, a file without records is no error,
        and bytes that are not UTF-8 are read as Latin-1.

    Raises
    ------
    InvalidSequence
        Text before the first header, a record without a sequence or with more than a million letters, no record at
        all, text that is not UTF-8, or a gzip stream that is damaged.
    OSError
        The file cannot be read.
    """
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            yield from _read_stream(file, str(source), tolerant)
    else:
        yield from _read_stream(source, getattr(source, "name", "input"), tolerant)


def _read_stream(stream: io.BufferedReader, name: str, tolerant: bool) -> Iterator[Record]:
    head = stream.peek(64)
    zipped = head.startswith(_GZIP_MAGIC)
    if tolerant and not zipped:
        # Read as Latin-1, any file is text.
        kind = next((kind for magic, kind in _OTHER_FILES if head.startswith(magic)), None)
        if kind or b"\0" in head:
            raise InvalidSequence(f"{name}: not a text file" + (f" ({kind}; only gzip is read)" if kind else ""))
    binary = gzip.GzipFile(fileobj=stream) if zipped else stream
    errors = _AS_LATIN_1 if tolerant else "strict"
    found = tolerant
    try:
        for record in parse_fasta(
            _lines(io.TextIOWrapper(binary, encoding="utf-8-sig", errors=errors), name, tolerant), tolerant=tolerant
        ):
            found = True
            yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidSequence(f"{name}: the gzip data is damaged or cut short ({error})") from error
    except UnicodeDecodeError as error:
        raise InvalidSequence(f"{name}: not a text file (byte {error.start} is not UTF-8)") from error
    if not found:
        raise InvalidSequence(f"{name}: no sequences in it")


def _lines(text: io.TextIOWrapper, name: str, tolerant: bool) -> Iterator[str]:
    """Lines of text, none of them without end: a small gzip file may hold a line of gigabytes."""
    number = 0
    while line := text.readline(MAX_LETTERS + 1):
        number += 1
        if len(line) > MAX_LETTERS:
            if not tolerant or line.startswith(">"):
                raise InvalidSequence(f"{name}: line {number} is longer than {MAX_LETTERS} characters")
            letters = "".join(line.split())
            while not line.endswith("\n") and (line := text.readline(MAX_LETTERS)):
                if len(letters) <= _TOO_MANY:
                    letters += "".join(line.split())
            line = letters[:_TOO_MANY]
        yield line


def parse_fasta(lines: Iterable[str], *, tolerant: bool = False) -> Iterator[Record]:
    """Records from lines of text; without any `>` header each non-empty line is a sequence. See `read_fasta`."""
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
                yield _record(header, parts, tolerant)
            header, parts, letters = line[1:].strip(), [], 0
        elif header is None:
            bare += 1
            sequence = clean_sequence(line)
            if not sequence:
                raise InvalidSequence(f"line {number} has no letters")
            yield Record(str(bare), "", sequence)
        elif letters < _TOO_MANY:
            letters += len(line)
            parts.append(line)
            if letters > MAX_LETTERS:
                if not tolerant:
                    raise InvalidSequence(f"record {header[:80]!r} is longer than {MAX_LETTERS} letters")
                parts = ["".join("".join(parts).split())[:_TOO_MANY]]
                letters = len(parts[0])
    if header is not None:
        yield _record(header, parts, tolerant)


def _record(header: str, parts: list[str], tolerant: bool) -> Record:
    sequence = clean_sequence("".join(parts))
    if not sequence and not tolerant:
        raise InvalidSequence(f"record {header[:80]!r} has no sequence")
    return Record(header.split()[0] if header else "", header, sequence)


def clean_sequence(text: str) -> str:
    """Upper case (`<mask>` kept), without blanks and without one trailing `*`."""
    residues = "".join(text.split()).removesuffix("*")
    return "<mask>".join(part.translate(_UPPER) for part in _MASK.split(residues))


def _latin_1(error: UnicodeError) -> tuple[str, int]:
    """Decoding error handler: what is not UTF-8 is Latin-1, as older databases wrote names of species."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


_AS_LATIN_1 = "numpyesm-latin-1"
codecs.register_error(_AS_LATIN_1, _latin_1)
