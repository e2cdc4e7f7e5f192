"""One table with one row per record, in the order of the input; docs/scaling.md names the columns.

What depends on the length is a flat list with its shape beside it: `numpy.reshape(value, shape)` is the array.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from ..journal import Row
from ..settings import Settings
from . import COLUMNS, METADATA_KEY, described

# A row group: small enough that writing adds little to the memory of the model, large enough to scan quickly.
_GROUP_BYTES = 8 << 20
_GROUP_ROWS = 2048


def write(rows: Iterator[Row], settings: Settings, about: dict[str, Any], path: Path) -> None:
    """Write all records."""
    schema = _schema(settings).with_metadata({METADATA_KEY: json.dumps(about)})
    with open(path, "wb") as file:
        with pa.parquet.ParquetWriter(
            file,
            schema,
            # Embeddings do not shrink: only what is text is compressed.
            compression={name: "zstd" for name, kind in COLUMNS.items() if kind == "string"},
            use_dictionary=False,
            write_statistics=[name for name in COLUMNS if name != "description"],
        ) as writer:
            group: list[Row] = []
            size = 0
            for row in rows:
                group.append(row)
                size += len(row.data)
                if size >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
                    writer.write_batch(_batch(group, settings, schema))
                    group, size = [], 0
            if group:
                writer.write_batch(_batch(group, settings, schema))
        file.flush()
        os.fsync(file.fileno())


def metadata(path: Path) -> Any:
    """Return the metadata of a finished table."""
    found: dict[bytes, bytes] = pa.parquet.read_schema(path).metadata or {}
    return json.loads(found[METADATA_KEY.encode()])


def _schema(settings: Settings) -> Any:
    number = pa.from_numpy_dtype(settings.stored_dtype)
    columns: list[tuple[str, Any]] = list(COLUMNS.items())
    for field in settings.fields:
        shape = settings.shape(field, 1)
        if len(shape) == 1:
            columns.append((field.name, pa.list_(number, shape[0])))
        else:
            columns += [(field.name, pa.list_(number)), (f"{field.name}_shape", pa.list_(pa.int32(), 2))]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _batch(group: list[Row], settings: Settings, schema: Any) -> Any:
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in group:
        for name, value in described(row, settings).items():
            columns[name].append(value)
        for field, array in settings.unpack(row.data, row.length):
            columns[field.name].append(array.reshape(-1))
            if array.ndim > 1:
                columns[f"{field.name}_shape"].append(array.shape)
    return pa.RecordBatch.from_pydict(columns, schema=schema)
