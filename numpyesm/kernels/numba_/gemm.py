"""Products of rows with packed weights, with the step that follows while the tile is in the first cache.

Rows, weights and outputs are addresses; `step`s are bytes from row to row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import Array
from .cache import helper
from .emitter import (
    ISA,
    LANES,
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    VECTOR_BYTES,
    multiply_bf16,
    multiply_fp32,
    multiply_int8,
)
from .layout import Matrix
from .tiles import ROWS, STEPS, configure_tiles, multiply_tiles_bf16, multiply_tiles_int8, release_tiles, store_tiles
from .vectors import (
    PIECE,
    add_biased,
    add_dequantised,
    carray,
    dequantise,
    float32_at,
    int64_at,
    load_integer,
    load_number,
    store_biased,
    store_dequantised,
    store_dequantised_gelu,
    store_gelu,
    store_gelu_bf16,
    store_gelu_coarse,
    store_number,
    store_piece,
    store_piece_bf16,
    store_rotated,
    store_rotated_bf16,
)

# What becomes of a finished tile.
STORE, GELU, ADD, GELU_BF16, GELU_COARSE = 0, 1, 2, 3, 4

_VECTORS = TILE_COLUMNS // LANES
# Where bf16 and int8 are multiplied on tile registers, their products take more rows, and steps of k by the tile.
_TILES = ISA.tiles
NARROW_ROWS = ROWS if _TILES else TILE_ROWS
_MULTIPLE = STEPS if _TILES else 1
_LATE = 1 if _TILES else 0
_WEIGHT, _BIAS, _OFFSETS, _SCALES = (int(entry) for entry in Matrix)


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


def narrow_steps(inner: int, group: int) -> int:
    """Steps of `group` numbers along K that a product in bf16 (2) or int8 (4) takes."""
    return -(-inner // (group * _MULTIPLE)) * _MULTIPLE


def pack_panels(weight: Array, group: int = 1) -> Array:
    """Weights in the order in which a tile reads them: (K, N) -> flat (panel, K / group, tile column, group).

    `group` neighbours in K lie together, as one step of the product takes them; K and N are padded with zeros.
    """
    inner, columns = weight.shape
    steps, count = inner if group == 1 else narrow_steps(inner, group), panels(columns)
    out = aligned(count * steps * TILE_COLUMNS * group, weight.dtype)
    by_panel = out.reshape(count, steps, TILE_COLUMNS, group)
    if (steps * group, count * TILE_COLUMNS) != weight.shape:
        padded: npt.NDArray[Any] = np.zeros((steps * group, count * TILE_COLUMNS), weight.dtype)
        padded[:inner, :columns] = weight
        weight = padded
    by_panel[...] = weight.reshape(steps, group, count, TILE_COLUMNS).transpose(2, 0, 3, 1)
    return out


@helper
def steps_of(inner, group):
    """`narrow_steps` for compiled code."""
    return (inner + group * _MULTIPLE - 1) // (group * _MULTIPLE) * _MULTIPLE


# -- the end of a tile ----------------------------------------------------------------------------------------------


@helper
def _finish(step, height, width, tile, bias, out, out_step):
    """Add the bias to a tile and store it, put it through GELU, or add it to what is there; `width` columns of it."""
    for row in range(height):
        source, target = tile + row * TILE_BYTES, out + row * out_step
        # Those two have room for whole tiles.
        if width == TILE_COLUMNS or step == GELU_BF16 or step == GELU_COARSE:  # noqa: SIM109
            for vector in range(_VECTORS):
                at = vector * VECTOR_BYTES
                if step == GELU:
                    store_gelu(source + at, bias + at, target + at)
                elif step == GELU_COARSE:
                    store_gelu_coarse(source + at, bias + at, target + at)
                elif step == GELU_BF16:
                    store_gelu_bf16(source + at, bias + at, target + at // 2)
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
def _finish_heads(narrow, height, first_column, tile, bias, table, positions, heads, head_dim, rows, out):
    """Rotate queries and keys of a tile and put every head's rows where they follow each other.

    The columns are (part, head, channel); at `out` lies row `first row` of query head 0, and the heads of `rows` rows
    each follow it, then keys, then values: bf16 if `narrow`, else float32.
    """
    size = 2 if narrow else 4
    width = heads * head_dim
    head_step = rows * head_dim * size
    position = carray(int64_at(positions), (height,))
    for column in range(first_column, min(first_column + TILE_COLUMNS, 3 * width), PIECE):
        at = 4 * (column - first_column)
        part, within = column // width, column % width
        channel = within % head_dim
        target = out + (part * heads + within // head_dim) * head_step + channel * size
        turn = table + 4 * (channel + (2 * head_dim if part == 0 else 0))
        for row in range(height):
            source, here = tile + row * TILE_BYTES + at, target + row * head_dim * size
            if part == 2:
                if narrow:
                    store_piece_bf16(source, bias + at, here)
                else:
                    store_piece(source, bias + at, here)
                continue
            cosine = turn + position[row] * 16 * head_dim
            sine = cosine + 4 * head_dim
            if narrow:
                store_rotated_bf16(source, bias + at, cosine, sine, here)
            else:
                store_rotated(source, bias + at, cosine, sine, here)


# -- one tile -------------------------------------------------------------------------------------------------------


@helper
def _tile_fp32(height, left, step, panel, inner, piece, tile, ahead, ahead_step):
    """K is summed in pieces: shorter chains of additions round less."""
    for k in range(0, inner, piece):
        multiply_fp32(
            height,
            left + 4 * k,
            step,
            panel + k * TILE_BYTES,
            min(piece, inner - k),
            tile,
            TILE_BYTES,
            k,
            ahead + k * ahead_step,
            ahead_step,
        )


@helper
def _begin(rows):
    """Before a group of rows is multiplied in bf16 or int8: -> tiles along the rows, rows of a tile register."""
    tiles = (rows + NARROW_ROWS - 1) // NARROW_ROWS
    half = (rows + 2 * tiles - 1) // (2 * tiles)
    if _TILES:
        configure_tiles(half)
    return tiles, half


@helper
def _end():
    """After a group of rows was multiplied in bf16 or int8."""
    if _TILES:
        release_tiles()


@helper
def _place(i, tiles, rows):
    """Tile i of a product: -> its first column, its first row, its height."""
    panel = i // tiles
    t = i - panel * tiles
    start = rows * t // tiles
    return panel * TILE_COLUMNS, start, rows * (t + 1) // tiles - start


@helper
def _multiply(integer, i, tiles, half, rows, x, x_step, steps, weight, panel_step, tile):
    """Tile i of bf16 or, if `integer`, of bytes, into tile registers where there are any, else into memory."""
    first, start, height = _place(i, tiles, rows)
    ahead_step = (TILE_BYTES + tiles - 1) // tiles
    panel, left = weight + first // TILE_COLUMNS * panel_step, x + start * x_step
    ahead = panel + panel_step + (i % tiles) * steps * ahead_step
    if _TILES:
        if integer:
            multiply_tiles_int8(half, left, x_step, panel, steps, ahead, ahead_step, 0)
        else:
            multiply_tiles_bf16(half, left, x_step, panel, steps, ahead, ahead_step, 0)
    elif integer:
        multiply_int8(height, left, x_step, panel, steps, tile, TILE_BYTES, 0, ahead, ahead_step)
    else:
        multiply_bf16(height, left, x_step, panel, steps, tile, TILE_BYTES, 0, ahead, ahead_step)


@helper
def _leave(half, tile):
    """Tile registers to memory."""
    if _TILES:
        store_tiles(half, tile, TILE_BYTES)


@helper
def _dequantise(height, levels, max_rows, offsets, scales, tile):
    """`levels` are the scales of the rows, and `max_rows` further on their offsets; the others those of the columns."""
    row_scales = carray(float32_at(levels), (height,))
    row_offsets = carray(float32_at(levels + 4 * max_rows), (height,))
    for row in range(height):
        for at in range(0, TILE_BYTES, VECTOR_BYTES):
            dequantise(tile + row * TILE_BYTES + at, offsets + at, scales + at, row_scales[row], row_offsets[row])


@helper
def _finish_int8(step, height, width, levels, max_rows, offsets, scales, tile, bias, out, out_step):
    """`_dequantise` and `_finish` at once where the tile is as wide as can be."""
    if width < TILE_COLUMNS:
        _dequantise(height, levels, max_rows, offsets, scales, tile)
        _finish(step, height, width, tile, bias, out, out_step)
        return
    row_scales = carray(float32_at(levels), (height,))
    row_offsets = carray(float32_at(levels + 4 * max_rows), (height,))
    for row in range(height):
        scale, offset = row_scales[row], row_offsets[row]
        for at in range(0, TILE_BYTES, VECTOR_BYTES):
            source, target = tile + row * TILE_BYTES + at, out + row * out_step + at
            if step == GELU_COARSE:
                store_dequantised_gelu(source, offsets + at, scales + at, bias + at, target, scale, offset)
            elif step == ADD:
                add_dequantised(source, offsets + at, scales + at, bias + at, target, scale, offset)
            else:
                store_dequantised(source, offsets + at, scales + at, bias + at, target, scale, offset)


# -- whole products -------------------------------------------------------------------------------------------------


@helper
def linear(x, x_step, rows, inner, piece, weight, panel_step, bias, columns, step, out, out_step, tile):
    """`step` of x @ weight + bias: (R, K), packed (≥ K, N), (N,) -> out (R, N); panels are `panel_step` bytes apart."""
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    ahead_step = (TILE_BYTES + tiles - 1) // tiles
    for first in range(0, columns, TILE_COLUMNS):
        panel = weight + first // TILE_COLUMNS * panel_step
        width = min(TILE_COLUMNS, columns - first)
        start = 0
        for t in range(tiles):
            # Tiles of near-equal height: a low last tile would not fill the multipliers' pipelines.
            height = rows * (t + 1) // tiles - start
            ahead = panel + panel_step + t * inner * ahead_step
            _tile_fp32(height, x + start * x_step, x_step, panel, inner, piece, tile, ahead, ahead_step)
            _finish(step, height, width, tile, bias + 4 * first, out + start * out_step + 4 * first, out_step)
            start += height


@helper
def linear_heads(x, x_step, rows, inner, piece, matrix, table, positions, heads, head_dim, all_rows, out, tile):
    """Query, key and value of (R, K), see `_finish_heads`."""
    weight, bias = load_integer(matrix, _WEIGHT), load_integer(matrix, _BIAS)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    ahead_step = (TILE_BYTES + tiles - 1) // tiles
    for first in range(0, 3 * heads * head_dim, TILE_COLUMNS):
        panel, start = weight + 4 * inner * first, 0
        for t in range(tiles):
            height = rows * (t + 1) // tiles - start
            ahead = panel + inner * TILE_BYTES + t * inner * ahead_step
            _tile_fp32(height, x + start * x_step, x_step, panel, inner, piece, tile, ahead, ahead_step)
            at, to = bias + 4 * first, out + start * head_dim * 4
            _finish_heads(False, height, first, tile, at, table, positions + 8 * start, heads, head_dim, all_rows, to)
            start += height


# What follows a product on tile registers waits until the next one is under way: that takes other parts of the core.


@helper
def linear_bf16(x, x_step, rows, inner, weight, panel_step, bias, columns, step, out, out_step, tile):
    """`linear` of bf16, summed in float32; K is padded to whole steps."""
    tiles, half = _begin(rows)
    number, steps = 2 if step == GELU_BF16 else 4, steps_of(inner, 2)
    products = tiles * ((columns + TILE_COLUMNS - 1) // TILE_COLUMNS)
    for i in range(products + _LATE):
        if i < products:
            _multiply(False, i, tiles, half, rows, x, x_step, steps, weight, panel_step, tile)
        if i >= _LATE:
            first, start, height = _place(i - _LATE, tiles, rows)
            width, target = min(TILE_COLUMNS, columns - first), out + start * out_step + number * first
            _finish(step, height, width, tile, bias + 4 * first, target, out_step)
        _leave(half, tile)
    _end()


@helper
def linear_heads_bf16(x, x_step, rows, inner, matrix, table, positions, heads, head_dim, all_rows, out, tile):
    """`linear_heads` of bf16; leaves bf16."""
    weight, bias = load_integer(matrix, _WEIGHT), load_integer(matrix, _BIAS)
    steps = steps_of(inner, 2)
    tiles, half = _begin(rows)
    products = tiles * ((3 * heads * head_dim + TILE_COLUMNS - 1) // TILE_COLUMNS)
    for i in range(products + _LATE):
        if i < products:
            _multiply(False, i, tiles, half, rows, x, x_step, steps, weight, steps * TILE_BYTES, tile)
        if i >= _LATE:
            first, start, height = _place(i - _LATE, tiles, rows)
            at, to = bias + 4 * first, out + start * head_dim * 2
            _finish_heads(True, height, first, tile, at, table, positions + 8 * start, heads, head_dim, all_rows, to)
        _leave(half, tile)
    _end()


@helper
def linear_int8(
    x,
    x_step,
    rows,
    inner,
    levels,
    max_rows,
    weight,
    panel_step,
    offsets,
    scales,
    bias,
    columns,
    step,
    out,
    out_step,
    tile,
):
    """`linear` of bytes: row r of x stands for scale[r] · x + offset[r], see `_dequantise`; K fills whole steps."""
    steps = steps_of(inner, 4)
    tiles, half = _begin(rows)
    products = tiles * ((columns + TILE_COLUMNS - 1) // TILE_COLUMNS)
    for i in range(products + _LATE):
        if i < products:
            _multiply(True, i, tiles, half, rows, x, x_step, steps, weight, panel_step, tile)
        if i >= _LATE:
            first, start, height = _place(i - _LATE, tiles, rows)
            width, at, target = min(TILE_COLUMNS, columns - first), 4 * first, out + start * out_step + 4 * first
            _finish_int8(
                step,
                height,
                width,
                levels + 4 * start,
                max_rows,
                offsets + at,
                scales + at,
                tile,
                bias + at,
                target,
                out_step,
            )
        _leave(half, tile)
    _end()


@helper
def linear_heads_int8(
    narrow, x, x_step, rows, inner, levels, max_rows, matrix, table, positions, heads, head_dim, all_rows, out, tile
):
    """`linear_heads` of bytes; leaves bf16 if `narrow`, else float32."""
    weight, bias = load_integer(matrix, _WEIGHT), load_integer(matrix, _BIAS)
    offsets, scales = load_integer(matrix, _OFFSETS), load_integer(matrix, _SCALES)
    steps, size = steps_of(inner, 4), 2 if narrow else 4
    tiles, half = _begin(rows)
    products = tiles * ((3 * heads * head_dim + TILE_COLUMNS - 1) // TILE_COLUMNS)
    for i in range(products + _LATE):
        if i < products:
            _multiply(True, i, tiles, half, rows, x, x_step, steps, weight, steps * TILE_BYTES, tile)
        if i >= _LATE:
            first, start, height = _place(i - _LATE, tiles, rows)
            at, to = 4 * first, out + start * head_dim * size
            _dequantise(height, levels + 4 * start, max_rows, offsets + at, scales + at, tile)
            _finish_heads(
                narrow, height, first, tile, bias + at, table, positions + 8 * start, heads, head_dim, all_rows, to
            )
        _leave(half, tile)
    _end()
