"""The layers of a pass over blocks of rows, in one compiled call a thread.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1, while the rows are in its cache. Attention reads keys and values of the whole
sequence, so no thread begins a layer before all blocks of the one before are done; query/key/value have two buffers
that take turns. A thread takes whichever block is next: one that wakes up late, or never, holds nobody up.

Where each thread would have few rows, threads take shares of every product instead, and go from step to step together:
a weight is then read once, not once a thread.
"""

from __future__ import annotations

import os

import numpy as np
from numba import types

from ..compiled.layout import SHORT, Maps, Model, Pass, Room, Steps
from .cache import helper, kernel
from .layer import project_and_feed_forward, project_qkv
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
def _attend_pieces(run, model, room, source, first_row, pieces, last_piece, context):
    """Attention of one block's pieces into `context`; whether anything but maps is wanted."""
    rows, head_dim = load_integer(run, Pass.ROWS), load_integer(model, Model.HEAD_DIM)
    row_bytes = 4 * head_dim
    out_step = load_integer(model, Model.HEADS) * row_bytes
    wanted = True
    for index in range(pieces, last_piece):
        piece = carray(int64_at(load_integer(run, Pass.PIECE_TABLE) + 32 * index), (4,))
        start, stop, first, last = piece[0], piece[1], piece[2], piece[3]
        maps = load_integer(run, Pass.MAPS)
        if maps != 0:
            maps += 8 * Maps.ENTRIES * index
            wanted = load_integer(maps, Maps.ONLY) == 0
        queries, count = source + start * row_bytes, stop - start
        keys, length = source + first * row_bytes, last - first
        attend = load_integer(model, Model.ATTEND if length > SHORT else Model.ATTEND_SHORT)
        out = context + (start - first_row) * out_step
        call_kernel(attend, (model, room, queries, count, keys, length, rows, out, maps))
    return wanted


@helper
def _run_part(run, model, room, phase, steps, part, shares):
    """Some steps of a phase for block `part` or, if there are `shares`, that share of the products of all rows.

    Phase 0 is the embedding, phase n layer n - 1; both with query, key and value of layer n.
    """
    width, layer = load_integer(model, Model.WIDTH), phase - 1
    row_bytes = 4 * load_integer(model, Model.HEADS) * load_integer(model, Model.HEAD_DIM)
    first, last, share = 0, load_integer(run, Pass.ROWS), part
    context, hidden = load_integer(run, Pass.CONTEXT), load_integer(run, Pass.HIDDEN)
    if steps & Steps.ATTEND:
        span = carray(int64_at(load_integer(run, Pass.BLOCK_TABLE) + 32 * part), (4,))
        first, last = span[0], span[1]
        context = load_integer(room, Room.CONTEXT) if shares == 0 else context + first * row_bytes
        if phase == 0:
            _embed(run, model, first, last, width)
        else:
            source = load_integer(run, Pass.QKV if layer % 2 == 0 else Pass.QKV_ODD)
            if not _attend_pieces(run, model, room, source, first, span[2], span[3], context):
                return
    if shares == 0:
        hidden, share, shares = 0, 0, 1
    if phase > 0 and steps & (Steps.OUT_PROJ + Steps.FC1 + Steps.FC2):
        project_and_feed_forward(run, model, room, layer, first, last, context, hidden, steps, share, shares)
    if steps & Steps.QKV:
        if phase == load_integer(run, Pass.NORM_AFTER):
            layer_norm, norm = load_integer(model, Model.LAYER_NORM), model + 8 * Model.FINAL_NORM
            start, stop = (last - first) * share // shares, (last - first) * (share + 1) // shares
            x = load_integer(run, Pass.X) + 4 * width * (first + start)
            call_kernel(layer_norm, (0, x, stop - start, width, norm, x, 4 * width, 0, 0))
        if phase < load_integer(run, Pass.LAST):
            project_qkv(run, model, room, phase, first, last, share, shares)


@kernel
def run_phases(run, model, room, start, stop):
    """Phases `start` to `stop` of a pass, together with the other threads that are given them.

    `run`, `model` and `room` are tables of layout.py, `room` the calling thread's own.
    """
    blocks, shares = load_integer(run, Pass.BLOCKS), load_integer(run, Pass.SHARES)
    stopped = load_integer(run, Pass.STOP)
    for phase in range(start, stop):
        for number in range(Steps.COUNT if shares > 0 else 1):
            steps = 1 << number if shares > 0 else Steps.ALL
            parts = blocks if steps & Steps.ATTEND else shares
            taken = load_integer(run, Pass.COUNTERS) + 128 * (Steps.COUNT * phase + number)
            done = taken + 64  # on a line of its own
            while load_shared(stopped) == 0:
                part = take_ticket(taken)
                if part >= parts:
                    break
                _run_part(run, model, room, phase, steps, part, shares)
                take_ticket(done)
            _wait(done, parts, stopped)
