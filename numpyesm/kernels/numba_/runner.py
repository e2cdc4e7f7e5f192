"""The layers of a pass over blocks of rows, in one compiled call a thread.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1, while the rows are in its cache. Attention reads keys and values of the whole
sequence, so no thread begins a layer before all blocks of the one before are done; query/key/value have two buffers
that take turns. A thread takes whichever block is next: one that wakes up late, or never, holds nobody up.
"""

from __future__ import annotations

import os

import numpy as np
from numba import types

from ..compiled.layout import Layer, Maps, Model, Pass, Room
from .cache import helper, kernel
from .steps import layer_norm
from .vectors import call_kernel, carray, float32_at, int64_at, load_integer, load_shared, pause, take_ticket, uint8_at

# Looks at the counter before a waiting thread lets others run: about 0.1 ms; and before it sleeps between looks.
_SPINS, _YIELDS = 2000, 2000
_SLEEP_MICROSECONDS = 100

_POSIX = os.name == "posix"
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))

_EMBEDDING, _FINAL_GAIN, _FINAL_SHIFT = int(Model.EMBEDDING), int(Model.FINAL_GAIN), int(Model.FINAL_SHIFT)
_CONTEXT, _LAYER_BYTES, _MAPS_BYTES = int(Room.CONTEXT), 8 * int(Layer.ENTRIES), 8 * int(Maps.ENTRIES)
_MAPS_ONLY = int(Maps.ONLY)
_WIDTH, _HEADS, _HEAD_DIM = int(Model.WIDTH), int(Model.HEADS), int(Model.HEAD_DIM)
(
    _ROWS,
    _BLOCKS,
    _BLOCK_TABLE,
    _PIECE_TABLE,
    _POSITIONS,
    _TOKENS,
    _TOKEN_SCALE,
    _X,
    _QKV,
    _QKV_ODD,
    _LAYERS,
    _COUNTERS,
    _STOP,
    _LAST,
    _NORM_AFTER,
    _MAPS,
    _QKV_STEP,
    _ATTEND,
    _REST,
    _SHORT_ROWS,
) = (int(entry) for entry in list(Pass)[:-1])


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
    tokens = carray(uint8_at(load_integer(run, _TOKENS) + first), (last - first,))
    scales = carray(float32_at(load_integer(run, _TOKEN_SCALE) + 4 * first), (last - first,))
    embedding = load_integer(model, _EMBEDDING)
    for i in range(last - first):
        source = carray(float32_at(embedding + 4 * width * np.int64(tokens[i])), (width,))
        target = carray(float32_at(load_integer(run, _X) + 4 * width * (first + i)), (width,))
        for j in range(width):
            target[j] = source[j] * scales[i]


@helper
def _attend_pieces(run, model, room, source, first_row, pieces, last_piece):
    """Attention of one block's pieces into `Room.CONTEXT`; whether anything but maps is wanted."""
    rows, head_dim = load_integer(run, _ROWS), load_integer(model, _HEAD_DIM)
    row_bytes = 4 * head_dim
    out_step = load_integer(model, _HEADS) * row_bytes
    context = load_integer(room, _CONTEXT)
    wanted = True
    for index in range(pieces, last_piece):
        piece = carray(int64_at(load_integer(run, _PIECE_TABLE) + 32 * index), (4,))
        start, stop, first, last = piece[0], piece[1], piece[2], piece[3]
        maps = load_integer(run, _MAPS)
        if maps != 0:
            maps += _MAPS_BYTES * index
            wanted = load_integer(maps, _MAPS_ONLY) == 0
        out = context + (start - first_row) * out_step
        call_kernel(
            load_integer(run, _ATTEND),
            (
                model,
                room,
                source + start * row_bytes,
                stop - start,
                source + first * row_bytes,
                last - first,
                rows,
                out,
                maps,
            ),
        )
    return wanted


@helper
def _project(run, model, room, layer, first, last):
    """Query, key and value of `layer` for one block."""
    out = load_integer(run, _QKV if layer % 2 == 0 else _QKV_ODD)
    call_kernel(
        load_integer(run, _QKV_STEP),
        (
            model,
            load_integer(run, _LAYERS) + layer * _LAYER_BYTES,
            room,
            load_integer(run, _X) + 4 * first * load_integer(model, _WIDTH),
            last - first,
            load_integer(run, _POSITIONS) + 8 * first,
            load_integer(run, _SHORT_ROWS) + 8 * first,
            load_integer(run, _ROWS),
            out + 4 * first * load_integer(model, _HEAD_DIM),
        ),
    )


@helper
def _run_block(run, model, room, phase, block):
    """Phase 0 is the embedding, phase n layer n - 1; both with query, key and value of layer n."""
    width = load_integer(model, _WIDTH)
    span = carray(int64_at(load_integer(run, _BLOCK_TABLE) + 32 * block), (4,))
    first, last = span[0], span[1]
    if phase == 0:
        _embed(run, model, first, last, width)
    else:
        layer = phase - 1
        source = load_integer(run, _QKV if layer % 2 == 0 else _QKV_ODD)
        if not _attend_pieces(run, model, room, source, first, span[2], span[3]):
            return
        x = load_integer(run, _X) + 4 * first * width
        weights = load_integer(run, _LAYERS) + layer * _LAYER_BYTES
        context, short = load_integer(room, _CONTEXT), load_integer(run, _SHORT_ROWS) + 8 * first
        call_kernel(load_integer(run, _REST), (model, weights, room, context, x, last - first, short))
        if phase == load_integer(run, _NORM_AFTER):
            gain, shift = load_integer(model, _FINAL_GAIN), load_integer(model, _FINAL_SHIFT)
            layer_norm(x, 4 * width, last - first, width, gain, shift, x, 4 * width)
    if phase < load_integer(run, _LAST):
        _project(run, model, room, phase, first, last)


@kernel
def run_phases(run, model, room, start, stop):
    """Phases `start` to `stop` of a pass, together with the other threads that are given them.

    `run`, `model` and `room` are tables of layout.py, `room` the calling thread's own.
    """
    blocks, stopped = load_integer(run, _BLOCKS), load_integer(run, _STOP)
    for phase in range(start, stop):
        taken = load_integer(run, _COUNTERS) + 128 * phase
        done = taken + 64  # on a line of its own
        while load_shared(stopped) == 0:
            block = take_ticket(taken)
            if block >= blocks:
                break
            _run_block(run, model, room, phase, block)
            take_ticket(done)
        _wait(done, blocks, stopped)
