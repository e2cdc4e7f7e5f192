"""Attention of a run of query rows over one sequence, without an array of all scores.

Queries lie along the vector's lanes: a strip of scores is (keys × queries), so that the softmax of a query is
arithmetic on its own lane, with no sum across lanes, and keys and values are used as they lie. Keys are taken in
chunks that stay in the L1 cache.

Softmax does not change when all scores of a query move by the same amount. Moving by their maximum keeps exponentials
in range, at the price of a pass over all keys; so they are taken as they are first, and only the lanes whose sum left
the safe range are computed again, moved by their maximum.
"""

from __future__ import annotations

import numpy as np

from ..compiled.isa import HALF_ROWS, ROWS
from ..compiled.layout import Maps, Model, Room
from ..compiled.panels import chunk_keys
from .attention_tiles import fill_queries, second_rows, strip_on_tiles, transpose_values
from .cache import helper, kernel
from .emitter import (
    ISA,
    LANES,
    STRIP_COLUMNS,
    STRIP_ROWS,
    VECTOR_BYTES,
    context_bf16,
    context_fp32,
    scores_bf16,
    scores_fp32,
)
from .rows import contact_row, minus_mean, weighted_sum
from .steps import narrow_rows, row_bytes
from .tiles import configure_tiles, release_tiles
from .vectors import (
    PIECE,
    carray,
    column_maximum,
    exponentials,
    exponentials_bf16,
    fetch,
    float32_at,
    float64_at,
    int64_at,
    load_integer,
    load_number,
    store_number,
    store_piece_bf16,
    store_scaled,
    transpose_eight,
    uint16_at,
    uint32_at,
)

_TILES = ISA.tiles

CHUNK_KEYS = chunk_keys(ISA)

# Sums of exponentials outside this range are computed again: below it some of their terms may have vanished.
_SAFE_LOWEST, _SAFE_HIGHEST = np.float32(2.0**-60), np.float32(2.0**100)

_ZERO = np.float32(0)
_ONE = np.float32(1)
_LOWEST = np.float32(-np.inf)


# -- products of one strip ------------------------------------------------------------------------------------------


@helper
def _tile_height(rows):
    """The tallest tile that is compiled for attention and not taller than `rows`."""
    if rows >= STRIP_ROWS:
        return STRIP_ROWS
    height = 8 if STRIP_ROWS > 8 else 4
    while height > rows:
        height //= 2
    return height


@helper
def _scores(narrow, queries, keys, step, count, head_dim, lanes, scores):
    """scores (count, lanes) = keys (count, C) · queries (C, lanes)"""
    done = 0
    while done < count:
        height = _tile_height(count - done)
        left, target = keys + done * step, scores + 4 * done * lanes
        if narrow:
            scores_bf16(height, lanes, left, step, queries, head_dim // 2, target)
        else:
            scores_fp32(height, lanes, left, step, queries, head_dim, target)
        done += height


@helper
def _move(scores, count, lanes, shift):
    """scores (count, lanes) += shift (lanes,)"""
    move, rows = carray(float32_at(shift), (lanes,)), carray(float32_at(scores), (count, lanes))
    for key in range(count):
        for lane in range(lanes):
            rows[key, lane] += move[lane]


@helper
def _maxima(narrow, queries, keys, step, length, head_dim, lanes, scores, state):
    """Set row 0 of `state` to minus each query's largest score over all keys; row 2 is room."""
    highest = state + 8 * lanes
    best, shift = carray(float32_at(highest), (lanes,)), carray(float32_at(state), (lanes,))
    for lane in range(lanes):
        best[lane] = _LOWEST
    for first in range(0, length, CHUNK_KEYS):
        count = min(CHUNK_KEYS, length - first)
        _scores(narrow, queries, keys + first * step, step, count, head_dim, lanes, scores)
        for at in range(0, 4 * lanes, VECTOR_BYTES):
            column_maximum(scores + at, 4 * lanes, count, highest + at)
    for lane in range(lanes):
        shift[lane] = -best[lane]


@helper
def _add_context(narrow, scores, values, step, count, head_dim, lanes, context, add):
    """context (C, lanes) = values (count, C) transposed · scores (count, lanes), added to what is there if `add`.

    bf16 takes neighbours of count in pairs, `count` of them.
    """
    done = 0
    while done < head_dim:
        height = _tile_height(head_dim - done)
        left, target = values + 4 * done, context + 4 * done * lanes
        if narrow:
            context_bf16(height, lanes, left, step, scores, count, target, add)
        else:
            context_fp32(height, lanes, left, step, scores, count, target, add)
        done += height


# -- in and out of strips -------------------------------------------------------------------------------------------


@helper
def _narrow(source, count, out):
    """`count` numbers that follow each other, rounded to bf16."""
    narrow_rows(source, 1, count, out, 2 * count, 0, 0)


@helper
def _narrow_keys(keys, length, head_dim, shift, out, out_step):
    """out = keys less their mean, rounded to bf16: (L, C) float32 -> (L, C); `shift` (C,) becomes minus the mean."""
    step = 4 * head_dim
    for channel in range(0, head_dim, PIECE):
        at = 4 * channel
        minus_mean(keys + at, step, length, shift + at)
        for key in range(length):
            store_piece_bf16(keys + key * step + at, shift + at, out + key * out_step + at // 2)


@helper
def _narrow_head(queries, rows, keys, values, length, head_dim, key_step, room):
    """One head's queries, keys less their mean, and values, as bf16 in this thread's buffers."""
    narrow_keys = load_integer(room, Room.NARROW_KEYS)
    _narrow(queries, rows * head_dim, load_integer(room, Room.NARROW_QUERIES))
    _narrow_keys(keys, length, head_dim, load_integer(room, Room.SHIFT), narrow_keys, key_step)
    _narrow(values, length * head_dim, load_integer(room, Room.NARROW_VALUES))
    if _TILES:  # they read behind the last key
        rest = carray(uint16_at(narrow_keys + length * key_step), (ROWS * key_step // 2,))
        rest[:] = np.uint16(0)


@helper
def _gather_queries(query, step, count, items, lanes, out):
    """One head of `count` query rows, `items` numbers of four bytes each: -> (items, lanes), other lanes zero."""
    if count < lanes:
        every = carray(float32_at(out), (items * lanes,))
        every[:] = _ZERO
    whole = count // 8 * 8 if items >= 8 else 0
    for lane in range(0, whole, 8):
        for start in range(0, items, 8):
            item = min(start, items - 8)  # the last eight may overlap those before
            transpose_eight(query + lane * step + 4 * item, step, out + 4 * (item * lanes + lane), 4 * lanes)
    for lane in range(whole, count):
        for item in range(items):
            store_number(load_number(query + lane * step + 4 * item), out + 4 * (item * lanes + lane))


@helper
def _scatter_context(context, total, inverse, count, head_dim, lanes, out, step):
    """context (C, lanes) / total (lanes,), transposed, into one head's columns of `count` rows; `inverse` is room."""
    sums, factors = carray(float32_at(total), (lanes,)), carray(float32_at(inverse), (lanes,))
    for lane in range(lanes):
        factors[lane] = _ONE / sums[lane]
    for channel in range(head_dim):
        for at in range(0, 4 * lanes, VECTOR_BYTES):
            here = context + 4 * channel * lanes + at
            store_scaled(here, inverse + at, here)
    whole = count // 8 * 8
    for lane in range(0, whole, 8):
        for channel in range(0, head_dim, 8):
            transpose_eight(context + 4 * (channel * lanes + lane), 4 * lanes, out + lane * step + 4 * channel, step)
    for lane in range(whole, count):
        for channel in range(head_dim):
            store_number(load_number(context + 4 * (channel * lanes + lane)), out + lane * step + 4 * channel)


@helper
def _pair_values(values, length, head_dim, out):
    """Neighbouring rows of bf16 side by side: (L, C) -> (L / 2, C) pairs, the last one filled up with zeros."""
    for pair in range(length // 2):
        low = carray(uint16_at(values + 4 * pair * head_dim), (head_dim,))
        high = carray(uint16_at(values + (4 * pair + 2) * head_dim), (head_dim,))
        target = carray(uint32_at(out + 4 * pair * head_dim), (head_dim,))
        for channel in range(head_dim):
            target[channel] = np.uint32(low[channel]) | (np.uint32(high[channel]) << np.uint32(16))
    if length % 2:
        low = carray(uint16_at(values + 2 * (length - 1) * head_dim), (head_dim,))
        target = carray(uint32_at(out + 2 * (length - 1) * head_dim), (head_dim,))
        for channel in range(head_dim):
            target[channel] = np.uint32(low[channel])


@helper
def _strip(narrow, keep, move, queries, keys, values, step, length, head_dim, lanes, buffers):
    """One head for up to `lanes` queries: leaves the unnormalised context and, in row 1 of `state`, each lane's sum.

    `buffers` are scores, pairs, state and context. With `move`, row 0 of `state` is added to scores. With `keep`, all
    exponentials stay in `scores` (L, lanes). A chunk is summed by itself, in row 2: the rounding of one long sum would
    scale the whole context.
    """
    scores, pairs, state, context = buffers
    shift, total, part = state, state + 4 * lanes, state + 8 * lanes
    sums, parts = carray(float32_at(total), (lanes,)), carray(float32_at(part), (lanes,))
    for lane in range(lanes):
        sums[lane] = _ZERO
    for first in range(0, length, CHUNK_KEYS):
        count = min(CHUNK_KEYS, length - first)
        chunk = scores + (4 * first * lanes if keep else 0)
        for lane in range(lanes):
            parts[lane] = _ZERO
        _scores(narrow, queries, keys + first * step, step, count, head_dim, lanes, chunk)
        if move:
            _move(chunk, count, lanes, shift)
        if narrow:
            exponentials_bf16(lanes, count, chunk, part, pairs, 1 if keep else 0)
            here, count = values + 2 * first * head_dim, (count + 1) // 2
            _add_context(narrow, pairs, here, 4 * head_dim, count, head_dim, lanes, context, first)
        else:
            exponentials(lanes, count, chunk, part)
            _add_context(narrow, chunk, values + first * step, step, count, head_dim, lanes, context, first)
        for lane in range(lanes):
            sums[lane] += parts[lane]


@helper
def _safe(total, count):
    """Whether the sums of all `count` lanes are in the safe range; NaN is not."""
    sums = carray(float32_at(total), (count,))
    safe = True
    for lane in range(count):
        safe = safe and _SAFE_LOWEST < sums[lane] < _SAFE_HIGHEST
    return safe


@helper
def _restore_safe_lanes(kept, state, context, head_dim, lanes):
    """Put back context and sum of the lanes that were in the safe range: they must not depend on their neighbours."""
    sums, before = carray(float32_at(state + 4 * lanes), (lanes,)), carray(float32_at(kept), (1 + head_dim, lanes))
    rows = carray(float32_at(context), (head_dim, lanes))
    for lane in range(lanes):
        if _SAFE_LOWEST < before[0, lane] < _SAFE_HIGHEST:
            sums[lane] = before[0, lane]
            for channel in range(head_dim):
                rows[channel, lane] = before[1 + channel, lane]


@helper
def _keep(kept, state, context, head_dim, lanes):
    """Copy sums and context."""
    sums, rows = carray(float32_at(state + 4 * lanes), (lanes,)), carray(float32_at(context), (head_dim * lanes,))
    target = carray(float32_at(kept), ((1 + head_dim) * lanes,))
    # Number by number: Numba's assignment of arrays can raise, and would need Python for it.
    for lane in range(lanes):
        target[lane] = sums[lane]
    for i in range(head_dim * lanes):
        target[lanes + i] = rows[i]


# -- maps -----------------------------------------------------------------------------------------------------------


@helper
def _add_summary(scores, factors, length, lanes, summary):
    """summary (L,) += attention summed over queries: exponentials (L, lanes) times factors (lanes,) float64"""
    factor, sums = carray(float64_at(factors), (lanes,)), carray(float64_at(summary), (length,))
    eights = lanes // 8
    for key in range(length):
        row = carray(float32_at(scores + 4 * key * lanes), (lanes,))
        column = weighted_sum(scores + 4 * key * lanes, factors, eights)
        for lane in range(8 * eights, lanes):
            column += np.float64(row[lane]) * factor[lane]
        sums[key] += column


@helper
def _write_map(scores, factors, length, lanes, count, out, step):
    """out (count, L) = attention of the first `count` lanes; its rows are `step` bytes apart."""
    factor = carray(float64_at(factors), (lanes,))
    strip = carray(float32_at(scores), (length, lanes))
    for lane in range(count):
        row = carray(float32_at(out + lane * step), (length,))
        for key in range(length):
            row[key] = np.float64(strip[key, lane]) * factor[lane]


@helper
def _add_contacts(scores, factors, length, lanes, first, last, coefficient, weighted, step, row_sums, column_sums):
    """One head's attention on residues, of the lanes from `first` to `last`.

    weighted (L - 2, lanes) += coefficient · it, where lanes are neighbours and rows `step` bytes apart; row_sums is set
    to its sum over keys (lanes,), and its sum over lanes is added to column_sums (L - 2,).
    """
    # All arrays begin at the first lane: Numba would look whether `lane - first` counts from the end.
    count = last - first
    factor, sums = carray(float64_at(factors + 8 * first), (count,)), carray(float64_at(row_sums), (count,))
    columns = carray(float64_at(column_sums), (length - 2,))
    for lane in range(count):
        sums[lane] = 0.0
    eights = count // 8
    for key in range(1, length - 1):
        at, to = scores + 4 * (key * lanes + first), weighted + (key - 1) * step
        column = contact_row(at, factors + 8 * first, eights, coefficient, row_sums, to)
        row, target = carray(float32_at(at), (count,)), carray(float64_at(to), (count,))
        for lane in range(8 * eights, count):
            attention = np.float64(row[lane]) * factor[lane]
            column += attention
            sums[lane] += attention
            target[lane] += coefficient * attention
        columns[key - 1] += column


@helper
def _leave_maps(maps, head, index, scores, total, start, count, length, lanes, factors):
    """Add one head's strip to the summary and, if its `index` is not negative, to the contacts; or leave it whole."""
    factor, totals = carray(float64_at(factors), (lanes,)), carray(float32_at(total), (lanes,))
    for lane in range(lanes):
        factor[lane] = 1.0 / np.float64(totals[lane]) if lane < count else 0.0
    if load_integer(maps, Maps.SUMMARY) != 0:
        _add_summary(scores, factors, length, lanes, load_integer(maps, Maps.SUMMARY))
    if load_integer(maps, Maps.FULL) != 0:
        step = load_integer(maps, Maps.FULL_ROW_STEP)
        out = load_integer(maps, Maps.FULL) + head * load_integer(maps, Maps.FULL_HEAD_STEP) + start * step
        _write_map(scores, factors, length, lanes, count, out, step)
    if index < 0:
        return
    first_residue = load_integer(maps, Maps.FIRST_RESIDUE)
    first, last = max(0, first_residue - start), min(count, load_integer(maps, Maps.LAST_RESIDUE) - start)
    if first >= last:
        return
    residue = start + first - first_residue
    _add_contacts(
        scores,
        factors,
        length,
        lanes,
        first,
        last,
        carray(float64_at(load_integer(maps, Maps.COEFFICIENTS)), (index + 1,))[index],
        load_integer(maps, Maps.WEIGHTED) + 8 * residue,
        load_integer(maps, Maps.WEIGHTED_STEP),
        load_integer(maps, Maps.ROW_SUMS) + index * load_integer(maps, Maps.ROW_SUMS_STEP) + 8 * residue,
        load_integer(maps, Maps.COLUMN_SUMS) + index * load_integer(maps, Maps.COLUMN_SUMS_STEP),
    )


@helper
def _attend(narrow, model, room, queries, rows, keys, length, steps, heads, out, maps):
    """See `attend`."""
    all_heads, head_dim = load_integer(model, Model.HEADS), load_integer(model, Model.HEAD_DIM)
    step, out_step = (2 if narrow else 4) * head_dim, 4 * all_heads * head_dim
    key_step = row_bytes(narrow, head_dim)
    (head_step, part_step), (first_head, last_head) = steps, heads
    items = head_dim // 2 if narrow else head_dim
    strip, value_pairs = load_integer(room, Room.QUERIES), load_integer(room, Room.VALUES)
    scores, pairs = load_integer(room, Room.SCORES), load_integer(room, Room.PAIRS)
    state, context = load_integer(room, Room.STATE), load_integer(room, Room.STRIP_CONTEXT)
    kept, factors = load_integer(room, Room.KEPT), load_integer(room, Room.FACTORS)
    buffers = scores, pairs, state, context
    with_contacts = with_others = maps_only = False
    if maps != 0:
        with_contacts = load_integer(maps, Maps.MAP_OF_HEAD) != 0
        with_others = load_integer(maps, Maps.SUMMARY) != 0 or load_integer(maps, Maps.FULL) != 0
        maps_only = load_integer(maps, Maps.ONLY) != 0
    if narrow and _TILES:
        configure_tiles(HALF_ROWS, second_rows(head_dim))
    for head in range(first_head, last_head):
        index = -1
        if with_contacts:
            index = carray(int64_at(load_integer(maps, Maps.MAP_OF_HEAD)), (all_heads,))[head]
        keep = with_others or index >= 0
        if maps_only and not keep:
            continue
        at = head * head_step
        head_queries, head_keys, values = queries + at, keys + part_step + at, keys + 2 * part_step + at
        if narrow:
            _narrow_head(head_queries, rows, head_keys, values, length, head_dim, key_step, room)
            head_queries, head_keys = load_integer(room, Room.NARROW_QUERIES), load_integer(room, Room.NARROW_KEYS)
            values = load_integer(room, Room.NARROW_VALUES)
            if _TILES:
                transpose_values(values, length, head_dim, scores, value_pairs)
            else:
                _pair_values(values, length, head_dim, value_pairs)
            values = value_pairs
        # All queries before the next head: its keys and values are in the L2 cache.
        for start in range(0, rows, STRIP_COLUMNS):
            count = min(STRIP_COLUMNS, rows - start)
            lanes = LANES if count <= LANES else STRIP_COLUMNS
            if head + 1 < last_head:
                # The next head comes nearer meanwhile, a part of it with every strip.
                part, end = length * start // rows * 4 * head_dim, length * (start + count) // rows * 4 * head_dim
                fetch(queries + at + head_step + start * 4 * head_dim, count * 4 * head_dim)
                fetch(keys + part_step + at + head_step + part, end - part)
                fetch(keys + 2 * part_step + at + head_step + part, end - part)
            _gather_queries(head_queries + start * step, step, count, items, lanes, strip)
            if narrow and _TILES:
                fill_queries(items, lanes, strip)
            shift = carray(float32_at(state), (lanes,))
            for lane in range(lanes):
                shift[lane] = _ZERO
            again = False
            while True:
                if narrow and _TILES:
                    strip_on_tiles(keep, strip, head_keys, values, key_step, length, head_dim, lanes, buffers)
                else:
                    _strip(narrow, keep, again, strip, head_keys, values, step, length, head_dim, lanes, buffers)
                if again or _safe(state + 4 * lanes, count):
                    break
                _keep(kept, state, context, head_dim, lanes)
                _maxima(narrow, strip, head_keys, key_step, length, head_dim, lanes, scores, state)
                again = True
            if keep:
                total = state + (8 if narrow and _TILES else 4) * lanes
                _leave_maps(maps, head, index, scores, total, start, count, length, lanes, factors)
            if maps_only:
                continue
            if again:
                _restore_safe_lanes(kept, state, context, head_dim, lanes)
            target = out + start * out_step + 4 * head * head_dim
            _scatter_context(context, state + 4 * lanes, state + 8 * lanes, count, head_dim, lanes, target, out_step)
    if narrow and _TILES:
        release_tiles()


@kernel
def attend(model, room, queries, rows, keys, length, head_step, part_step, first_head, last_head, out, maps):
    """Attention of `rows` rows over the `length` rows of their sequence: -> out (rows, all heads) float32.

    Of the heads from `first_head` to `last_head`. `queries` and `keys` are where those rows of query head 0 lie, or
    would lie, among what `gemm.linear` has left with the same `head_step` and `part_step`. Scores are exponents of two:
    log2(e) is in the queries. `maps` is a table of `layout.Maps` or 0; sums of columns and the summary come set to
    zero.
    """
    steps, heads = (head_step, part_step), (first_head, last_head)
    _attend(False, model, room, queries, rows, keys, length, steps, heads, out, maps)


@kernel
def attend_bf16(model, room, queries, rows, keys, length, head_step, part_step, first_head, last_head, out, maps):
    """`attend` with products in bf16, summed in float32."""
    steps, heads = (head_step, part_step), (first_head, last_head)
    _attend(True, model, room, queries, rows, keys, length, steps, heads, out, maps)
