"""Steps on rows beside the products: LayerNorm, rounding to bf16, quantising."""

from __future__ import annotations

import math

import numpy as np

from ..reference_numpy import LAYER_NORM_EPSILON
from .cache import helper
from .emitter import ISA, LANES
from .vectors import carray, float32_at, store_bf16, store_number_bf16, uint8_at, uint16_at

_EPSILON = np.float32(LAYER_NORM_EPSILON)
_ONE = np.float32(1)
_ZERO = np.float32(0)

# What a sum over a row needs to be vectorised; infinities and NaN keep their meaning.
REASSOCIATE = {"reassoc", "contract", "nsz"}


@helper(fastmath=REASSOCIATE)
def layer_norm(x, step, rows, width, gain, shift, out, out_step):
    """(x - mean) / sqrt(variance + 1e-5) · gain + shift for each row: (R, D), (D,), (D,) -> out (R, D).

    All are addresses; rows are `step` and `out_step` bytes apart.
    """
    weight, bias = carray(float32_at(gain), (width,)), carray(float32_at(shift), (width,))
    for i in range(rows):
        row = carray(float32_at(x + i * step), (width,))
        target = carray(float32_at(out + i * out_step), (width,))
        total = _ZERO
        for j in range(width):
            total += row[j]
        mean = total / np.float32(width)
        square = _ZERO
        for j in range(width):
            difference = row[j] - mean
            square += difference * difference
        scale = _ONE / np.float32(math.sqrt(square / np.float32(width) + _EPSILON))
        for j in range(width):
            target[j] = (row[j] - mean) * scale * weight[j] + bias[j]


@helper
def narrow_rows(x, step, rows, width, out, out_step):
    """Rows rounded to bf16, and zeros up to the next row: address of float32 (R, D) -> address of uint16 (R, ≥ D)"""
    whole = width // LANES * LANES
    for i in range(rows):
        source, target = x + i * step, out + i * out_step
        for j in range(0, whole, LANES):
            store_bf16(source + 4 * j, target + 2 * j)
        for j in range(whole, width):
            store_number_bf16(source + 4 * j, target + 2 * j)
        rest = carray(uint16_at(target + 2 * width), (out_step // 2 - width,))
        rest[:] = np.uint16(0)


# ARM multiplies signed by signed bytes, x86 unsigned by signed.
_LOWEST_BYTE = 128 if ISA.name == "neon" else 0


@helper(fastmath={"nnan", "nsz", "reassoc"})
def quantise_rows(x, step, rows, width, out, out_step, levels, max_rows):
    """Each row as whole numbers from 0 to 255 between its least and its greatest: float32 (R, D) -> uint8 (R, D).

    x is about `scale[r] · out + offset[r]`; `levels` takes the scales, and `max_rows` further on the offsets. On ARM
    128 is taken off, so that the bytes are signed.
    """
    scales = carray(float32_at(levels), (rows,))
    offsets = carray(float32_at(levels + 4 * max_rows), (rows,))
    for i in range(rows):
        row = carray(float32_at(x + i * step), (width,))
        target = carray(uint8_at(out + i * out_step), (width,))
        low = high = row[0]
        for j in range(width):
            low = min(low, row[j])
            high = max(high, row[j])
        scale = (high - low) / np.float32(255)
        inverse = _ZERO if scale == 0 else _ONE / scale
        for j in range(width):
            level = np.int32((row[j] - low) * inverse + np.float32(0.5))
            target[j] = np.uint8(level - _LOWEST_BYTE)
        scales[i] = scale
        offsets[i] = low + np.float32(_LOWEST_BYTE) * scale
