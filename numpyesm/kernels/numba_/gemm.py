"""Products of rows with packed weights, with the step that follows while the tile is in the L1 cache.

Weights that are stored in less than the product takes are widened one panel at a time, for all rows at hand.

Rows, weights and outputs are addresses; `step`s are bytes from row to row. Whole products are called by their address:
compiled into their callers, they would take most of the time that those need to compile.
"""

from __future__ import annotations

from ...weights.tensor import GROUP
from ..compiled.layout import Matrix, Model, Room
from .cache import helper, kernel
from .emitter import ISA, TILE_BYTES, TILE_COLUMNS, TILE_ROWS, VECTOR_BYTES, multiply_bf16, multiply_fp32
from .steps import any_short, clear_bf16, steps_of
from .tiles import configure_tiles, multiply_tiles, release_tiles, store_tiles
from .vectors import (
    PIECE,
    add_biased,
    carray,
    fetch,
    int64_at,
    load_integer,
    load_number,
    store_biased,
    store_gelu,
    store_gelu_bf16,
    store_gelu_split,
    store_number,
    store_piece,
    store_rotated,
    widen_bf16,
    widen_int8,
)

# What becomes of a finished tile.
STORE, GELU, ADD, HEADS = 0, 1, 2, 3
# Terms that float32 sums in one chain at most: in shorter ones additions round less, and each costs a pass over the
# tile. Measured: half as many terms, three quarters of the error, 0.5 % of the time.
_CHAIN = 240
# Where bf16 is multiplied on tile registers, its products take more rows.
_TILES, _NARROW_ROWS = ISA.tiles, ISA.narrow_rows


# -- the end of a tile ----------------------------------------------------------------------------------------------


@helper
def low_part(narrow, short, rows, step):
    """Bytes from the rows of a group in bf16 to what rounding took off, if any of them is of a short sequence, else 0.

    Between them is room for what tile registers read behind the last row.
    """
    if narrow != 0 and any_short(short, 0, rows):
        return (rows + _NARROW_ROWS) * step
    return 0


@helper
def _finish(step, height, width, tile, bias, out, out_step):
    """Add the bias to a tile and store it, put it through GELU, or add it to what is there; `width` columns of it."""
    for row in range(height):
        source, target = tile + row * TILE_BYTES, out + row * out_step
        # Whole tiles go where they belong, others through their own memory.
        to = target if width == TILE_COLUMNS else source
        if step == ADD and width == TILE_COLUMNS:
            for at in range(0, TILE_BYTES, VECTOR_BYTES):
                add_biased(source + at, bias + at, to + at)
        elif step == GELU:
            for at in range(0, TILE_BYTES, VECTOR_BYTES):
                store_gelu(source + at, bias + at, to + at)
        else:
            for at in range(0, TILE_BYTES, VECTOR_BYTES):
                store_biased(source + at, bias + at, to + at)
        if width < TILE_COLUMNS:
            for column in range(0, 4 * width, 4):
                value = load_number(source + column)
                if step == ADD:
                    value += load_number(target + column)
                store_number(value, target + column)


@helper
def _finish_hidden(height, tile, bias, centre, out, out_step, low, short):
    """Add the bias to a tile, put it through GELU, take off `centre` and store it in bf16: there is room for all.

    `low` and `short` are those of `layer_norm`.
    """
    for row in range(height):
        source, target, split = tile + row * TILE_BYTES, out + row * out_step, False
        if low != 0:
            split = any_short(short, row, row + 1)
            if not split:
                clear_bf16(target + low, TILE_COLUMNS)
        for at in range(0, TILE_BYTES, VECTOR_BYTES):
            here = target + at // 2
            if split:
                store_gelu_split(source + at, bias + at, centre + at, here, here + low)
            else:
                store_gelu_bf16(source + at, bias + at, centre + at, here)


@helper
def _finish_heads(height, first_column, tile, bias, model, positions, steps, out):
    """Rotate queries and keys of a tile and put every head's rows where they follow each other.

    The columns are (some heads, part, head, channel); at `out` lies the first row of query head 0. `steps` are bytes
    from head to head, and from queries to keys and from keys to values.
    """
    head_step, part_step = steps
    heads, head_dim = load_integer(model, Model.HEADS), load_integer(model, Model.HEAD_DIM)
    table, together = load_integer(model, Model.ROTARY), load_integer(model, Model.HEADS_AT_A_TIME)
    position = carray(int64_at(positions), (height,))
    for column in range(first_column, min(first_column + TILE_COLUMNS, 3 * heads * head_dim), PIECE):
        at = 4 * (column - first_column)
        row_of_heads, channel = column // head_dim, column % head_dim
        part = row_of_heads // together % 3
        head = row_of_heads // (3 * together) * together + row_of_heads % together
        target = out + part * part_step + head * head_step + channel * 4
        turn = table + 4 * (channel + (2 * head_dim if part == 0 else 0))
        for row in range(height):
            source, here = tile + row * TILE_BYTES + at, target + row * head_dim * 4
            if part == 2:
                store_piece(source, bias + at, here)
                continue
            cosine = turn + position[row] * 16 * head_dim
            store_rotated(source, bias + at, cosine, cosine + 4 * head_dim, here)


# -- one tile -------------------------------------------------------------------------------------------------------


@helper
def _begin(narrow, rows):
    """Before a group of rows is multiplied: -> tiles along the rows, rows of a tile register, `late`.

    Tiles are how many, the least height and how many are one higher: a low last tile would not fill the multipliers'
    pipelines. So many products is what follows one behind: what a tile register has just stored cannot be read at once.
    """
    highest = _NARROW_ROWS if narrow else TILE_ROWS
    tiles = (rows + highest - 1) // highest
    half = (rows + 2 * tiles - 1) // (2 * tiles)
    if narrow and _TILES:
        configure_tiles(half, half)
    return (tiles, rows // tiles, rows % tiles), half, 1 if narrow and _TILES else 0


@helper
def _share(tiles, share):
    """The first tile of a share, number and count of equal ones, and the one behind its last."""
    number, count = share
    return tiles * number // count, tiles * (number + 1) // count


@helper
def _rows_of(t, tiles):
    """First row and height of tile t."""
    _, height, higher = tiles
    return t * height + min(t, higher), height + (1 if t < higher else 0)


@helper
def _next(first, t, tiles):
    """The tile after tile t of the panel whose first column is `first`: -> its panel's first column, its number."""
    t += 1
    return (first + TILE_COLUMNS, 0) if t == tiles[0] else (first, t)


@helper
def _widen(narrow, panel, step_bytes, scales, steps, out):
    """One panel as the product takes it; `scales` are those of int8, group by group, or 0 for bf16."""
    if not narrow and scales == 0:
        widen_bf16(panel, steps, out)
        return
    in_group = GROUP // 2 if narrow else GROUP
    for first in range(0, steps, in_group):
        count = min(in_group, steps - first)
        widen_int8(1 if narrow else 0, panel + first * step_bytes, scales, count, out + first * TILE_BYTES)
        scales += TILE_BYTES


@helper
def _multiply(narrow, first, t, fresh, tiles, half, left, matrix, k, inner, room):
    """Tile t of rows times some rows of a matrix and the panel of column `first`.

    The product is left in tile registers where there are any, else in memory. `fresh`: the one before was of another
    panel.
    """
    x, x_step, _, low, short = left
    start, height = _rows_of(t, tiles)
    per_step, step_bytes = 2 if narrow else 1, load_integer(matrix, Matrix.STEP_BYTES)
    steps, all_steps = steps_of(inner, narrow), steps_of(load_integer(matrix, Matrix.INNER), narrow)
    panel = load_integer(matrix, Matrix.WEIGHT) + (first // TILE_COLUMNS * all_steps + k // per_step) * step_bytes
    here, tile = x + start * x_step, load_integer(room, Room.TILE)
    # The next panel comes nearer while this one is multiplied, a part of it by every tile.
    ahead_step = (step_bytes + tiles[0] - 1) // tiles[0]
    ahead = panel + all_steps * step_bytes + t * steps * ahead_step
    if step_bytes != TILE_BYTES:
        wide, scales = load_integer(room, Room.WIDE), load_integer(matrix, Matrix.SCALES)
        if fresh:
            if scales != 0:
                groups = (all_steps * per_step + GROUP - 1) // GROUP
                scales += (first // TILE_COLUMNS * groups + k // GROUP) * TILE_BYTES
            _widen(narrow, panel, step_bytes, scales, steps, wide)
        panel = wide
    if not narrow:
        chains = (inner + _CHAIN - 1) // _CHAIN
        length = (inner + chains - 1) // chains
        for chain in range(0, inner, length):
            left_part, right_part = here + 4 * chain, panel + chain * TILE_BYTES
            count, near = min(length, inner - chain), ahead + chain * ahead_step
            multiply_fp32(height, left_part, x_step, right_part, count, tile, TILE_BYTES, chain, near, ahead_step)
        return
    parts = 2 if low != 0 and any_short(short, start, start + height) else 1
    for part in range(parts):
        if _TILES:
            multiply_tiles(half, here, x_step, panel, steps, ahead, ahead_step, part)
        else:
            multiply_bf16(height, here, x_step, panel, steps, tile, TILE_BYTES, part, ahead, ahead_step)
        here += low


# -- whole products -------------------------------------------------------------------------------------------------


@helper
def _linear(narrow, step, left, matrix, k, inner, column, columns, out, out_step, out_low, room, share, heads):
    """See `linear`."""
    _, _, rows, _, short = left
    tiles, half, late = _begin(narrow, rows)
    tile = load_integer(room, Room.TILE)
    bias, centre = load_integer(matrix, Matrix.BIAS) + 4 * column, load_integer(matrix, Matrix.CENTRE) + 4 * column
    if k > 0:
        bias = load_integer(room, Room.ZEROS)
    number = 2 if narrow and step == GELU else 4
    begin, end = _share(tiles[0] * ((columns + TILE_COLUMNS - 1) // TILE_COLUMNS), share)
    first, t = begin // tiles[0] * TILE_COLUMNS, begin % tiles[0]
    done_first, done_t = first, t
    for i in range(begin, end + late):
        if i < end:
            if step == ADD:
                start, height = _rows_of(t, tiles)
                for row in range(start, start + height):  # what the tile is added to, too short for the CPU to foresee
                    fetch(out + row * out_step + 4 * first, TILE_BYTES)
            fresh = t == 0 or i == begin
            _multiply(narrow, column + first, t, fresh, tiles, half, left, matrix, k, inner, room)
        if i >= begin + late:
            start, height = _rows_of(done_t, tiles)
            width, target = min(TILE_COLUMNS, columns - done_first), out + start * out_step + number * done_first
            here = bias if k > 0 else bias + 4 * done_first
            if step == HEADS:
                model, positions = heads
                at = out + start * load_integer(model, Model.HEAD_DIM) * 4
                steps, turns = (out_step, out_low), positions + 8 * start
                _finish_heads(height, column + done_first, tile, here, model, turns, steps, at)
            elif narrow and step == GELU:
                at, below = centre + 4 * done_first, short + 8 * start
                _finish_hidden(height, tile, here, at, target, out_step, out_low, below)
            else:
                _finish(step, height, width, tile, here, target, out_step)
            done_first, done_t = _next(done_first, done_t, tiles)
        if narrow and _TILES:
            store_tiles(half, tile, TILE_BYTES)
        first, t = _next(first, t, tiles)
    if narrow and _TILES:
        release_tiles()


@kernel
def linear(
    step, x, x_step, rows, low, short, matrix, k, inner, column, columns, out, out_step, out_low, room, share, shares,
    model, positions,
):  # fmt: skip
    """`step` of x @ weight + bias: (R, K), (K, N), (N,) -> out (R, N).

    Of a `matrix` (see layout.py), `inner` rows from row k on and `columns` from `column` on; both begin at whole tiles
    and groups. The bias goes with row 0. `low` and `short` are what `layer_norm` calls so; `out_low` is the next
    product's `low`. Of its tiles, share number `share` of `shares` is computed. HEADS alone, which rotates and parts
    query, key and value, needs a `layout.Model` and positions (R,) int64: see `_finish_heads`, whose `steps` are
    `out_step` and `out_low`.
    """
    left, part, heads = (x, x_step, rows, low, short), (share, shares), (model, positions)
    _linear(False, step, left, matrix, k, inner, column, columns, out, out_step, out_low, room, part, heads)


@kernel
def linear_bf16(
    step, x, x_step, rows, low, short, matrix, k, inner, column, columns, out, out_step, out_low, room, share, shares,
    model, positions,
):  # fmt: skip
    """`linear` with products in bf16."""
    left, part, heads = (x, x_step, rows, low, short), (share, shares), (model, positions)
    _linear(True, step, left, matrix, k, inner, column, columns, out, out_step, out_low, room, part, heads)
