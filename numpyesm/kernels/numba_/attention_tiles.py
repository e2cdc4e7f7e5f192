"""One head of a strip of queries on tile registers: what `attention._strip` does, in bf16.

Scores of 32 keys at a time leave the tiles for their exponentials, which go back into tiles as pairs of neighbouring
keys. Keys are multiplied as they lie; what a tile reads behind a head's channels meets zeros on the queries' side.
Values are laid out channel by channel, 32 keys at a time, with a last channel of ones: its context is the sum of the
exponentials, which the vector units have no time for.
"""

from __future__ import annotations

import numpy as np

from ..compiled.isa import HALF_ROWS, ROWS, STEPS
from ..compiled.panels import CHUNK_KEYS_ON_TILES
from .cache import helper
from .emitter import STRIP_COLUMNS
from .tiles import context_product, tile_scores
from .vectors import carray, exponentials, float32_at, part_pairs, transpose_eight, uint16_at, uint32_at

_ZERO = np.float32(0)
_BLOCK_ROW = 2 * ROWS  # bytes of one channel of 32 keys
_ONE_IN_BF16 = np.uint16(0x3F80)


@helper
def second_rows(head_dim):
    """Rows that the second tiles of `context_product` need, those of the last channels and of the ones."""
    return head_dim + 1 - HALF_ROWS if HALF_ROWS <= head_dim < ROWS else HALF_ROWS


@helper
def fill_queries(items, lanes, out):
    """Zeros below the `items` pairs of a strip's queries, up to whole tiles."""
    missing = (items + STEPS - 1) // STEPS * STEPS - items
    rest = carray(float32_at(out + 4 * items * lanes), (missing * lanes,))
    rest[:] = _ZERO


@helper
def transpose_values(values, length, head_dim, room, out):
    """(L, C) bf16 -> (L / 32, C + 1, 32), zeros behind the last key, ones in the last row.

    `room` holds 16 · C numbers of four bytes.
    """
    step, pairs = 2 * head_dim, head_dim // 2
    for block in range((length + ROWS - 1) // ROWS):
        source, target = values + block * ROWS * step, out + block * (head_dim + 1) * _BLOCK_ROW
        keys = min(ROWS, length - block * ROWS)
        # Pairs of channels as single numbers of four bytes: key by key, then pair by pair.
        by_pair = carray(uint32_at(room), (pairs, ROWS))
        whole = keys // 8 * 8 if pairs >= 8 else 0
        for key in range(0, whole, 8):
            for start in range(0, pairs, 8):
                pair = min(start, pairs - 8)
                transpose_eight(source + key * step + 4 * pair, step, room + 4 * (pair * ROWS + key), 4 * ROWS)
        for key in range(whole, keys):
            row = carray(uint32_at(source + key * step), (pairs,))
            for pair in range(pairs):
                by_pair[pair, key] = row[pair]
        if keys < ROWS:
            by_pair[:, keys:] = np.uint32(0)
        for pair in range(pairs):
            low, high = target + 2 * pair * _BLOCK_ROW, target + (2 * pair + 1) * _BLOCK_ROW
            part_pairs(room + 4 * pair * ROWS, low, high)
        ones = carray(uint16_at(target + head_dim * _BLOCK_ROW), (ROWS,))
        ones[:] = _ONE_IN_BF16


@helper
def _exponentials(keep, queries, keys, step, count, tiles_of_k, lanes, scores, state, pairs):
    """2^(keys (count, C) · queries + shift) as `pairs`, zeros up to whole tiles; if asked, to all digits in `scores`.

    Row 0 of `state` is the shift; what is kept is added up in row 2.
    """
    tile_scores(lanes, count, keys, step, queries, tiles_of_k, scores, state, pairs, 1 if keep else 0)
    if keep:
        exponentials(lanes, count, scores, state + 8 * lanes)
    done = (count + 1) // 2
    missing = (count + ROWS - 1) // ROWS * STEPS - done
    rest = carray(float32_at(pairs + 4 * done * lanes), (missing * lanes,))
    rest[:] = _ZERO


@helper
def strip_on_tiles(keep, queries, keys, values, step, length, head_dim, lanes, buffers):
    """See `attention._strip`; `values` as `transpose_values` leaves them, tiles configured with all rows.

    With `keep`, the sums of what stays in `scores` are in row 2 of `state`.
    """
    scores, pairs, state, context = buffers
    if keep:
        kept = carray(float32_at(state + 8 * lanes), (lanes,))
        for lane in range(lanes):
            kept[lane] = _ZERO
    wide = 1 if lanes == STRIP_COLUMNS else 0
    blocks = (length + ROWS - 1) // ROWS
    chunks = (length + CHUNK_KEYS_ON_TILES - 1) // CHUNK_KEYS_ON_TILES
    tiles_of_k = (head_dim // 2 + STEPS - 1) // STEPS
    block_step = (head_dim + 1) * _BLOCK_ROW
    first = 0
    for chunk in range(chunks):
        last = blocks * (chunk + 1) // chunks
        key = first * ROWS
        count = min(last * ROWS, length) - key
        here = scores + (4 * key * lanes if keep else 0)
        _exponentials(keep, queries, keys + key * step, step, count, tiles_of_k, lanes, here, state, pairs)
        add = 0 if first == 0 else 4
        for channel in range(0, head_dim + 1, ROWS):
            both = 2 if head_dim + 1 - channel > HALF_ROWS else 0
            left = values + first * block_step + channel * _BLOCK_ROW
            target = context + 4 * channel * lanes
            context_product(add + both + wide, left, _BLOCK_ROW, block_step, pairs, 4 * lanes, last - first, target)
        first = last
    total = carray(float32_at(state + 4 * lanes), (lanes,))
    sums = carray(float32_at(context + 4 * head_dim * lanes), (lanes,))
    for lane in range(lanes):
        total[lane] = sums[lane]
