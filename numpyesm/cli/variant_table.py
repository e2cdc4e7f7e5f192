"""Tables of variants in common formats: a column is added, every other byte is kept."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputWarning, MissingExtra, NumpyesmError, warn
from ..text_input import encoding_of, unpacked

_DELIMITERS = (",", "\t", ";")
# A byte order mark, and a first line that tells Excel the delimiter.
_HEAD = re.compile(r"\ufeff?(?:\s*\"?sep=([^\r\n\"])\"?[,;\t]*(?:\r\n|\r|\n))?", re.IGNORECASE)
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "#n/a"})
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
# csv's own limit is 131,072 characters per field. This is the largest that works on every system.
_LONGEST_FIELD = 2**31 - 1


class InvalidTable(NumpyesmError, ValueError):
    """A table that cannot be read; the message names the file and the line."""


class Row(NamedTuple):
    """One record: the line where it begins, its fields, and its text with the line end."""

    line: int
    fields: list[str]
    text: str


@dataclass(frozen=True)
class VariantTable:
    """A table with a header."""

    name: str  # for messages
    delimiter: str
    records: list[Row]  # all that is in the file, in its order: header and rows, and the rest, which has no fields
    columns: list[str]  # the names as written, without surrounding blanks
    rows: list[Row]  # those below the header
    encoding: str

    def column(self, name: str, option: str) -> list[str] | None:
        """Return the fields of a column, or None if there is none; case matters only if it tells names apart.

        `option` chooses another column; errors name it.
        """
        places = [i for i, found in enumerate(self.columns) if found == name]
        if not places:
            places = [i for i, found in enumerate(self.columns) if found.casefold() == name.casefold()]
        if len(places) > 1:
            raise InvalidTable(f"{self.name}: {len(places)} columns are called {name!r}; {option} NAME chooses another")
        return [row.fields[places[0]] for row in self.rows] if places else None

    def require(self, name: str, option: str) -> list[str]:
        """Return the fields of a column, or raise InvalidTable, which lists the existing columns."""
        found = self.column(name, option)
        if found is None:
            raise InvalidTable(
                f"{self.name} has no column {name!r}; its columns are {', '.join(map(repr, self.columns))}: "
                f"choose with {option} NAME"
            )
        return found

    def numbers(self, name: str, option: str) -> list[float | None]:
        """Return a column as numbers: NaN for a missing value, None for what is not a number."""
        return [_number(field, comma=self.delimiter == ";") for field in self.require(name, option)]

    def with_column(self, name: str, values: Sequence[str], delimiter: str | None) -> bytes:
        """Return the table with one more column at the end.

        The rest stays as it is, byte for byte, unless another delimiter is asked for. Asking for a comma does not
        change a table with semicolons, as both are CSV.
        """
        same = delimiter in (None, self.delimiter) or (delimiter == "," and self.delimiter == ";")
        remaining = iter([name, *values])
        if not same:
            rows = ([*record.fields, next(remaining)] for record in self.records if record.fields)
            return _csv(rows, str(delimiter)).encode()  # UTF-8, whatever the table was in
        parts = []
        for record in self.records:
            text = record.text
            if record.fields:
                body = text.rstrip("\r\n")
                value = next(remaining)
                quoted = _csv([[value]], self.delimiter, end="") if value else ""
                text = f"{body}{self.delimiter}{quoted}{text[len(body) :]}"
            parts.append(text)
        text = "".join(parts)
        try:
            return text.encode(self.encoding)
        except UnicodeEncodeError:  # for the new column's name
            return text.encode()


def _number(field: str, comma: bool) -> float | None:
    """Read a number, perhaps with a decimal comma, as spreadsheets write it where fields end in semicolons."""
    field = field.strip()
    if comma and _DECIMAL_COMMA.fullmatch(field):
        field = field.replace(",", ".")
    try:
        return math.nan if field.lower() in _MISSING else float(field)
    except ValueError:
        return None


def _csv(rows: Iterable[Sequence[str]], delimiter: str = ",", end: str = "\n") -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerows(rows)
    return buffer.getvalue()


def read_table(source: str, wanted: Collection[str]) -> VariantTable:
    """Read a table from a file, or from standard input (`-`); see `parse_table`."""
    if source == "-":
        return parse_table(sys.stdin.buffer.read(), "standard input", wanted)
    if os.path.isdir(source):
        raise InvalidTable(f"{source} is a folder, expected a table")
    try:
        return parse_table(Path(source).read_bytes(), source, wanted)
    except FileNotFoundError as error:
        raise InvalidTable(f"there is no file {source[:200]!r}, expected a table") from error


def parse_table(data: bytes, name: str, wanted: Collection[str]) -> VariantTable:
    """Read a table.

    CSV or TSV, compressed or not, in UTF-8, UTF-16 or Windows' cp1252, with comment lines (`#`) and Excel's `sep=;`
    line; or an Excel workbook or a Parquet file, which become CSV. The delimiter is Excel's, or the one that makes one
    of the `wanted` columns appear in the header. InvalidTable names the line; UnreadableFile: not text, or damaged;
    MissingExtra: pandas, or a library that it needs for this format, is not installed.
    """
    wanted = {column.casefold() for column in wanted}
    text, encoding = _text_of(data, name, wanted)
    head = _HEAD.match(text)
    assert head is not None  # it may be empty
    text = text[head.end() :]
    if not text.strip():
        raise InvalidTable(f"{name} is empty: expected a header line and rows")
    delimiter = head[1] or _delimiter(text, wanted)
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        records = [Row(1, [], head[0]), *_records(text, delimiter, name, wanted, first=2 if head[1] else 1)]
    finally:
        csv.field_size_limit(limit)
    filled = [record for record in records if record.fields]
    if not filled:
        raise InvalidTable(f"{name} holds comments only: expected a header line and rows")
    header, *rows = filled
    for row in rows:
        if len(row.fields) != len(header.fields):
            raise InvalidTable(
                f"{name}, line {row.line}: {len(row.fields)} fields, but the header has {len(header.fields)} columns"
            )
    return VariantTable(name, delimiter, records, [column.strip() for column in header.fields], rows, encoding)


def _text_of(data: bytes, name: str, wanted: Collection[str]) -> tuple[str, str]:
    """Return the text with its byte order mark, and the encoding that gives back the same bytes."""
    if _is_spreadsheet(data):
        return _as_csv(data, name, wanted), "utf-8"
    data = unpacked(io.BytesIO(data), name).read()
    encoding = encoding_of(data[:512], name)
    if encoding in ("utf-16", "utf-32"):  # decoding by these names would drop the byte order mark
        encoding += "-le" if data[:1] == b"\xff" else "-be"
    # Windows writes cp1252, in which five bytes mean nothing; Latin-1 has them all.
    for choice in ("utf-8", "cp1252", "latin-1") if encoding.startswith("utf-8") else (encoding,):
        try:
            return data.decode(choice), choice
        except UnicodeDecodeError:
            continue
    raise InvalidTable(f"{name}: the {encoding.upper()} text is damaged or cut short")


def _delimiter(text: str, wanted: Collection[str]) -> str:
    lines = (line for line in io.StringIO(text, newline=None) if line.strip() and not line.startswith("#"))
    first, fields = next(lines, ""), {}
    for delimiter in _DELIMITERS:
        fields[delimiter] = [field.strip() for field in next(csv.reader([first], delimiter=delimiter), [])]
        if any(field.casefold() in wanted for field in fields[delimiter]):
            return delimiter
    return max(_DELIMITERS, key=lambda delimiter: len(fields[delimiter]))


def _records(text: str, delimiter: str, name: str, wanted: Collection[str], first: int) -> Iterator[Row]:
    """Yield records with their text: the reader is fed line by line, and the lines it took belong to the record."""
    taken: list[str] = []
    header: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            # The reader gets a blank line for a comment.
            yield "\n" if len(taken) == 1 and _is_comment(line, delimiter, header, wanted) else line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    line = first
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidTable(f"{name}, line {line}: {error}") from error
        blank = len(fields) <= 1 and not "".join(fields).strip()
        header = header or ([] if blank else fields)
        yield Row(line, [] if blank else fields, "".join(taken))
        line += len(taken)
        taken.clear()


def _is_comment(line: str, delimiter: str, header: Sequence[str], wanted: Collection[str]) -> bool:
    """Whether a line that begins a record is a comment: below the header, `#1` may be a row's id."""
    if not line.startswith("#"):
        return False
    if not header or header[0].strip().casefold() in wanted:
        return True
    return len(next(csv.reader([line], delimiter=delimiter))) != len(header)


def _is_spreadsheet(data: bytes) -> bool:
    """Whether a file is Parquet or an Excel workbook (.xlsx, .xlsm): a zip archive, whose names are not compressed."""
    workbook = data.startswith(b"PK\x03\x04") and b"[Content_Types].xml" in data and b"xl/" in data
    return workbook or data.startswith(b"PAR1")


def _as_csv(data: bytes, name: str, wanted: Collection[str]) -> str:
    """Return the table as CSV; of a workbook, the first sheet that has one of the `wanted` columns, else the first."""
    parquet = data.startswith(b"PAR1")
    try:
        import pandas

        sheets: dict[str, str] = {}
        if parquet:
            frame = pandas.read_parquet(io.BytesIO(data))
            sheets[""] = frame.to_csv(index=frame.index.names != [None], lineterminator="\n")
        else:
            options: dict[str, Any] = {"header": None, "dtype": object, "na_filter": False}
            for title, frame in pandas.read_excel(io.BytesIO(data), sheet_name=None, **options).items():
                filled = frame[(frame != "").any(axis=1)]
                sheets[str(title)] = filled.to_csv(index=False, header=False, lineterminator="\n")
    except ImportError as error:
        raise MissingExtra(
            f"{name}: Excel and Parquet files need more packages ({error}): pip install 'numpyesm[tables]', "
            "or save the table as CSV"
        ) from error
    except Exception as error:  # each library has its own errors for damaged files
        raise InvalidTable(f"{name}: the {'Parquet' if parquet else 'Excel'} file cannot be read ({error})") from error
    chosen = next((title for title, text in sheets.items() if _has_column(text, wanted)), next(iter(sheets)))
    if len(sheets) > 1:
        warn(f"{name}: reading sheet {chosen!r} of {len(sheets)}", InputWarning)
    return sheets[chosen]


def _has_column(text: str, wanted: Collection[str]) -> bool:
    return any(name.strip().casefold() in wanted for name in next(csv.reader(io.StringIO(text)), []))
