"""Products of rows with packed weights, with the step that follows while the tile is in the first cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import Array
from .cache import helper
from .emitter import (
    LANES,
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    VECTOR_BYTES,
    add_biased,
    dequantise,
    load_number,
    multiply_bf16,
    multiply_fp32,
    multiply_int8,
    store_biased,
    store_gelu,
    store_gelu_bf16,
    store_number,
)

# What becomes of a finished tile.
STORE, GELU, ADD, GELU_BF16 = 0, 1, 2, 3

_VECTORS = TILE_COLUMNS // LANES


def aligned(size: int, dtype: npt.DTypeLike = np.float32) -> Array:
    """A one-dimensional array that begins on a cache line; contents undefined."""
    dtype = np.dtype(dtype)
    buffer = np.empty(size * dtype.itemsize + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size * dtype.itemsize].view(dtype)


def panels(columns: int) -> int:
    """Tiles across this many columns."""
    return -(-columns // TILE_COLUMNS)


def padded_columns(vector: Array) -> Array:
    """Zeros appended up to a whole number of tiles: (N,) -> (panels · tile columns,) float32."""
    out = aligned(panels(len(vector)) * TILE_COLUMNS)
    out[: len(vector)] = vector
    out[len(vector) :] = 0
    return out


def pack_panels(weight: Array, group: int = 1) -> Array:
    """Weights in the order in which a tile reads them: (K, N) -> flat (panel, K / group, tile column, group).

    `group` neighbours in K lie together, as one step of the product takes them; K and N are padded with zeros.
    """
    inner, columns = weight.shape
    steps, count = -(-inner // group), panels(columns)
    out = aligned(count * steps * TILE_COLUMNS * group, weight.dtype)
    by_panel = out.reshape(count, steps, TILE_COLUMNS, group)
    if (steps * group, count * TILE_COLUMNS) != weight.shape:
        padded: npt.NDArray[Any] = np.zeros((steps * group, count * TILE_COLUMNS), weight.dtype)
        padded[:inner, :columns] = weight
        weight = padded
    by_panel[...] = weight.reshape(steps, group, count, TILE_COLUMNS).transpose(2, 0, 3, 1)
    return out


@helper
def finish_tile(step, height, width, tile, bias, out, out_step):
    """Add the bias to a tile and store it, put it through GELU, or add it to what is there; `width` columns of it."""
    for row in range(height):
        source, target = tile + row * TILE_BYTES, out + row * out_step
        if step == GELU_BF16:  # its rows have room for whole tiles
            for vector in range(_VECTORS):
                at = vector * VECTOR_BYTES
                store_gelu_bf16(source + at, bias + at, target + at // 2)
            continue
        if width == TILE_COLUMNS:
            for vector in range(_VECTORS):
                at = vector * VECTOR_BYTES
                if step == GELU:
                    store_gelu(source + at, bias + at, target + at)
                elif step == ADD:
                    add_biased(source + at, bias + at, target + at)
                else:
                    store_biased(source + at, bias + at, target + at)
            continue
        for vector in range(_VECTORS):
            at = vector * VECTOR_BYTES
            if step == GELU:
                store_gelu(source + at, bias + at, source + at)
            else:
                store_biased(source + at, bias + at, source + at)
        for column in range(width):
            value = load_number(source + 4 * column)
            if step == ADD:
                value += load_number(target + 4 * column)
            store_number(value, target + 4 * column)


@helper
def linear(x, inner, piece, weight, bias, columns, step, out, tile):
    """`step` of x @ weight + bias: (R, ≥ K), packed (K, N), (N,) -> out (R, ≥ N).

    K is summed in pieces: shorter chains of additions round less.
    """
    rows, x_step, out_step = x.shape[0], 4 * x.shape[1], 4 * out.shape[1]
    x_at, weight_at, bias_at, out_at, tile_at = (
        x.ctypes.data,
        weight.ctypes.data,
        bias.ctypes.data,
        out.ctypes.data,
        tile.ctypes.data,
    )
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for first_column in range(0, columns, TILE_COLUMNS):
        panel = weight_at + 4 * inner * first_column
        width = min(TILE_COLUMNS, columns - first_column)
        start = 0
        for t in range(tiles):
            # Tiles of near-equal height: a low last tile would not fill the multipliers' pipelines.
            height = rows * (t + 1) // tiles - start
            left = x_at + start * x_step
            for k in range(0, inner, piece):
                multiply_fp32(
                    height, left + 4 * k, x_step, panel + k * TILE_BYTES, min(piece, inner - k), tile_at, TILE_BYTES, k
                )
            finish_tile(
                step,
                height,
                width,
                tile_at,
                bias_at + 4 * first_column,
                out_at + start * out_step + 4 * first_column,
                out_step,
            )
            start += height


@helper
def linear_bf16(x, inner, weight, bias, columns, step, out, out_step, tile):
    """`step` of x @ weight + bias, summed in float32: bf16 (R, ≥ K), packed bf16 (K, N), (N,) -> out.

    `out` is an address with rows `out_step` bytes apart. K is padded to an even number.
    """
    rows, x_step = x.shape[0], 2 * x.shape[1]
    number = 2 if step == GELU_BF16 else 4
    steps = (inner + 1) // 2
    x_at, weight_at, bias_at, tile_at = x.ctypes.data, weight.ctypes.data, bias.ctypes.data, tile.ctypes.data
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for first_column in range(0, columns, TILE_COLUMNS):
        panel = weight_at + 4 * steps * first_column
        width = min(TILE_COLUMNS, columns - first_column)
        start = 0
        for t in range(tiles):
            height = rows * (t + 1) // tiles - start
            multiply_bf16(height, x_at + start * x_step, x_step, panel, steps, tile_at, TILE_BYTES, 0)
            target = out + start * out_step + number * first_column
            finish_tile(step, height, width, tile_at, bias_at + 4 * first_column, target, out_step)
            start += height


@helper
def linear_int8(x, scales, offsets, inner, weight, sums, factors, bias, columns, step, out, tile):
    """`step` of x @ weight + bias: uint8 (R, ≥ K), packed int8 (K, N), (N,) -> out (R, ≥ N).

    Row r of x stands for `scales[r] · x + offsets[r]`; column n of the weights for `factors[n] · weight`, and `sums[n]`
    is its sum. K is padded to a multiple of four.
    """
    rows, x_step, out_step = x.shape[0], x.shape[1], 4 * out.shape[1]
    steps = (inner + 3) // 4
    x_at, weight_at, bias_at, out_at, tile_at = (
        x.ctypes.data,
        weight.ctypes.data,
        bias.ctypes.data,
        out.ctypes.data,
        tile.ctypes.data,
    )
    sums_at, factors_at = sums.ctypes.data, factors.ctypes.data
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    for first_column in range(0, columns, TILE_COLUMNS):
        panel = weight_at + 4 * steps * first_column
        width, at = min(TILE_COLUMNS, columns - first_column), 4 * first_column
        start = 0
        for t in range(tiles):
            height = rows * (t + 1) // tiles - start
            multiply_int8(height, x_at + start * x_step, x_step, panel, steps, tile_at, TILE_BYTES, 0)
            for row in range(height):
                scale, offset = scales[start + row], offsets[start + row]
                for vector in range(0, TILE_BYTES, VECTOR_BYTES):
                    source = tile_at + row * TILE_BYTES + vector
                    dequantise(source, sums_at + at + vector, factors_at + at + vector, scale, offset)
            finish_tile(step, height, width, tile_at, bias_at + at, out_at + start * out_step + at, out_step)
            start += height
