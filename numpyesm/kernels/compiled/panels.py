"""Weights in the order in which register tiles read them, and the sizes of what else depends on the tiles' shape."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from ..base import Array
from .code import Code
from .isa import HALF_ROWS, ROWS, STEPS, Isa
from .layout import Room, address

Order = npt.NDArray[np.int64]

# Keys whose exponentials tile registers hold at a time, as pairs of bf16: a part of the L1 cache.
CHUNK_KEYS_ON_TILES = 320
# Keys whose scores leave tile registers before their exponentials are taken, a whole number of tiles.
SCORE_KEYS = 64


def aligned(size: int, dtype: npt.DTypeLike = np.float32, *, zeros: bool = False) -> Array:
    """A one-dimensional array that begins on a cache line: undefined, or zeros that take no memory until used."""
    dtype = np.dtype(dtype)
    buffer = (np.zeros if zeros else np.empty)(size * dtype.itemsize + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size * dtype.itemsize].view(dtype)


class Blocks:
    """Arrays like `aligned`'s, cut from blocks so large that the system backs them with few and large pages.

    Touching memory for the first time, 4 kB after 4 kB, takes longer than packing weights into it.
    """

    _LARGEST = 1 << 25

    def __init__(self) -> None:
        self._left = aligned(0, np.uint8)
        self._cut = 0  # bytes so far: the next block is no larger, so that small models take little
        self._lock = threading.Lock()

    def aligned(self, size: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """A one-dimensional array that begins on a cache line; contents undefined."""
        used = size * np.dtype(dtype).itemsize
        taken = -(-used // 64) * 64
        with self._lock:
            if len(self._left) < taken:
                self._left = aligned(max(taken, min(self._cut, self._LARGEST)), np.uint8)
            self._cut += taken
            found, self._left = self._left[:used], self._left[taken:]
        return found.view(dtype)


def panels(isa: Isa, columns: int) -> int:
    """Tiles across this many columns."""
    return -(-columns // isa.columns)


def column_order(isa: Isa, columns: npt.NDArray[np.intp]) -> Order:
    """Columns of a weight as tiles hold them: these, then -1 for nothing up to a whole number of tiles."""
    return np.append(columns, np.full(-len(columns) % isa.columns, -1)).astype(np.int64)


# Queries, keys and values that are computed at a time have at least so many columns.
_LEAST_HEAD_COLUMNS = 192


def heads_at_a_time(isa: Isa, heads: int, head_dim: int) -> int:
    """How many heads' queries, keys and values lie together: they fill whole panels, a few of them."""
    for count in range(1, heads):
        columns = 3 * count * head_dim
        if heads % count == 0 and columns % isa.columns == 0 and columns >= _LEAST_HEAD_COLUMNS:
            return count
    return heads


def in_order(vector: Array, order: Order) -> Array:
    """Numbers as `column_order` has them, 0 for nothing: (N,) -> (panels · tile columns,) float32."""
    out = aligned(len(order))
    out[:] = np.where(order < 0, 0, vector[order])
    return out


def product_steps(isa: Isa, inner: int, narrow: bool) -> int:
    """Steps along K that a product takes: of one number, or of two in bf16."""
    return -(-inner // (2 * isa.narrow_steps)) * isa.narrow_steps if narrow else inner


def row_numbers(isa: Isa, width: int, narrow: bool) -> int:
    """Numbers from row to row, of `width` numbers each, that a product takes (see `steps.row_bytes`)."""
    numbers = product_steps(isa, width, narrow) * (2 if narrow else 1)
    return numbers | 32 if narrow and isa.tiles else numbers


def pack_panels(
    code: Code, weight: Array, order: Order, steps: int, narrow: bool = False, room: Blocks | None = None
) -> Array:
    """Weights in the order in which a tile reads them: (K, N) -> flat (panel, steps, tile column, group).

    `group` neighbours in K, two for a product in bf16 (`narrow`) and else one, lie together as one step of the product
    takes them. Columns are as in `column_order`; zeros fill up the steps.
    """
    weight, group = np.ascontiguousarray(weight), 2 if narrow else 1
    out = (room.aligned if room else aligned)(group * steps * len(order), weight.dtype)
    source = weight.itemsize, address(weight), *weight.shape, address(order)
    code.call("pack_weights", *source, group, steps, len(order) // code.isa.columns, address(out))
    return out


# -- what attention holds -------------------------------------------------------------------------------------------


def chunk_keys(isa: Isa) -> int:
    """Keys whose scores are held at a time: 16 kB of them, half of a small L1 cache."""
    return max(32, 16384 // (4 * isa.strip_columns) // isa.strip_rows * isa.strip_rows)


def strip_size(isa: Isa, length: int, with_maps: bool) -> int:
    """Numbers of `Room.SCORES`: one chunk of scores, or all of them where maps are wanted."""
    rows = -(-length // ROWS) * ROWS if isa.tiles else length
    return (rows if with_maps else max(chunk_keys(isa), SCORE_KEYS)) * isa.strip_columns


def bf16_sizes(isa: Isa, rows: int, length: int, head_dim: int) -> dict[Room, tuple[int, npt.DTypeLike]]:
    """Numbers of the buffers of `Room` that attention in bf16 needs or needs larger, for blocks of `rows` rows."""
    sizes: dict[Room, tuple[int, npt.DTypeLike]] = {
        Room.NARROW_QUERIES: (rows * head_dim, np.uint16),
        Room.NARROW_KEYS: ((length + ROWS) * row_numbers(isa, head_dim, True), np.uint16),
        Room.NARROW_VALUES: (length * head_dim, np.uint16),
        Room.SHIFT: (head_dim, np.float32),
    }
    if not isa.tiles:
        pairs = chunk_keys(isa) * isa.strip_columns
        return sizes | {Room.VALUES: ((length + 1) // 2 * head_dim, np.uint32), Room.PAIRS: (pairs, np.uint32)}
    channels = (head_dim // HALF_ROWS + 1) * HALF_ROWS  # and ones
    # Rows of pairs that the queries of a strip fill, zeros included.
    query_rows = -(-head_dim // (2 * STEPS)) * STEPS
    return sizes | {
        # With what a tile may read behind the values of one head.
        Room.VALUES: ((-(-length // ROWS) * (head_dim + 1) + HALF_ROWS) * ROWS, np.uint16),
        Room.PAIRS: (CHUNK_KEYS_ON_TILES // 2 * isa.strip_columns, np.uint32),
        Room.QUERIES: (max(head_dim, query_rows) * isa.strip_columns, np.float32),
        Room.STRIP_CONTEXT: (channels * isa.strip_columns, np.float32),
    }
