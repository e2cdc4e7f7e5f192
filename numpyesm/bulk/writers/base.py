"""What all formats say about a record, and names and lines that every format can hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..journal import Row
from ..settings import Settings

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


def described(row: Row, settings: Settings) -> dict[str, Any]:
    """Return the values of `COLUMNS` for a record."""
    residues = settings.long.residues(row.length)
    return dict(zip(COLUMNS, (*row[:4], residues, row.digest.hex()), strict=True))


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
