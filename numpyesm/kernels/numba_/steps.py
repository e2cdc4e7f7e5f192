"""Steps on rows beside the products: LayerNorm, rounding to bf16, quantising."""

from __future__ import annotations

import math

import numpy as np

from ..numpy_steps import LAYER_NORM_EPSILON
from .cache import helper
from .emitter import ISA, LANES
from .rows import row_normalise, row_normalise_bf16, row_quantise, row_range, row_squares, row_sum
from .vectors import carray, float32_at, store_bf16, store_bf16_of, store_number_bf16, uint8_at, uint16_at

_EPSILON = np.float32(LAYER_NORM_EPSILON)
_ONE = np.float32(1)
_ZERO = np.float32(0)

# What a sum over a row needs to be vectorised; infinities and NaN keep their meaning.
REASSOCIATE = {"reassoc", "contract", "nsz"}


@helper
def _moments(row, width):
    """Mean and 1 / standard deviation of a row: address of (D,)"""
    whole = width // LANES
    numbers = carray(float32_at(row), (width,))
    total = row_sum(row, whole)
    for j in range(whole * LANES, width):
        total += numbers[j]
    mean = total / np.float32(width)
    square = row_squares(row, whole, mean)
    for j in range(whole * LANES, width):
        difference = numbers[j] - mean
        square += difference * difference
    return mean, _ONE / np.float32(math.sqrt(square / np.float32(width) + _EPSILON))


@helper
def layer_norm(x, step, rows, width, gain, shift, out, out_step):
    """(x - mean) / sqrt(variance + 1e-5) · gain + shift for each row: (R, D), (D,), (D,) -> out (R, D).

    All are addresses; rows are `step` and `out_step` bytes apart.
    """
    weight, bias = carray(float32_at(gain), (width,)), carray(float32_at(shift), (width,))
    whole = width // LANES
    for i in range(rows):
        row, target = x + i * step, out + i * out_step
        mean, scale = _moments(row, width)
        row_normalise(row, whole, mean, scale, gain, shift, target)
        numbers, normal = carray(float32_at(row), (width,)), carray(float32_at(target), (width,))
        for j in range(whole * LANES, width):
            normal[j] = (numbers[j] - mean) * scale * weight[j] + bias[j]


@helper
def layer_norm_bf16(x, step, rows, width, gain, shift, out, out_step):
    """`layer_norm`, rounded to bf16, and zeros up to the next row."""
    weight, bias = carray(float32_at(gain), (width,)), carray(float32_at(shift), (width,))
    whole = width // LANES
    for i in range(rows):
        row, target = x + i * step, out + i * out_step
        mean, scale = _moments(row, width)
        row_normalise_bf16(row, whole, mean, scale, gain, shift, target)
        numbers = carray(float32_at(row), (width,))
        for j in range(whole * LANES, width):
            store_bf16_of((numbers[j] - mean) * scale * weight[j] + bias[j], target + 2 * j)
        rest = carray(uint16_at(target + 2 * width), (out_step // 2 - width,))
        rest[:] = np.uint16(0)


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


@helper
def quantise_rows(x, step, rows, width, out, out_step, levels, max_rows):
    """Each row as whole numbers from 0 to 255 between its least and its greatest: float32 (R, D) -> uint8 (R, D).

    x is about `scale[r] · out + offset[r]`; `levels` takes the scales, and `max_rows` further on the offsets. On ARM
    128 is taken off, so that the bytes are signed.
    """
    scales = carray(float32_at(levels), (rows,))
    offsets = carray(float32_at(levels + 4 * max_rows), (rows,))
    whole = width // LANES
    for i in range(rows):
        source, target = x + i * step, out + i * out_step
        row, quantised = carray(float32_at(source), (width,)), carray(uint8_at(target), (width,))
        low, high = row_range(source, whole, row[0], row[0])
        for j in range(whole * LANES, width):
            low, high = min(low, row[j]), max(high, row[j])
        scale = (high - low) / np.float32(255)
        inverse = _ZERO if scale == 0 else _ONE / scale
        row_quantise(source, whole, low, inverse, _LOWEST_BYTE, target)
        for j in range(whole * LANES, width):
            level = np.int32((row[j] - low) * inverse + np.float32(0.5))
            quantised[j] = np.uint8(level - _LOWEST_BYTE)
        scales[i] = scale
        offsets[i] = low + np.float32(_LOWEST_BYTE) * scale
