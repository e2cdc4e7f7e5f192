"""Attention of a tile of query rows over one sequence, without an array of all scores.

Queries lie along the vector's lanes: a strip of scores is (keys × queries), so that the softmax of a query is
arithmetic on its own lane, with no sum across lanes, and keys and values are used as they lie. Keys are taken in
chunks that stay in the first cache; each chunk moves the running maximum, and what was summed before is rescaled.
"""

from __future__ import annotations

import numpy as np
from numba import types

from .cache import helper, kernel
from .emitter import (
    LANES,
    TILE_COLUMNS,
    TILE_ROWS,
    VECTOR_BYTES,
    column_maximum,
    exp2_difference,
    exponentiate_columns,
    load_number,
    multiply_narrow,
    multiply_narrow_transposed,
    multiply_wide,
    multiply_wide_transposed,
    store_scaled,
    transpose_eight,
)
from .steps import REASSOCIATE

# Keys whose scores are held at a time: 16 kB of them, half of a small first cache.
CHUNK_KEYS = max(32, 16384 // (4 * TILE_COLUMNS) // TILE_ROWS * TILE_ROWS)

_ZERO = np.float32(0)
_ONE = np.float32(1)
_LOWEST = np.float32(-np.inf)


def work_size(head_dim: int) -> int:
    """Numbers that `attend` needs as `work`: queries and context of one head, and four rows of state."""
    return (2 * head_dim + 4) * TILE_COLUMNS


def strip_size(length: int, with_maps: bool) -> int:
    """Numbers that `attend` needs as `strip`: one chunk of scores, or all of them where maps are wanted."""
    return (length if with_maps else CHUNK_KEYS) * TILE_COLUMNS


def wide_size(rows: int, length: int, with_contacts: bool) -> int:
    """Numbers that `attend` needs as `wide`: sums, factors and maxima of the chunks, and strips of contacts."""
    chunks = -(-length // CHUNK_KEYS)
    strips = -(-rows // TILE_COLUMNS) * length if with_contacts else 0
    return (1 + 2 * chunks + strips) * TILE_COLUMNS


@helper
def _tile_height(rows):
    """The tallest tile that is compiled for attention and not taller than `rows`."""
    if rows >= TILE_ROWS:
        return TILE_ROWS
    height = 8 if TILE_ROWS > 8 else 4
    while height > rows:
        height //= 2
    return height


@helper
def _score_chunk(queries, keys, keys_step, count, head_dim, lanes, scores):
    """scores (count, lanes) = keys (count, C) · queries (C, lanes)"""
    done = 0
    while done < count:
        height = _tile_height(count - done)
        left, target = keys + done * keys_step, scores + 4 * done * lanes
        if lanes == TILE_COLUMNS:
            multiply_wide(height, left, keys_step, queries, head_dim, target, 4 * lanes, 0)
        else:
            multiply_narrow(height, left, keys_step, queries, head_dim, target, 4 * lanes, 0)
        done += height


@helper
def _add_context(scores, values, values_step, count, head_dim, lanes, context, add):
    """context (C, lanes) = values (count, C) transposed · scores (count, lanes), added to what is there if `add`"""
    done = 0
    while done < head_dim:
        height = _tile_height(head_dim - done)
        left, target = values + 4 * done, context + 4 * done * lanes
        if lanes == TILE_COLUMNS:
            multiply_wide_transposed(height, left, values_step, scores, count, target, 4 * lanes, add)
        else:
            multiply_narrow_transposed(height, left, values_step, scores, count, target, 4 * lanes, add)
        done += height


@helper
def _gather_queries(query, step, count, head_dim, lanes, out):
    """One head of `count` query rows (count, C), transposed, other lanes zero: -> out (C, lanes) flat"""
    if count < lanes:
        out[: head_dim * lanes] = _ZERO
    whole = count // 8 * 8 if head_dim % 8 == 0 else 0
    for lane in range(0, whole, 8):
        for channel in range(0, head_dim, 8):
            target = out.ctypes.data + 4 * (channel * lanes + lane)
            transpose_eight(query + lane * step + 4 * channel, step, target, 4 * lanes)
    for lane in range(whole, count):
        for channel in range(head_dim):
            out[channel * lanes + lane] = load_number(query + lane * step + 4 * channel)


@helper
def _scatter_context(context, total, inverse, start, count, column, head_dim, lanes, out):
    """context (C, lanes) / total (lanes,), transposed, into one head's columns of `count` rows; `inverse` is room."""
    for lane in range(lanes):
        inverse[lane] = _ONE / total[lane]
    for channel in range(head_dim):
        for at in range(0, 4 * lanes, VECTOR_BYTES):
            here = context.ctypes.data + 4 * channel * lanes + at
            store_scaled(here, inverse.ctypes.data + at, here)
    whole = count // 8 * 8 if head_dim % 8 == 0 else 0
    step = 4 * out.shape[1]
    for lane in range(0, whole, 8):
        for channel in range(0, head_dim, 8):
            source = context.ctypes.data + 4 * (channel * lanes + lane)
            target = out.ctypes.data + (start + lane) * step + 4 * (column + channel)
            transpose_eight(source, 4 * lanes, target, step)
    for lane in range(whole, count):
        row = out[start + lane]
        for channel in range(head_dim):
            row[column + channel] = context[channel * lanes + lane]


@helper
def _attend_head(queries, context, state, keys, values, step, length, head_dim, lanes, strip, maxima, keep):
    """One head for up to `lanes` queries: leaves the unnormalised context and, in `state`, each lane's sum.

    With `keep`, all exponentials stay in `strip` (L, lanes), each chunk relative to its row of `maxima`.
    """
    highest, total, before, factor = state[0], state[1], state[2], state[3]
    for lane in range(lanes):
        highest[lane], total[lane] = _LOWEST, _ZERO
    chunks = (length + CHUNK_KEYS - 1) // CHUNK_KEYS
    for chunk in range(chunks):
        first, last = length * chunk // chunks, length * (chunk + 1) // chunks
        count = last - first
        scores = strip.ctypes.data + (4 * first * lanes if keep else 0)
        _score_chunk(queries.ctypes.data, keys + first * step, step, count, head_dim, lanes, scores)
        for at in range(0, 4 * lanes, VECTOR_BYTES):
            for lane in range(at // 4, at // 4 + LANES):
                before[lane] = highest[lane]
            column_maximum(scores + at, 4 * lanes, count, highest.ctypes.data + at)
            if chunk > 0:
                fit = factor.ctypes.data + at
                exp2_difference(before.ctypes.data + at, highest.ctypes.data + at, fit)
                store_scaled(total.ctypes.data + at, fit, total.ctypes.data + at)
                for channel in range(head_dim):
                    here = context.ctypes.data + 4 * channel * lanes + at
                    store_scaled(here, fit, here)
            exponentiate_columns(scores + at, 4 * lanes, count, highest.ctypes.data + at, total.ctypes.data + at)
        if keep:
            for lane in range(lanes):
                maxima[chunk, lane] = highest[lane]
        _add_context(scores, values + first * step, step, count, head_dim, lanes, context.ctypes.data, chunk)


@helper
def _chunk_factors(maxima, state, chunks, count, lanes, factors):
    """What turns kept exponentials into attention: 2^(chunk's maximum - maximum) / sum, 0 in unused lanes."""
    for chunk in range(chunks):
        for lane in range(lanes):
            if lane < count:
                shift = maxima[chunk, lane] - np.float64(state[0, lane])
                factors[chunk, lane] = np.exp2(shift) / np.float64(state[1, lane])
            else:
                factors[chunk, lane] = 0.0


@helper(fastmath=REASSOCIATE)
def _add_summary(strip, factors, length, lanes, summary):
    """summary (L,) += attention summed over queries"""
    chunks = (length + CHUNK_KEYS - 1) // CHUNK_KEYS
    for chunk in range(chunks):
        row = factors[chunk]
        for key in range(length * chunk // chunks, length * (chunk + 1) // chunks):
            column = 0.0
            for lane in range(lanes):
                column += np.float64(strip[key * lanes + lane]) * row[lane]
            summary[key] += column


@helper
def _write_map(strip, factors, length, lanes, count, out):
    """out (count, L) = attention of the first `count` lanes"""
    chunks = (length + CHUNK_KEYS - 1) // CHUNK_KEYS
    for chunk in range(chunks):
        for lane in range(count):
            factor, row = factors[chunk, lane], out[lane]
            for key in range(length * chunk // chunks, length * (chunk + 1) // chunks):
                row[key] = np.float64(strip[key * lanes + lane]) * factor


@helper(fastmath=REASSOCIATE)
def _add_contacts(strip, factors, length, lanes, coefficient, weighted, row_sums, column_sums):
    """One head's attention on residues: weighted (L, lanes) += coefficient · it; its sums are added to the others."""
    chunks = (length + CHUNK_KEYS - 1) // CHUNK_KEYS
    for chunk in range(chunks):
        row = factors[chunk]
        first, last = length * chunk // chunks, length * (chunk + 1) // chunks
        for key in range(max(first, 1), min(last, length - 1)):
            column = 0.0
            for lane in range(lanes):
                attention = np.float64(strip[key * lanes + lane]) * row[lane]
                column += attention
                row_sums[lane] += attention
                weighted[key * lanes + lane] += coefficient * attention
            column_sums[key - 1] += column


_ROWS = types.float32[:, ::1]
_FLAT = types.float32[::1]
_INDEX = types.int64[::1]
_WIDE = types.float64[::1]
_WIDE_ROWS = types.float64[:, ::1]
_MAPS = types.float32[:, :, :]


@kernel(
    "all",
    *[types.int64] * 7,
    _ROWS,
    types.int64,
    types.int64,
    _FLAT,
    _FLAT,
    _INDEX,
    _WIDE,
    *[_WIDE_ROWS] * 3,
    _WIDE,
    _MAPS,
    types.int64,
    types.int64,
    _WIDE,
)
def attend(
    query,
    rows,
    keys,
    length,
    step,
    part_step,
    head_step,
    out,
    width,
    heads,
    strip,
    work,
    map_of_head,
    coefficients,
    weighted,
    row_sums,
    column_sums,
    summary,
    full,
    first_residue,
    last_residue,
    wide,
):
    """Attention of `rows` rows at address `query` over the `length` rows of a sequence at `keys`: -> out (R, D).

    An `out` of no rows takes nothing. Rows are as `new_qkv` lays them out: (row, part, head, channel) with the first
    three `step`, `part_step` and `head_step` bytes apart. Scores are exponents of two: log2(e) is in the queries.

    See `AttentionMaps` for the maps; `map_of_head` (H,) is the index of a head's map or -1, `column_sums` comes set to
    zero, and so does `summary` (L,); `summary` and `full` (H, rows, L) are empty if they are not wanted. `strip`,
    `work` and `wide` are room, see `strip_size` and so on.
    """
    head_dim = width // heads
    state = work[: 4 * TILE_COLUMNS].reshape(4, TILE_COLUMNS)
    queries = work[4 * TILE_COLUMNS : (4 + head_dim) * TILE_COLUMNS]
    context = work[(4 + head_dim) * TILE_COLUMNS : (4 + 2 * head_dim) * TILE_COLUMNS]
    with_summary, with_contacts, with_full = summary.shape[0] > 0, coefficients.shape[0] > 0, full.shape[0] > 0
    chunks = (length + CHUNK_KEYS - 1) // CHUNK_KEYS
    sums = wide[:TILE_COLUMNS]
    factors = wide[TILE_COLUMNS : (1 + chunks) * TILE_COLUMNS].reshape(chunks, TILE_COLUMNS)
    maxima = wide[(1 + chunks) * TILE_COLUMNS : (1 + 2 * chunks) * TILE_COLUMNS].reshape(chunks, TILE_COLUMNS)
    local = wide[(1 + 2 * chunks) * TILE_COLUMNS :]
    if with_contacts:
        local[: (rows + TILE_COLUMNS - 1) // TILE_COLUMNS * length * TILE_COLUMNS] = 0.0
    for head in range(heads):
        index = map_of_head[head]
        keep = with_summary or with_full or index >= 0
        if out.shape[0] == 0 and not keep:
            continue
        at = head * head_step
        # All queries of the tile before the next head: its keys and values are in the second cache.
        for start in range(0, rows, TILE_COLUMNS):
            count = min(TILE_COLUMNS, rows - start)
            lanes = LANES if count <= LANES else TILE_COLUMNS
            _gather_queries(query + start * step + at, step, count, head_dim, lanes, queries)
            _attend_head(
                queries,
                context,
                state,
                keys + part_step + at,
                keys + 2 * part_step + at,
                step,
                length,
                head_dim,
                lanes,
                strip,
                maxima,
                keep,
            )
            if out.shape[0] > 0:
                _scatter_context(context, state[1], state[3], start, count, head * head_dim, head_dim, lanes, out)
            if not keep:
                continue
            _chunk_factors(maxima, state, chunks, count, lanes, factors)
            if with_summary:
                _add_summary(strip, factors, length, lanes, summary)
            if with_full:
                _write_map(strip, factors, length, lanes, count, full[head, start : start + count])
            if index < 0:
                continue
            for lane in range(lanes):
                sums[lane] = 0.0
                if not first_residue <= start + lane < last_residue:
                    for chunk in range(chunks):
                        factors[chunk, lane] = 0.0
            _add_contacts(
                strip, factors, length, lanes, coefficients[index], local[start * length :], sums, column_sums[index]
            )
            for lane in range(max(0, first_residue - start), min(count, last_residue - start)):
                row_sums[index, start + lane - first_residue] = sums[lane]
    if not with_contacts:
        return
    for start in range(0, rows, TILE_COLUMNS):
        count = min(TILE_COLUMNS, rows - start)
        lanes = LANES if count <= LANES else TILE_COLUMNS
        for lane in range(max(0, first_residue - start), min(count, last_residue - start)):
            row = weighted[start + lane - first_residue]
            for key in range(1, length - 1):
                row[key - 1] += local[start * length + key * lanes + lane]
