"""Results to stdout or a file: the service's JSON, npz, or a short table for people."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
    """Compact JSON and a line end, piece by piece: as text, a contact map has six times its size in memory.

    Arrays may stand in it, and are written as the lists that they would be.
    """
    yield from _json_value(document)
    yield b"\n"


def _json_value(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray) and value.ndim < 2:
        yield json.dumps(value.tolist(), separators=(",", ":")).encode()
    elif isinstance(value, dict):
        opening = b"{"
        for key, inner in value.items():
            yield opening + json.dumps(key).encode() + b":"
            yield from _json_value(inner)
            opening = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, np.ndarray) or (
        isinstance(value, list) and any(isinstance(inner, dict | np.ndarray) for inner in value)
    ):
        opening = b"["
        for inner in value:
            yield opening
            yield from _json_value(inner)
            opening = b","
        yield b"]" if len(value) else b"[]"
    else:
        yield json.dumps(value, separators=(",", ":")).encode()


def write_npz(arrays: Mapping[str, npt.NDArray[Any]], output: str | Path | None) -> None:
    """An `.npz` file, for `numpy.load`; into a file directly, never a second copy in memory."""
    if output is None or str(output) == "-" or (Path(output).exists() and not Path(output).is_file()):
        write(npz_bytes(arrays), output)
        return
    with atomic_write(output) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An `.npz` file, for `numpy.load`."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns padded with blanks, numbers to the right."""
    cells = [list(map(str, header)), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in cells
    )


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float | np.floating) else str(value)
