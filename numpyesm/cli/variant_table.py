"""Tables of variants, CSV or TSV, that get one more column while every byte of the others stays as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import NumpyesmError

_BOM = "\ufeff"
_DELIMITERS = (",", "\t", ";")


class InvalidTable(NumpyesmError, ValueError):
    """A table that cannot be read; the message names the file and the line."""


class Row(NamedTuple):
    """One record: the line on which it begins, its fields, its text with the line end."""

    line: int
    fields: list[str]
    text: str


@dataclass(frozen=True)
class VariantTable:
    """A table with a header.

    Attributes
    ----------
    name : str
        For messages.
    delimiter : str
    header : Row
    rows : list of Row
    records : list of Row
        Header, rows and blank lines in the order of the file; blank ones have no fields.
    """

    name: str
    delimiter: str
    header: Row
    rows: list[Row]
    records: list[Row]

    @property
    def columns(self) -> list[str]:
        """Names as they stand, without blanks around them."""
        return [name.strip() for name in self.header.fields]

    def column(self, name: str) -> list[str] | None:
        """The fields of a column, or None if there is none of that name."""
        count = self.columns.count(name)
        if count > 1:
            raise InvalidTable(f"{self.name}: {count} columns are called {name!r}")
        if count == 0:
            return None
        index = self.columns.index(name)
        return [row.fields[index] for row in self.rows]

    def require(self, name: str) -> list[str]:
        """The fields of a column, or InvalidTable that lists the columns there are."""
        found = self.column(name)
        if found is None:
            raise InvalidTable(
                f"{self.name} has no column {name!r}; its columns are {', '.join(map(repr, self.columns))}"
            )
        return found

    def with_column(self, name: str, values: Sequence[str], delimiter: str | None = None) -> bytes:
        """Return the table with one more column behind the others.

        The text before it is what it was, byte for byte, unless another delimiter is asked for: a comma turns no
        table with semicolons into another one, as both are CSV.
        """
        same = delimiter in (None, self.delimiter) or (delimiter == "," and self.delimiter == ";")
        if not same:
            texts = iter([name, *values])
            buffer = io.StringIO()
            writer = csv.writer(buffer, delimiter=str(delimiter), lineterminator="\n")
            writer.writerows([*record.fields, next(texts)] for record in self.records if record.fields)
            return buffer.getvalue().encode()
        remaining = iter([name, *values])
        parts = []
        for record in self.records:
            text = record.text
            if record.fields:
                body = text.rstrip("\r\n")
                text = f"{body}{self.delimiter}{self._quoted(next(remaining))}{text[len(body) :]}"
            parts.append(text)
        return "".join(parts).encode()

    def _quoted(self, value: str) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=self.delimiter, lineterminator="").writerow([value])
        return buffer.getvalue() if value else ""


def read_table(data: bytes, name: str, wanted: Sequence[str]) -> VariantTable:
    """Read a table; the delimiter is the one that makes one of the `wanted` columns appear in the header.

    Raises
    ------
    InvalidTable
        Not UTF-8, no header, a quote that is not closed, a row of another length than the header.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidTable(f"{name}, line {line}: not UTF-8 text (byte {error.start})") from error
    bom = text.startswith(_BOM)
    text = text.removeprefix(_BOM)
    if not text.strip():
        raise InvalidTable(f"{name} is empty: expected a header line and rows")
    delimiter = _delimiter(text, wanted)
    records = list(_records(text, delimiter, name))
    if bom:  # it goes out again in front of the header
        records[0] = records[0]._replace(text=_BOM + records[0].text)
    header, *rows = (record for record in records if record.fields)
    for row in rows:
        if len(row.fields) != len(header.fields):
            raise InvalidTable(
                f"{name}, line {row.line}: {len(row.fields)} fields, but the header has {len(header.fields)} columns"
            )
    return VariantTable(name, delimiter, header, rows, records)


def _delimiter(text: str, wanted: Sequence[str]) -> str:
    first = text.lstrip().partition("\n")[0].partition("\r")[0]
    fields = {}
    for delimiter in _DELIMITERS:
        fields[delimiter] = [field.strip() for field in next(csv.reader([first], delimiter=delimiter), [])]
        if any(name in fields[delimiter] for name in wanted):
            return delimiter
    return max(_DELIMITERS, key=lambda delimiter: len(fields[delimiter]))


def _records(text: str, delimiter: str, name: str) -> Iterator[Row]:
    """Records with their own text: the reader is fed line by line, and what it took is what belongs to the record."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidTable(f"{name}, line {line}: {error}") from error
        blank = len(fields) <= 1 and not "".join(fields).strip()
        yield Row(line, [] if blank else fields, "".join(taken))
        line += len(taken)
        taken.clear()
