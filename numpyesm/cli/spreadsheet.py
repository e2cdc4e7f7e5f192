"""Excel workbooks and Parquet files as rows of text, through pandas."""

from __future__ import annotations

import csv
import io
import warnings
import zipfile
from collections.abc import Collection, Sequence
from typing import Any

from ..errors import InputWarning, MissingExtra


def is_spreadsheet(data: bytes) -> bool:
    """Whether a file is an Excel workbook (.xlsx, .xlsm) or Parquet, by its contents."""
    if data.startswith(b"PAR1"):
        return True
    if not data.startswith(b"PK\x03\x04"):
        return False
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except zipfile.BadZipFile:
        return False
    return "[Content_Types].xml" in names and any(name.startswith("xl/") for name in names)


def as_csv(data: bytes, name: str, wanted: Collection[str]) -> bytes:
    """Return the table as CSV; of a workbook, the first sheet that has one of the `wanted` columns, else the first.

    `wanted` is in lower case. InputWarning says which of several sheets is read. MissingExtra: pandas, or a library
    that it needs for this format, is not installed. ValueError: the file is damaged.
    """
    parquet = data.startswith(b"PAR1")
    try:
        import pandas

        if parquet:
            sheets = {"": _rows_of_parquet(pandas.read_parquet(io.BytesIO(data)))}
        else:
            frames = pandas.read_excel(io.BytesIO(data), sheet_name=None, header=None, dtype=object, na_filter=False)
            sheets = {str(title): frame.to_numpy(object).tolist() for title, frame in frames.items()}
    except ImportError as error:
        raise MissingExtra(
            f"{name}: Excel and Parquet files need more packages ({error}): pip install 'numpyesm[tables]', "
            "or save the table as CSV"
        ) from error
    except Exception as error:  # each library has its own errors for damaged files
        raise ValueError(f"{name}: the {'Parquet' if parquet else 'Excel'} file cannot be read ({error})") from error
    written = {title: [row for row in map(_texts, rows) if any(row)] for title, rows in sheets.items()}
    chosen = next((title for title, rows in written.items() if _has_column(rows, wanted)), next(iter(written)))
    if len(written) > 1:
        warnings.warn(f"{name}: reading sheet {chosen!r} of {len(written)}", InputWarning, stacklevel=2)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(written[chosen])
    return buffer.getvalue().encode()


def _rows_of_parquet(frame: Any) -> list[list[object]]:
    if frame.index.names != [None]:
        frame = frame.reset_index()
    return [list(frame.columns), *frame.astype(object).where(frame.notna(), "").to_numpy(object).tolist()]


def _texts(row: Sequence[object]) -> list[str]:
    return ["" if value is None else str(value) for value in row]


def _has_column(rows: Sequence[Sequence[str]], wanted: Collection[str]) -> bool:
    return bool(rows) and any(name.strip().casefold() in wanted for name in rows[0])
