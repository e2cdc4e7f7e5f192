"""Results to stdout or a file: the service's JSON, npz, or a short table for people."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..weights.atomic import replacing


def chosen_format(arguments: argparse.Namespace, by_ending: Mapping[str, str], terminal: str, otherwise: str) -> str:
    """`--format`, else what the output's ending says, else by whether stdout is a terminal."""
    if arguments.format:
        return str(arguments.format)
    if arguments.output:
        return by_ending.get(Path(arguments.output).suffix.lower(), otherwise)
    return terminal if sys.stdout.isatty() else otherwise


def write(data: bytes, output: str | Path | None) -> None:
    """All of `data` to stdout, or to a file that appears only when complete."""
    if output is None or str(output) == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    with replacing(Path(output)) as file:
        file.write(data)


def json_bytes(document: Any) -> bytes:
    """Compact JSON and a line end."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


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
