"""Where the numbers go in the end: Parquet, HDF5, or a folder with one file per record.

Each module has `write(rows, settings, about, path)`, which writes everything to `path`, which nobody reads yet, and
syncs it; and `metadata(path)`, which returns `about` of a finished output, and raises if it is not one.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InvalidOption
from ...extras import require
from ..journal import Row
from ..settings import Settings

METADATA_KEY = "numpyesm"
ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
_LIBRARIES = {"parquet": ("pyarrow.parquet", "Parquet"), "hdf5": ("h5py", "HDF5")}
# By convention, HDF5 files of embeddings hold one row per residue; tables hold vectors.
DEFAULT_INCLUDE = {"parquet": ("mean", "bos"), "hdf5": ("mean", "per_token"), "folder": ("mean",)}
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


def output_format(output: str) -> str:
    """Format of an output, by its ending: `.parquet`, `.h5`, or `/` and no ending for a folder.

    Raises
    ------
    InvalidOption
        For another ending, for an empty name (an unset variable in a script), for `-`, as none of the formats can be
        written to a pipe, and for a file where a folder is named.
    """
    path, slash = Path(output), output.endswith(("/", "\\"))
    if output and output != "-":
        if path.is_dir() or ((slash or not path.suffix) and not path.exists()):
            return "folder"
        if not slash and path.suffix.lower() in ENDINGS:
            return ENDINGS[path.suffix.lower()]
    raise InvalidOption(f"output {output!r}: expected .parquet, .h5 or a folder (ending in /)")


def writer_of(form: str) -> Any:
    """The module that writes a format; MissingExtra if its library is not installed."""
    if form in _LIBRARIES:
        require(*_LIBRARIES[form], "bulk")
    return import_module(f".{form}", __name__)


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

    def is_free(number: int) -> bool:
        return not taken(f"{name}{mark}{number}")

    most = 2
    while not is_free(most):
        most *= 2
    return f"{name}{mark}{bisect_left(range(most), True, lo=most // 2 + 1, key=is_free)}"
