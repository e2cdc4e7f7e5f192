"""A folder with one `.npz` file per record, and an index.

`OUT/P12345.npz` holds `mean_12`, `per_token_12`, … for `numpy.load`, and `id`, `description`, `length`. `index.tsv`
says which record is in which file: ids are made safe for file names, and of records whose names would be the same on
any file system (also one that takes `a` for `A`) the second becomes `P12345~2.npz`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ...files import safe_stem
from ..journal import Row
from ..settings import Settings
from . import COLUMNS, METADATA_KEY, described, free_name, tsv_line

ABOUT = "numpyesm.json"
INDEX = "index.tsv"


def write(rows: Iterator[Row], settings: Settings, about: dict[str, Any], path: Path) -> None:
    """Write all records."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()
    names = path / ".names.sqlite"
    with (
        closing(sqlite3.connect(names, isolation_level=None)) as taken,
        open(path / INDEX, "w", encoding="utf-8") as index,
    ):
        _execute(taken, "PRAGMA journal_mode=OFF")
        _execute(taken, "PRAGMA synchronous=OFF")
        _execute(taken, "CREATE TABLE names (name PRIMARY KEY) WITHOUT ROWID")
        index.write(tsv_line(*("file" if name == "description" else name for name in COLUMNS)))
        for row in rows:
            name = _take_name(taken, safe_stem(row.id)) + ".npz"
            arrays = {field.name: array for field, array in settings.unpack(row.data, row.length)}
            texts = {"id": np.array(row.id), "description": np.array(row.description)}
            with open(path / name, "wb") as file:
                np.savez(file, **texts, length=np.int64(row.length), **arrays)  # type: ignore[arg-type]
            index.write(tsv_line(*(described(row, settings) | {"description": name}).values()))
    names.unlink()
    (path / ABOUT).write_text(json.dumps({METADATA_KEY: about}, indent=1) + "\n")
    if hasattr(os, "sync"):
        os.sync()  # once, not a wait for every file


def metadata(path: Path) -> Any:
    """Return the metadata of a finished folder."""
    return json.loads((path / ABOUT).read_text())[METADATA_KEY]


def is_ours(entry: Path) -> bool:
    """Whether something in an output folder is what this writer makes."""
    return entry.is_file() and (entry.suffix == ".npz" or entry.name in (ABOUT, INDEX))


def _take_name(names: sqlite3.Connection, name: str) -> str:
    """A name that no other record has, upper and lower case being the same."""
    query = "SELECT 1 FROM names WHERE name = ?"
    free = free_name(lambda one: _execute(names, query, one.lower()) is not None, name, "~")
    _execute(names, "INSERT INTO names VALUES (?)", free.lower())
    return free


def _execute(names: sqlite3.Connection, query: str, *values: str) -> Any:
    """Return the first row, if any; an OSError as of any file in the output, because it is not the journal's."""
    try:
        return names.execute(query, values).fetchone()
    except sqlite3.Error as error:
        raise OSError(errno.ENOSPC, str(error)) from error
