"""Steps on rows beside the products: LayerNorm and rounding to bf16."""

from __future__ import annotations

import math

import numpy as np

from ..compiled.layout import Norm
from ..constants import LAYER_NORM_EPSILON
from .cache import helper, kernel
from .emitter import ISA, LANES
from .rows import row_normalise, row_normalise_bf16, row_normalise_split, row_squares, row_sum
from .vectors import (
    carray,
    float32_at,
    load_integer,
    load_number,
    split_number,
    store_bf16,
    store_split,
    uint16_at,
)

_EPSILON = np.float32(LAYER_NORM_EPSILON)
_ONE = np.float32(1)
_MULTIPLE, _TILES = ISA.narrow_steps, ISA.tiles


@helper
def steps_of(inner, narrow):
    """`panels.product_steps` for compiled code."""
    return inner if narrow == 0 else (inner + 2 * _MULTIPLE - 1) // (2 * _MULTIPLE) * _MULTIPLE


@helper
def row_bytes(narrow, width):
    """Bytes from row to row of `width` numbers as a product takes them: `panels.row_numbers` for compiled code.

    A tile register takes a line of sixteen rows at once. An odd number of lines apart, they fall on different places
    of the L1 cache. Measured: products by a sixth faster where a row of the 150M model has 21 lines instead of 20.
    """
    size = 4 * steps_of(width, narrow)
    return size | 64 if narrow and _TILES else size


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
def any_short(short, first, last):
    """Whether any of the rows from `first` to `last` is of a short sequence, by `Pass.SHORT_ROWS`."""
    return load_integer(short, last) != load_integer(short, first)


@helper
def clear_bf16(start, count):
    """Zeros in bf16."""
    numbers = carray(uint16_at(start), (count,))
    numbers[:] = np.uint16(0)


@helper
def _begin_row(target, width, step, low, short, row):
    """Zeros behind a row in bf16 and for its low part: -> `low` if the row is of a short sequence, else 0."""
    clear_bf16(target + 2 * width, step // 2 - width)
    if low == 0:
        return 0
    clear_bf16(target + low, step // 2)
    return low if any_short(short, row, row + 1) else 0


@kernel
def layer_norm(narrow, x, rows, width, norm, out, out_step, low, short):
    """(x - mean) / sqrt(variance + 1e-5) · gain + shift for each row: (R, D) -> out (R, D) as a product takes it.

    `norm` is a `layout.Norm`; rows of `out` are `out_step` bytes apart. With `narrow` they are rounded to bf16, with
    zeros up to the next row. Then, if `low` is not 0, what rounding takes off the rows of `short` sequences goes so
    many bytes further, rounded to bf16 too, and zeros for the others.
    """
    gain, shift = load_integer(norm, Norm.GAIN), load_integer(norm, Norm.SHIFT)
    weight, bias = carray(float32_at(gain), (width,)), carray(float32_at(shift), (width,))
    whole = width // LANES
    for i in range(rows):
        row, target = x + i * (4 * width), out + i * out_step
        mean, scale = _moments(row, width)
        split = _begin_row(target, width, out_step, low, short, i) if narrow else 0
        if split != 0:
            row_normalise_split(row, whole, mean, scale, gain, shift, target, split)
        elif narrow:
            row_normalise_bf16(row, whole, mean, scale, gain, shift, target)
        else:
            row_normalise(row, whole, mean, scale, gain, shift, target)
        numbers, normal = carray(float32_at(row), (width,)), carray(float32_at(target), (width,))
        for j in range(whole * LANES, width):
            value = (numbers[j] - mean) * scale * weight[j] + bias[j]
            if narrow:
                split_number(value, target + 2 * j, split)
            else:
                normal[j] = value


@helper
def narrow_rows(x, rows, width, out, out_step, low, short):
    """Rows rounded to bf16, and zeros up to the next row: address of float32 (R, D) -> address of uint16 (R, ≥ D)

    `low` and `short` are those of `layer_norm`.
    """
    whole = width // LANES * LANES
    for i in range(rows):
        source, target = x + i * (4 * width), out + i * out_step
        split = _begin_row(target, width, out_step, low, short, i)
        if split != 0:
            for j in range(0, whole, LANES):
                store_split(source + 4 * j, target + 2 * j, target + 2 * j + split)
        else:
            for j in range(0, whole, LANES):
                store_bf16(source + 4 * j, target + 2 * j)
        for j in range(whole, width):
            split_number(load_number(source + 4 * j), target + 2 * j, split)
