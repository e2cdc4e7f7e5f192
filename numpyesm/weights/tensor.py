"""A tensor as a file stores it: float32, or float16, bfloat16, float64 or int8, to be widened on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import release_pages

# safetensors' dtype names. NumPy has no bfloat16: its bits are held as uint16.
STORAGE_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F64": np.dtype("<f8"),
}
# Others are found beside weights (position_ids), and carried along so that a reader can ignore them by name.
ALL_DTYPES: dict[str, np.dtype] = STORAGE_DTYPES | {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
FLOAT_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
PRECISION_DTYPES = FLOAT_DTYPES | {"int8": "I8"}

# Rows of an int8 matrix that share a scale in each column. It divides the widths of all published models.
GROUP = 40


@dataclass(frozen=True, eq=False)  # one tensor is another only if it is the same object
class StoredTensor:
    """Stored numbers and their meaning.

    Attributes
    ----------
    raw : ndarray
        The stored numbers; bfloat16 as uint16 bit patterns. May be a read-only view of a mapped file.
    dtype : str
        `F32`, `F16`, `BF16`, `F64`, or `I8` with a scale.
    scale : ndarray (groups, N) float32, optional
        Of an int8 matrix (K, N): the step size of `GROUP` neighbouring rows of each column (output channel).
    """

    raw: npt.NDArray[Any]
    dtype: str = "F32"
    scale: npt.NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.raw.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers, without their scale."""
        return math.prod(self.shape) * ALL_DTYPES[self.dtype].itemsize

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """Where the numbers are: in memory, or in mapped files."""
        return [self.raw]

    def release(self) -> None:
        """Drop what was read of a mapped file from memory, until it is used again."""
        release_pages(self.arrays)

    def astype(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[np.floating]:
        """Return the numbers as `dtype`, without a copy if they are stored that way."""
        values = widen_bfloat16(self.raw) if self.dtype == "BF16" else self.raw
        if self.scale is not None:
            values = values * row_scales(self.scale, len(values))
        return values.astype(dtype, copy=False)

    def stored_as(self, dtype: str) -> StoredTensor:
        """The same numbers, rounded to nearest even, in another storage dtype.

        OverflowError if a finite number becomes infinite (float16 ends at 65504).
        """
        if dtype == self.dtype:
            return self
        values = self.astype(np.float32)
        if dtype == "I8":
            scale = group_scales(values)
            return StoredTensor(nearest_levels(values, row_scales(scale, len(values))), dtype, scale)
        if dtype == "BF16":
            return StoredTensor(round_to_bfloat16(values), dtype)
        with np.errstate(over="ignore"):
            narrow = values.astype(STORAGE_DTYPES[dtype])
        if not np.isfinite(narrow).all() and np.isfinite(values).all():
            raise OverflowError(f"a value of {float(np.abs(values).max()):g} is beyond the range of {dtype}")
        return StoredTensor(narrow, dtype)


class DeferredTensor(StoredTensor):
    """A tensor whose numbers are computed each time they are asked for, so that they need not all be in memory.

    `build` computes the stored numbers, of this shape and dtype, from `sources`.
    """

    _shape: tuple[int, ...]
    _build: Callable[[], npt.NDArray[Any]]
    _sources: tuple[StoredTensor, ...]

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: str,
        build: Callable[[], npt.NDArray[Any]],
        sources: Sequence[StoredTensor] = (),
    ) -> None:
        for name, value in {"dtype": dtype, "_shape": shape, "_build": build, "_sources": tuple(sources)}.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def raw(self) -> npt.NDArray[Any]:
        built = self._build()
        self.release()  # or what it is made from would stand in memory beside it
        return built

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        return [array for source in self._sources for array in source.arrays]


def bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of an array's numbers, row by row; a view where they are contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Convert bfloat16 bit patterns to float32, exactly: bfloat16 is the upper half of float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# Numbers rounded at a time, so that they stay in cache: five times as fast as whole matrices.
_ROUNDED_AT_ONCE = 1 << 15


def round_to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """Round to bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(-1)
    rounded = np.empty(values.shape, np.uint16)
    flat = rounded.reshape(-1)
    for start in range(0, len(bits), _ROUNDED_AT_ONCE):
        part = bits[start : start + _ROUNDED_AT_ONCE]
        sums = (part >> 16) & np.uint32(1)
        sums += np.uint32(0x7FFF)
        sums += part
        sums >>= np.uint32(16)
        out = flat[start : start + _ROUNDED_AT_ONCE]
        out[...] = sums
        out[np.isnan(part.view(np.float32))] = 0x7FC0
    return rounded


def groups_of(rows: int) -> int:
    """Return how many groups of `GROUP` rows there are, the last one perhaps a smaller one."""
    return -(-rows // GROUP)


def group_scales(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return 1/127 of the largest magnitude in each group of `GROUP` rows of a column: (K, N) -> (groups, N)."""
    starts = np.arange(0, len(weight), GROUP)
    return (np.maximum.reduceat(np.abs(weight), starts, axis=0) / np.float32(127)).astype(np.float32)


def row_scales(scale: npt.NDArray[np.float32], rows: int) -> npt.NDArray[np.float32]:
    """Return the scale of every number of a matrix: (groups, N) -> (K, N)."""
    return np.repeat(scale, GROUP, axis=0)[:rows]


def nearest_levels(weight: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Round to the nearest whole multiples of `scale`, -127 to 127; 0 where it is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    levels: npt.NDArray[np.int8] = np.clip(np.rint(weight * inverse), -127, 127).astype(np.int8)
    return levels
