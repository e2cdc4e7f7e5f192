"""One record's outputs as bytes, and back: the arrays one behind the other, in a fixed order and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import AMINO_ACIDS
from ..config import ModelConfig
from ..errors import BulkError
from ..options import BY_LAYER
from ..results import EncodeResult
from .settings import Settings

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Field:
    """One output: `mean_12`, `per_token_6`, `contacts`."""

    name: str
    kind: str
    layer: int | None = None


@dataclass(frozen=True)
class Layout:
    """Which arrays a record has, and their shapes.

    Attributes
    ----------
    fields : tuple of Field
    dtype : dtype
    config : ModelConfig
    """

    fields: tuple[Field, ...]
    dtype: np.dtype[Any]
    config: ModelConfig

    @classmethod
    def of(cls, settings: Settings, config: ModelConfig) -> Layout:
        """The outputs that the settings ask for."""
        fields = tuple(
            Field(f"{kind}_{layer}" if kind in BY_LAYER else kind, kind, layer)
            for kind in settings.include
            for layer in (settings.layers if kind in BY_LAYER else (None,))
        )
        return cls(fields, np.dtype({"fp32": "<f4", "fp16": "<f2"}[settings.dtype]), config)

    def shape(self, field: Field, residues: int) -> tuple[int, ...]:
        """Shape of an output of a sequence of so many residues."""
        return {
            "mean": (self.config.embed_dim,),
            "bos": (self.config.embed_dim,),
            "per_token": (residues, self.config.embed_dim),
            "contacts": (residues, residues),
            "logits": (residues, len(AMINO_ACIDS)),
            "attentions": (self.config.num_layers, residues),
        }[field.kind]

    def num_bytes(self, residues: int) -> int:
        """Bytes of one record."""
        return sum(int(np.prod(self.shape(field, residues))) for field in self.fields) * self.dtype.itemsize

    def pack(self, result: EncodeResult) -> bytes:
        """The arrays of a result as bytes.

        Raises
        ------
        BulkError
            If a number does not fit into float16.
        """
        arrays = result.to_arrays()
        return b"".join(self._stored(field, arrays[field.name]) for field in self.fields)

    def _stored(self, field: Field, array: Array) -> bytes:
        with np.errstate(over="ignore"):
            stored = array.astype(self.dtype)
        if self.dtype.itemsize < 4 and np.isinf(stored).any() and not np.isinf(array).any():
            raise BulkError(f"{field.name} has {float(np.abs(array).max()):g}, beyond float16: use dtype fp32")
        return stored.tobytes()

    def unpack(self, data: bytes, residues: int) -> Iterator[tuple[Field, Array]]:
        """Each output with its array, a view of `data`."""
        start = 0
        for field in self.fields:
            shape = self.shape(field, residues)
            count = int(np.prod(shape))
            yield field, np.frombuffer(data, self.dtype, count, start).reshape(shape)
            start += count * self.dtype.itemsize
