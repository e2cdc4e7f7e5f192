"""Where the numbers go in the end: Parquet, HDF5, or a folder with a file a record."""

from __future__ import annotations

from pathlib import Path

from ...errors import InvalidOption
from .base import Writer

FORMATS = ("parquet", "hdf5", "folder")
ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
# Per residue is what HDF5 files of embeddings hold; a table holds vectors.
DEFAULT_INCLUDE = {"parquet": ("mean", "bos"), "hdf5": ("mean", "per_token"), "folder": ("mean",)}


def output_format(output: str) -> str:
    """Format of an output, by its ending: `.parquet`, `.h5`, or `/` and no ending for a folder."""
    path = Path(output)
    if output and (output.endswith(("/", "\\")) or path.is_dir()):
        return "folder"
    if path.suffix.lower() in ENDINGS:
        return ENDINGS[path.suffix.lower()]
    if (
        output and path.suffix == ""
    ):  # an empty name is a variable of a script that was not set, not the folder it is in
        return "folder"
    raise InvalidOption(f"output {output!r}: expected .parquet, .h5 or a folder (ending in /)")


def make_writer(form: str) -> Writer:
    """The writer of a format; MissingExtra if its library is not installed."""
    if form == "parquet":
        from .parquet import ParquetWriter

        return ParquetWriter()
    if form == "hdf5":
        from .hdf5 import Hdf5Writer

        return Hdf5Writer()
    from .folder import FolderWriter

    return FolderWriter()
