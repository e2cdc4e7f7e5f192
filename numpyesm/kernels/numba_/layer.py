"""The linear steps of a layer in every precision, and the LM head.

Products are in float32 or, where the CPU multiplies it, in bf16 summed in float32. LayerNorm, GELU, attention's result
and the residual stream are float32. Weights in less than that are widened panel by panel, unless they are bf16 and so
is the product.
"""

from __future__ import annotations

from ..compiled.layout import Layer, LmHead, Model, Pass, Room, Steps
from .cache import helper, kernel
from .emitter import TILE_COLUMNS
from .gemm import ADD, GELU, HEADS, STORE, low_part
from .steps import narrow_rows, row_bytes
from .vectors import call_kernel, load_integer


@helper
def groups_of_rows(model, rows):
    """Into how many parts the linear steps cut so many rows."""
    most = load_integer(model, Model.GROUP_ROWS)
    return (rows + most - 1) // most


@helper
def group_of_rows(first, last, number, groups):
    """One of these near-equal parts: -> its first row, how many."""
    start = first + (last - first) * number // groups
    return start, first + (last - first) * (number + 1) // groups - start


@helper
def normalise_rows(run, model, room, number, first, count):
    """LayerNorm before the attention of layer `number`: `count` rows of `Pass.X` -> rows as `linear` takes them.

    `run`, `model` and `room` are tables of layout.py.
    """
    narrow, width = load_integer(model, Model.NARROW), load_integer(model, Model.WIDTH)
    norm = load_integer(run, Pass.LAYERS) + 8 * (number * Layer.ENTRIES + Layer.ATTENTION_NORM)
    x, short = load_integer(run, Pass.X) + 4 * width * first, load_integer(run, Pass.SHORT_ROWS) + 8 * first
    left, left_step = load_integer(room, Room.LEFT), row_bytes(narrow, width)
    low = low_part(narrow, short, count, left_step)
    call_kernel(load_integer(model, Model.LAYER_NORM), (narrow, x, count, width, norm, left, left_step, low, short))
    return left, left_step, count, low, short


@helper
def project_heads(run, model, room, number, lines, first, heads, out, steps, share, shares):
    """Queries, keys and values of some heads: -> `out`, where row 0 of query head 0 would lie (`gemm.linear`'s HEADS).

    `lines` are rows as `normalise_rows` gives them, the first of them row `first`. `heads` are the first and how many,
    multiples of `Model.HEADS_AT_A_TIME`; share number `share` of `shares` is computed.
    """
    width, head_dim = load_integer(model, Model.WIDTH), load_integer(model, Model.HEAD_DIM)
    matrix = load_integer(run, Pass.LAYERS) + 8 * (number * Layer.ENTRIES + Layer.QKV)
    first_head, count = heads
    weights = matrix, 0, width, 3 * head_dim * first_head, 3 * head_dim * count
    to = out + 4 * head_dim * first, *steps, room, share, shares
    positions = load_integer(run, Pass.POSITIONS) + 8 * first
    call_kernel(load_integer(model, Model.LINEAR), (HEADS, *lines, *weights, *to, model, positions))


@helper
def project_qkv(run, model, room, number, first, last, share, shares):
    """Queries, keys and values of layer `number`: some rows of `Pass.X` -> `Pass.QKV`, or a share of them."""
    heads, head_dim = load_integer(model, Model.HEADS), load_integer(model, Model.HEAD_DIM)
    out = load_integer(run, Pass.QKV if number % 2 == 0 else Pass.QKV_ODD)
    head_step = 4 * head_dim * load_integer(run, Pass.ROWS)
    every, steps = (0, heads), (head_step, heads * head_step)
    groups = groups_of_rows(model, last - first)
    for group in range(groups):
        start, count = group_of_rows(first, last, group, groups)
        lines = normalise_rows(run, model, room, number, start, count)
        project_heads(run, model, room, number, lines, start, every, out, steps, share, shares)


@helper
def project_and_feed_forward(run, model, room, number, first, last, context, hidden, steps, share, shares):
    """x += context @ out_proj; x += gelu(LayerNorm(x) @ fc1) @ fc2, each with its bias, in some rows of `Pass.X`.

    Rows of `context`, whose first is row `first`, are as wide as all heads, whose width is rounded up. Of the `steps`,
    and of the tiles of their products, a share may be computed: then `hidden` holds the hidden channels of all rows,
    which are one group. It is 0 where all is computed.
    """
    layer = load_integer(run, Pass.LAYERS) + number * 8 * Layer.ENTRIES
    narrow, width = load_integer(model, Model.NARROW), load_integer(model, Model.WIDTH)
    ffn, at_a_time = load_integer(model, Model.FFN), load_integer(model, Model.FFN_COLUMNS)
    inner = load_integer(model, Model.HEADS) * load_integer(model, Model.HEAD_DIM)
    norm, left = layer + 8 * Layer.FFN_NORM, load_integer(room, Room.LEFT)
    linear = load_integer(model, Model.LINEAR)
    step, left_step, inner_step = 4 * width, row_bytes(narrow, width), row_bytes(narrow, inner)
    bytes_each = 4 if narrow == 0 else 2
    together = hidden != 0  # all hidden channels, of which threads compute shares
    channels = (ffn + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS if together else at_a_time
    hidden_step = row_bytes(narrow, channels)
    if not together:
        hidden = load_integer(room, Room.HIDDEN)
    out_proj, fc1, fc2 = layer + 8 * Layer.OUT_PROJ, layer + 8 * Layer.FC1, layer + 8 * Layer.FC2
    groups = groups_of_rows(model, last - first)
    for group in range(groups):
        start, count = group_of_rows(first, last, group, groups)
        x, short = load_integer(run, Pass.X) + step * start, load_integer(run, Pass.SHORT_ROWS) + 8 * start
        attended = context + (start - first) * 4 * inner
        if steps & Steps.OUT_PROJ:
            low = low_part(narrow, short, count, inner_step)
            if narrow != 0:
                narrow_rows(attended, count, inner, left, inner_step, low, short)
                attended = left
            lines = attended, inner_step, count, low, short
            call_kernel(linear, (ADD, *lines, out_proj, 0, inner, 0, width, x, step, 0, room, share, shares, 0, 0))
        low = low_part(narrow, short, count, left_step)
        lines = left, left_step, count, low, short
        if steps & Steps.FC1:
            layer_norm = load_integer(model, Model.LAYER_NORM)
            call_kernel(layer_norm, (narrow, x, count, width, norm, left, left_step, low, short))
        low = low_part(narrow, short, count, hidden_step)
        # A part of the hidden channels at a time: they and the rows stay in the L2 cache.
        for channel in range(0, ffn, at_a_time):
            part = min(at_a_time, ffn - channel)
            at = hidden + bytes_each * channel if together else hidden
            if steps & Steps.FC1:
                fc1_part = fc1, 0, width, channel, part, at, hidden_step, low, room, share, shares, 0, 0
                call_kernel(linear, (GELU, *lines, *fc1_part))
            if steps & Steps.FC2:
                hidden_lines = at, hidden_step, count, low, short
                fc2_part = fc2, channel, part, 0, width, x, step, 0, room, share, shares, 0, 0
                call_kernel(linear, (ADD, *hidden_lines, *fc2_part))


@kernel
def lm_head(head, room, x, rows, width, columns, hidden, out):
    """out = LayerNorm(gelu(x @ dense + its bias)) @ embedding + bias: (R, D) -> (R, V). `hidden` (R, D) is room.

    `head` is a table of `layout.LmHead`.
    """
    step, norm = 4 * width, head + 8 * LmHead.NORM
    dense, vocabulary = head + 8 * LmHead.DENSE, head + 8 * LmHead.VOCABULARY
    linear = load_integer(head, LmHead.LINEAR)
    call_kernel(linear, (GELU, x, step, rows, 0, 0, dense, 0, width, 0, width, hidden, step, 0, room, 0, 1, 0, 0))
    call_kernel(load_integer(head, LmHead.LAYER_NORM), (0, hidden, rows, width, norm, hidden, step, 0, 0))
    lines = hidden, step, rows, 0, 0
    call_kernel(linear, (STORE, *lines, vocabulary, 0, width, 0, columns, out, 4 * columns, 0, room, 0, 1, 0, 0))
