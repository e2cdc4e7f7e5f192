"""Results to stdout or a file: the service's JSON, npz, or a short table for people."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import formats
from ..files import atomic_write


def chosen_format(arguments: argparse.Namespace, by_ending: Mapping[str, str], terminal: str, otherwise: str) -> str:
    """`--format`, else what the output's ending says, else by whether stdout is a terminal."""
    if arguments.format:
        return str(arguments.format)
    if arguments.output:
        return by_ending.get(Path(arguments.output).suffix.lower(), otherwise)
    return terminal if sys.stdout.isatty() else otherwise


def write(data: bytes | Iterable[bytes], output: str | Path | None) -> None:
    """All of `data` to stdout, or to a file that appears only when complete."""
    pieces = [data] if isinstance(data, bytes) else data
    if output is None or str(output) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.writelines(pieces)
        sys.stdout.buffer.flush()
        return
    with atomic_write(output) as file:
        file.writelines(pieces)


def json_pieces(document: Any) -> Iterator[bytes]:
    """Write JSON and a line end, piece by piece; arrays may stand in it for lists of numbers."""
    yield from formats.json_pieces(document)
    yield b"\n"


def write_npz(arrays: Mapping[str, npt.NDArray[Any]], output: str | Path | None) -> None:
    """Write an `.npz` file for `numpy.load`, without a second copy in memory."""
    write(formats.npz_pieces(arrays), output)


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an `.npz` file for `numpy.load`."""
    return b"".join(formats.npz_pieces(arrays))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns padded with blanks, numbers to the right."""
    cells = [list(map(str, header)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | np.floating) else str(value)
