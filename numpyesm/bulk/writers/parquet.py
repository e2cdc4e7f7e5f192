"""One table with one row per record, in the order of the input."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import MissingExtra
from ...results import Field
from ..journal import Row
from ..layout import Layout
from .base import COLUMNS, METADATA_KEY, Writer, described, missing_bulk

# A row group: small enough that writing adds little to the memory of the model, large enough to scan quickly.
_GROUP_BYTES = 8 << 20
_GROUP_ROWS = 2048


class ParquetWriter(Writer):
    """Columns `record`, `id`, `description`, `length`, `residues`, `sequence_hash`, and one for each output.

    `mean_12` and `bos_12` are fixed-size lists. What depends on the length is a flat list with its shape beside it:
    `per_token_12` and `per_token_12_shape`, so that `numpy.reshape(value, shape)` is the array.
    """

    def __init__(self) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise MissingExtra(missing_bulk("Parquet", "pyarrow")) from error
        self._pa: Any = pyarrow

    def write(self, rows: Iterator[Row], layout: Layout, about: dict[str, Any], path: Path) -> None:
        pa = self._pa
        schema = self._schema(layout).with_metadata({METADATA_KEY: json.dumps(about)})
        strings = [name for name, kind in COLUMNS.items() if kind == "string"]
        with open(path, "wb") as file:
            with pa.parquet.ParquetWriter(
                file,
                schema,
                # Embeddings do not shrink: only what is text is compressed.
                compression={name: "zstd" if name in strings else "none" for name in self._leaves(schema)},
                use_dictionary=False,
                write_statistics=[name for name in COLUMNS if name != "description"],
                store_schema=True,
            ) as writer:
                group: list[Row] = []
                size = 0
                for row in rows:
                    group.append(row)
                    size += len(row.data)
                    if size >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
                        writer.write_batch(self._batch(group, layout, schema))
                        group, size = [], 0
                if group:
                    writer.write_batch(self._batch(group, layout, schema))
            file.flush()
            os.fsync(file.fileno())

    def metadata(self, path: Path) -> str | bytes:
        found: dict[bytes, bytes] = self._pa.parquet.read_schema(path).metadata or {}
        return found[METADATA_KEY.encode()]

    def _schema(self, layout: Layout) -> Any:
        pa = self._pa
        number = pa.float16() if layout.dtype.itemsize == 2 else pa.float32()
        columns: list[tuple[str, Any]] = list(COLUMNS.items())
        for field in layout.fields:
            shape = layout.shape(field, 1)
            if len(shape) == 1:
                columns.append((field.name, pa.list_(number, shape[0])))
            else:
                columns += [(field.name, pa.list_(number)), (f"{field.name}_shape", pa.list_(pa.int32(), 2))]
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])

    def _leaves(self, schema: Any) -> list[str]:
        """Paths of the columns as Parquet names them."""
        return [field.name if field.name in COLUMNS else f"{field.name}.list.element" for field in schema]

    def _batch(self, group: list[Row], layout: Layout, schema: Any) -> Any:
        pa = self._pa
        said = [described(row, layout) for row in group]
        columns = [pa.array([one[name] for one in said], kind) for name, kind in COLUMNS.items()]
        lengths = [row.length for row in group]
        arrays: dict[str, list[Any]] = {field.name: [] for field in layout.fields}
        for row in group:
            for field, array in layout.unpack(row.data, row.length):
                arrays[field.name].append(array.reshape(-1))
        for field in layout.fields:
            columns += self._columns(field, arrays[field.name], lengths, layout)
        return pa.record_batch(columns, schema=schema)

    def _columns(self, field: Field, arrays: list[Any], lengths: list[int], layout: Layout) -> list[Any]:
        pa = self._pa
        values = pa.array(np.concatenate(arrays))
        shapes = [layout.shape(field, length) for length in lengths]
        if len(shapes[0]) == 1:
            return [pa.FixedSizeListArray.from_arrays(values, shapes[0][0])]
        offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
        flat = pa.array(np.array(shapes, np.int32).reshape(-1))
        return [pa.ListArray.from_arrays(offsets, values), pa.FixedSizeListArray.from_arrays(flat, 2)]
