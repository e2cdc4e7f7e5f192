"""Where the numbers go in the end: Parquet, HDF5, or a folder with one file per record."""

from __future__ import annotations

from pathlib import Path

from ...errors import InvalidOption
from .base import Writer

ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
# Files of embeddings in HDF5 hold one row per residue by custom; a table holds vectors.
DEFAULT_INCLUDE = {"parquet": ("mean", "bos"), "hdf5": ("mean", "per_token"), "folder": ("mean",)}


def written_formats() -> str:
    """What an output can be, for messages."""
    return ".parquet, .h5 or a folder (ending in /)"


def output_format(output: str) -> str:
    """Format of an output, by its ending: `.parquet`, `.h5`, or `/` and no ending for a folder.

    Raises
    ------
    InvalidOption
        For another ending, for an empty name (an unset variable in a script), and for `-`, as none of the formats can
        be written to a pipe.
    """
    path = Path(output)
    if output and output != "-":
        if output.endswith(("/", "\\")) or path.is_dir():
            return "folder"
        if path.suffix.lower() in ENDINGS:
            return ENDINGS[path.suffix.lower()]
        if path.suffix == "" and not (path.exists() and not path.is_file()):
            return "folder"
    raise InvalidOption(f"output {output!r}: expected {written_formats()}")


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
