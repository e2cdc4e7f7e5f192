"""The layers of a pass over blocks of rows, in one compiled call a thread.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1, while the rows are in its cache. Attention reads keys and values of the whole
sequence, so no thread begins a layer before all blocks of the one before are done; query/key/value have two buffers
that take turns. A thread takes whichever block is next: one that wakes up late, or never, holds nobody up.

Where blocks are whole sequences (`Pass.APART`), a thread takes each through all layers instead, and computes queries,
keys and values for the attention of some heads at a time, which the L2 cache holds.

Where each thread would have few rows, threads take shares of every product instead, and go from step to step together:
a weight is then read once, not once a thread.
"""

from __future__ import annotations

import os

import numpy as np
from numba import types

from ..compiled.layout import SHORT, Maps, Model, Pass, Room, Steps
from .cache import helper, kernel
from .layer import (
    group_of_rows,
    groups_of_rows,
    normalise_rows,
    project_and_feed_forward,
    project_heads,
    project_qkv,
)
from .vectors import call_kernel, carray, float32_at, int64_at, load_integer, load_shared, pause, take_ticket, uint8_at

# Looks at the counter before a waiting thread lets others run: about 0.1 ms; and before it sleeps between looks.
_SPINS, _YIELDS = 2000, 2000
_SLEEP_MICROSECONDS = 100

_POSIX = os.name == "posix"
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@helper
def _wait(counter, count, stop):
    """Until `count` blocks are done, or the pass is given up."""
    spins = 0
    while load_shared(counter) < count and load_shared(stop) == 0:
        spins += 1
        if not _POSIX or spins < _SPINS:
            pause()
        elif spins < _SPINS + _YIELDS:
            _sched_yield()
        else:
            _usleep(np.uint32(_SLEEP_MICROSECONDS))


@helper
def _embed(run, model, first, last, width):
    """Rows of the embedding times their scale."""
    tokens = carray(uint8_at(load_integer(run, Pass.TOKENS) + first), (last - first,))
    scales = carray(float32_at(load_integer(run, Pass.TOKEN_SCALE) + 4 * first), (last - first,))
    embedding = load_integer(model, Model.EMBEDDING)
    for i in range(last - first):
        source = carray(float32_at(embedding + 4 * width * np.int64(tokens[i])), (width,))
        target = carray(float32_at(load_integer(run, Pass.X) + 4 * width * (first + i)), (width,))
        for j in range(width):
            target[j] = source[j] * scales[i]


@helper
def _piece(run, index):
    """First and last row of a piece, first and last row of its sequence."""
    piece = carray(int64_at(load_integer(run, Pass.PIECE_TABLE) + 32 * index), (4,))
    return piece[0], piece[1], piece[2], piece[3]


@helper
def _run_of_pieces(run, piece, last_piece):
    """Pieces from this one on that follow each other: -> their first row, their last row, the piece behind them."""
    start, stop, _, _ = _piece(run, piece)
    piece += 1
    while piece < last_piece and _piece(run, piece)[0] == stop:
        _, stop, _, _ = _piece(run, piece)
        piece += 1
    return start, stop, piece


@helper
def _attend(run, model, room, source, steps, heads, first_row, pieces, last_piece, context):
    """Attention of one block's pieces into `context`, for the first to the last of `heads`: whether it is wanted.

    `source` is where row 0 of query head 0 would lie; `steps` are those of `project_heads`.
    """
    row_bytes = 4 * load_integer(model, Model.HEAD_DIM)
    out_step = load_integer(model, Model.HEADS) * row_bytes
    wanted = True
    for index in range(pieces, last_piece):
        start, stop, first, last = _piece(run, index)
        maps = load_integer(run, Pass.MAPS)
        if maps != 0:
            maps += 8 * Maps.ENTRIES * index
            wanted = load_integer(maps, Maps.ONLY) == 0
        queries, keys, length = source + start * row_bytes, source + first * row_bytes, last - first
        attend = load_integer(model, Model.ATTEND if length > SHORT else Model.ATTEND_SHORT)
        to = *steps, *heads, context + (start - first_row) * out_step, maps
        call_kernel(attend, (model, room, queries, stop - start, keys, length, *to))
    return wanted


@helper
def _attend_rows(run, model, room, layer, first, pieces, last_piece, context):
    """`_attend` of all heads to what `project_qkv` has left for the rows of all blocks."""
    heads = load_integer(model, Model.HEADS)
    source = load_integer(run, Pass.QKV if layer % 2 == 0 else Pass.QKV_ODD)
    head_step = 4 * load_integer(model, Model.HEAD_DIM) * load_integer(run, Pass.ROWS)
    every, steps = (0, heads), (head_step, heads * head_step)
    return _attend(run, model, room, source, steps, every, first, pieces, last_piece, context)


@helper
def _attend_apart(run, model, room, layer, first, last, pieces, last_piece, context):
    """Queries, keys, values and attention of a block of whole sequences.

    Some heads at a time, so that they stay in the L2 cache.
    """
    heads, at_a_time = load_integer(model, Model.HEADS), load_integer(model, Model.HEADS_AT_A_TIME)
    row_bytes = 4 * load_integer(model, Model.HEAD_DIM)
    head_step = (last - first) * row_bytes
    steps = head_step, at_a_time * head_step
    left, left_step, _, low, short = normalise_rows(run, model, room, layer, first, last - first)
    groups = groups_of_rows(model, last - first)
    for head in range(0, heads, at_a_time):
        out = load_integer(room, Room.QKV) - head * head_step - first * row_bytes
        for group in range(groups):
            start, count = group_of_rows(first, last, group, groups)
            lines = left + (start - first) * left_step, left_step, count, low, short + 8 * (start - first)
            some = head, at_a_time
            project_heads(run, model, room, layer, lines, start, some, out, steps, 0, 1)
        some = head, head + at_a_time
        _attend(run, model, room, out, steps, some, first, pieces, last_piece, context)


@helper
def _run_part(run, model, room, phase, steps, part, shares):
    """Some steps of a phase for block `part` or, if there are `shares`, that share of the products of all rows.

    Phase 0 is the embedding, phase n layer n - 1; both with query, key and value of layer n, but for blocks apart.
    """
    width, layer, apart = load_integer(model, Model.WIDTH), phase - 1, load_integer(run, Pass.APART) != 0
    row_bytes = 4 * load_integer(model, Model.HEADS) * load_integer(model, Model.HEAD_DIM)
    first, last, share = 0, load_integer(run, Pass.ROWS), part
    pieces = last_piece = 0
    context, hidden = load_integer(run, Pass.CONTEXT), load_integer(run, Pass.HIDDEN)
    if steps & Steps.ATTEND:
        span = carray(int64_at(load_integer(run, Pass.BLOCK_TABLE) + 32 * part), (4,))
        first, last, pieces, last_piece = span[0], span[1], span[2], span[3]
        context = load_integer(room, Room.CONTEXT) if shares == 0 else context + first * row_bytes
        if phase == 0:
            _embed(run, model, first, last, width)
        elif apart:
            _attend_apart(run, model, room, layer, first, last, pieces, last_piece, context)
        elif not _attend_rows(run, model, room, layer, first, pieces, last_piece, context):
            return
    if shares == 0:
        hidden, share, shares = 0, 0, 1
    working = phase > 0 and steps & (Steps.OUT_PROJ + Steps.FC1 + Steps.FC2)
    while working:
        start, stop = first, last
        if pieces < last_piece:  # those of a block may have gaps in the last layer
            start, stop, pieces = _run_of_pieces(run, pieces, last_piece)
        attended = context + (start - first) * row_bytes
        project_and_feed_forward(run, model, room, layer, start, stop, attended, hidden, steps, share, shares)
        working = pieces < last_piece
    if steps & Steps.QKV:
        if phase == load_integer(run, Pass.NORM_AFTER):
            layer_norm, norm = load_integer(model, Model.LAYER_NORM), model + 8 * Model.FINAL_NORM
            start, stop = (last - first) * share // shares, (last - first) * (share + 1) // shares
            x = load_integer(run, Pass.X) + 4 * width * (first + start)
            call_kernel(layer_norm, (0, x, stop - start, width, norm, x, 4 * width, 0, 0))
        if phase < load_integer(run, Pass.LAST) and not apart:
            project_qkv(run, model, room, phase, first, last, share, shares)


@kernel
def run_phases(run, model, room, start, stop):
    """Phases `start` to `stop` of a pass, together with the other threads that are given them.

    `run`, `model` and `room` are tables of layout.py, `room` the calling thread's own.
    """
    blocks, shares = load_integer(run, Pass.BLOCKS), load_integer(run, Pass.SHARES)
    stopped = load_integer(run, Pass.STOP)
    at_a_time = 1 if load_integer(run, Pass.APART) == 0 else stop - start
    for first in range(start, stop, at_a_time):
        for number in range(Steps.COUNT if shares > 0 else 1):
            steps = 1 << number if shares > 0 else Steps.ALL
            parts = blocks if steps & Steps.ATTEND else shares
            taken = load_integer(run, Pass.COUNTERS) + 128 * (Steps.COUNT * first + number)
            done = taken + 64  # on a line of its own
            while load_shared(stopped) == 0:
                part = take_ticket(taken)
                if part >= parts:
                    break
                for phase in range(first, first + at_a_time):
                    if load_shared(stopped) == 0:
                        _run_part(run, model, room, phase, steps, part, shares)
                take_ticket(done)
            _wait(done, parts, stopped)
