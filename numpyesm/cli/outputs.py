"""Where results go and in which format. What an output's name does not allow is refused before anything is computed."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import formats
from ..errors import InvalidOption
from ..extras import require
from ..files import WriteError, atomic_write, is_stream

_COMPRESSIONS = (".gz", ".bz2", ".xz")
DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Destination:
    """Where one result goes, and in which of the command's own formats."""

    form: str
    path: str | None  # None is standard output
    compression: str = ""  # .gz, .bz2, .xz or empty

    def write(self, data: bytes | str | Iterable[bytes]) -> None:
        """Write all of `data`, to a file whole or not at all."""
        if isinstance(data, str):
            data = data.encode("utf-8", "replace")
        pieces = [data] if isinstance(data, bytes) else data
        if self.path is None:
            sys.stdout.flush()
            sys.stdout.buffer.writelines(pieces)
            sys.stdout.buffer.flush()
            return
        with atomic_write(self.path) as file, _compressed(file, self.compression) as target:
            target.writelines(pieces)


def destination(
    arguments: argparse.Namespace, endings: Mapping[str, str], *, terminal: str, otherwise: str
) -> Destination:
    """Return where `-o` sends the results of a command, and in which format.

    `endings` maps each ending that the command can write to its format, such as `{".csv": "csv"}`; `terminal` and
    `otherwise` are the formats for standard output. InvalidOption: an unknown ending, or one that `--format`
    contradicts. WriteError: the output cannot be written.
    """
    chosen, output = getattr(arguments, "format", None), arguments.output
    if output in (None, "-"):
        return Destination(chosen or (terminal if sys.stdout.isatty() else otherwise), None)
    if is_stream(output):  # its name has no ending that could tell the format
        return Destination(chosen or otherwise, output)
    can = f"this command writes {', '.join(endings)}, each also followed by {', '.join(_COMPRESSIONS)}"
    if not output or names_folder(output):
        raise InvalidOption(f"-o {output!r} is not a file name; {can}")
    name = os.path.basename(output).lower()
    compression = next((ending for ending in _COMPRESSIONS if name.endswith(ending)), "")
    ending = os.path.splitext(name.removesuffix(compression))[1]
    form = endings.get(ending)
    if form is None and not (chosen and not ending):
        what = f"ends in {ending}" if ending else "has no ending that names a format"
        raise InvalidOption(f"-o {output} {what}; {can}")
    if chosen and form and chosen != form:
        raise InvalidOption(f"-o {output} and --format {chosen} contradict each other")
    check_writable(output)
    return Destination(form or str(chosen), output, compression)


def names_folder(output: str) -> bool:
    """Whether `-o` names a folder, which need not exist if the name ends in a slash."""
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def check_writable(output: str | Path) -> None:
    """Raise WriteError now if this file could not be written later. Missing folders are created later, too."""
    path = Path(output).absolute()
    if path.is_dir():
        raise WriteError(None, "it is a folder", str(output))
    folder = next((parent for parent in path.parents if parent.exists()), path.parent)
    if not folder.is_dir():
        raise WriteError(None, f"{folder} is not a folder", str(output))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise WriteError(None, f"no permission to write in {folder}", str(output))


def write(data: bytes | str | Iterable[bytes], output: str | Path) -> None:
    """Write all of `data` to a file, whole or not at all."""
    Destination("", str(output)).write(data)


def result_pieces(form: str, results: Sequence[formats.Result], ids: Sequence[str]) -> Iterator[bytes]:
    """Write results as `npz`, or as `json` with a line end."""
    return formats.npz_results(results, ids) if form == "npz" else chain(formats.json_results(results, ids), [b"\n"])


def csv_pieces(header: Sequence[str], rows: Iterable[Sequence[object]], form: str) -> Iterator[bytes]:
    """Write a table with a header as `csv` or `tsv`, one row at a time; NaN is an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=DELIMITERS[form], lineterminator="\n")
    for row in chain([header], rows):
        writer.writerow(["" if isinstance(cell, float) and cell != cell else cell for cell in row])
        yield buffer.getvalue().encode("utf-8", "backslashreplace")
        buffer.seek(0)
        buffer.truncate()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table for reading, with padded columns."""
    cells = [list(map(str, header)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | np.floating) else str(value)


def _compressed(file: BinaryIO, compression: str) -> Any:
    """Return a file object that compresses into `file` and leaves it open."""
    if compression == ".gz":
        return gzip.GzipFile("", "wb", fileobj=file, mtime=0)
    if compression:
        return import_module({".bz2": "bz2", ".xz": "lzma"}[compression]).open(file, "wb")
    return nullcontext(file)


def figure_class() -> Any:
    """Return matplotlib's `Figure`, or raise MissingExtra. No pyplot, as nothing here needs a screen."""
    return require("matplotlib.figure", "a picture", "plot").Figure


def png_bytes(figure: Any) -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
