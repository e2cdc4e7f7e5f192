"""Matrices that stay as the file has them, in half or a quarter of the room, and are widened a few rows at a time.

A piece of the rows is widened into a buffer that stays in the core's cache, is multiplied, and is overwritten by the
next: the whole matrix is never there in float32, the file's pages stay shared between processes, and for a block of 192
rows it costs 2 to 4 % of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..weights.tensor import GROUP, StoredTensor
from .scratch import scratch

Array = npt.NDArray[Any]

# Rows to be widened at a time: whole groups of int8, few enough for the cache, enough to be worth a product.
WIDENED_ROWS = 4 * GROUP

_FLOAT32 = np.dtype(np.float32)

# float16 as an integer moved 13 bits up is a float32 with an exponent too small by 112. The 16-bit number is
# sign-extended on the way, so what the mask leaves is its sign bit and the 15 bits of magnitude.
_FLOAT16_BITS = np.int32(0x8FFFE000 - (1 << 32))
_FLOAT16_FACTOR = np.float32(2.0**112)
_FLOAT16_EXPONENT = np.int16(0x7C00)  # all ones in NaN and infinity


class NarrowMatrix:
    """A matrix (K, N) in float16, bfloat16 or int8; slices of its rows are float32.

    Attributes
    ----------
    shape : tuple of int
    """

    def __init__(self, tensor: StoredTensor) -> None:
        self.shape: tuple[int, ...] = tensor.shape
        self._scale = tensor.scale
        self._raw = tensor.raw
        self._dtype = tensor.dtype
        if self._dtype == "F16" and ((self._raw.view(np.int16) & _FLOAT16_EXPONENT) == _FLOAT16_EXPONENT).any():
            self._dtype = "F16 with NaN or infinity"  # which the quick way would turn into plain numbers

    @staticmethod
    def suits(tensor: StoredTensor) -> bool:
        """Whether a tensor is a matrix stored in less than float32."""
        return len(tensor.shape) == 2 and tensor.dtype in ("F16", "BF16", "I8")

    def __getitem__(self, rows: slice) -> Array:
        """Rows as float32 (r, N), valid until the calling thread takes the next slice of any matrix."""
        raw = self._raw[rows]
        out = scratch("widened", raw.shape, _FLOAT32)
        if self._dtype == "BF16":
            bits = out.view(np.uint32)
            np.copyto(bits, raw)
            np.left_shift(bits, np.uint32(16), out=bits)
        elif self._dtype == "F16":
            # NumPy's own conversion takes six times as long: it does one number at a time.
            signed = out.view(np.int32)
            np.copyto(signed, raw.view(np.int16))
            np.left_shift(signed, np.int32(13), out=signed)
            np.bitwise_and(signed, _FLOAT16_BITS, out=signed)
            np.multiply(out, _FLOAT16_FACTOR, out=out)
        elif self._scale is None:
            np.copyto(out, raw)
        else:
            first = rows.start or 0
            for group in range(first // GROUP, -(-(first + len(raw)) // GROUP)):
                part = slice(max(0, group * GROUP - first), (group + 1) * GROUP - first)
                np.multiply(raw[part], self._scale[group], out=out[part])
        return out
