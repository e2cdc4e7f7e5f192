"""Where the numbers go in the end: Parquet, HDF5, or a folder with one file per record.

Each module has `write(rows, settings, about, path)`, which writes everything to `path`, which nobody reads yet, and
syncs it; and `metadata(path)`, which returns `about` of a finished output, and raises if it is not one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InvalidOption
from ...extras import require

ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
_LIBRARIES = {"parquet": ("pyarrow.parquet", "Parquet"), "hdf5": ("h5py", "HDF5")}
# By convention, HDF5 files of embeddings hold one row per residue; tables hold vectors.
DEFAULT_INCLUDE = {"parquet": ("mean", "bos"), "hdf5": ("mean", "per_token"), "folder": ("mean",)}


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
