"""The outputs of one record as bytes, and back: arrays one behind the other, in a fixed order and dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ModelConfig
from ..errors import BulkError
from ..results import EncodeResult, Field, count_numbers, fields
from .settings import Settings

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Which arrays a record has, and their shapes.

    Attributes
    ----------
    settings : Settings
    config : ModelConfig
    """

    settings: Settings
    config: ModelConfig

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers."""
        return np.dtype({"fp32": "<f4", "fp16": "<f2"}[self.settings.dtype])

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The arrays of a record, in the order in which they are stored."""
        return tuple(fields(self.settings.outputs))

    def shape(self, field: Field, length: int) -> tuple[int, ...]:
        """Shape of an array of a record of `length` residues."""
        return field.shape(self.config, self.settings.long.residues(length))

    def num_bytes(self, length: int) -> int:
        """Bytes of one record."""
        residues = self.settings.long.residues(length)
        return count_numbers(self.settings.outputs, self.config, residues) * self.dtype.itemsize

    def pack(self, result: EncodeResult) -> bytes:
        """The arrays of a result as bytes; BulkError if a number does not fit into float16."""
        arrays = result.to_arrays()
        return b"".join(self._stored(field, arrays[field.name]) for field in self.fields)

    def _stored(self, field: Field, array: Array) -> bytes:
        with np.errstate(over="ignore"):
            stored = array.astype(self.dtype)
        if self.dtype.itemsize < 4 and np.isinf(stored).any() and not np.isinf(array).any():
            raise BulkError(f"{field.name} has {float(np.abs(array).max()):g}, beyond float16: use dtype fp32")
        return stored.tobytes()

    def unpack(self, data: bytes, length: int) -> Iterator[tuple[Field, Array]]:
        """Each output with its array, a view of `data`."""
        start = 0
        for field in self.fields:
            shape = self.shape(field, length)
            count = math.prod(shape)
            yield field, np.frombuffer(data, self.dtype, count, start).reshape(shape)
            start += count * self.dtype.itemsize
