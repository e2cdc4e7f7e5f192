"""What a writer of a format provides, and names and lines that every format can hold."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..journal import Row
from ..layout import Layout

METADATA_KEY = "numpyesm"
# What every format says about a record beside its numbers: Parquet's columns, HDF5's attributes, columns of the index.
COLUMNS = {
    "record": "int64",
    "id": "string",
    "description": "string",
    "length": "int32",
    "residues": "int32",
    "sequence_hash": "string",
}
_BREAKS = re.compile(r"[\t\r\n\v\f\x1c-\x1e\x85\u2028\u2029\0]")


class Writer(ABC):
    """Writes all records to a new file or folder."""

    @abstractmethod
    def write(self, rows: Iterator[Row], layout: Layout, about: dict[str, Any], path: Path) -> None:
        """Write everything to `path`, which nobody reads yet, and sync it."""

    @abstractmethod
    def metadata(self, path: Path) -> str | bytes:
        """Return the metadata of a finished output as JSON; an error if there are none."""

    def read_about(self, path: Path) -> dict[str, Any] | None:
        """Return the metadata of a finished output; None if it was not made by numpyesm."""
        try:
            about = json.loads(self.metadata(path))
        except (OSError, KeyError, ValueError, TypeError):
            return None
        return about if isinstance(about, dict) else None


def described(row: Row, layout: Layout) -> dict[str, Any]:
    """Return the values of `COLUMNS` for a record."""
    residues = layout.settings.long.residues(row.length)
    return dict(zip(COLUMNS, (*row[:4], residues, row.digest.hex()), strict=True))


def missing_bulk(what: str, library: str) -> str:
    """Message of a missing library."""
    return f"{what} needs {library}: pip install 'numpyesm[bulk]'"


def tsv_line(*cells: object) -> str:
    """One line of a table; what would break it within a cell becomes a blank."""
    return "\t".join(_BREAKS.sub(" ", str(cell)) for cell in cells) + "\n"


def free_name(taken: Callable[[str], bool], name: str, mark: str) -> str:
    """The name, or `name#2`, `name#3` … (with `mark` for `#`) if it is taken.

    Searched by doubling and halving: of a million records with one id, each would otherwise try all names before its
    own.
    """
    if not taken(name):
        return name
    number = 2
    while taken(f"{name}{mark}{number}"):
        number *= 2
    low = number // 2
    while number - low > 1:
        middle = (low + number) // 2
        low, number = (middle, number) if taken(f"{name}{mark}{middle}") else (low, middle)
    return f"{name}{mark}{number}"
