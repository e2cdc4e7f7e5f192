"""The linear steps of a layer in every precision, and the LM head.

Products are in float32 or, where the CPU multiplies it, in bf16 summed in float32. LayerNorm, GELU, attention's result
and the residual stream are float32. Weights in less than that are widened panel by panel, unless they are bf16 and so
is the product.
"""

from __future__ import annotations

from ..compiled.layout import Layer, LmHead, Model, Room, Steps
from .cache import helper, kernel
from .emitter import TILE_COLUMNS
from .gemm import ADD, GELU, STORE, linear_heads, low_part
from .steps import layer_norm, load_norm, narrow_rows, row_bytes
from .vectors import call_kernel, load_integer


@helper
def _project_qkv(narrow, model, layer, room, x, rows, positions, short, all_rows, out, share):
    width, head_dim = load_integer(model, Model.WIDTH), load_integer(model, Model.HEAD_DIM)
    norm, left = load_norm(layer + 8 * Layer.ATTENTION_NORM), load_integer(room, Room.LEFT)
    step, left_step = 4 * width, row_bytes(narrow, width)
    most = load_integer(model, Model.GROUP_ROWS)
    groups = (rows + most - 1) // most
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        here = short + 8 * start
        low = low_part(narrow, here, count, most, left_step)
        layer_norm(narrow, x + start * step, count, width, norm, left, left_step, low, here)
        lines = left, left_step, count, low, here
        table, heads = load_integer(model, Model.ROTARY), load_integer(model, Model.HEADS)
        at, to = positions + 8 * start, out + start * head_dim * 4
        linear_heads(narrow, lines, layer + 8 * Layer.QKV, width, table, at, heads, head_dim, all_rows, to, room, share)


@helper
def _project_and_feed_forward(narrow, model, layer, room, context, x, rows, short, hidden, steps, share, shares):
    width, ffn = load_integer(model, Model.WIDTH), load_integer(model, Model.FFN)
    at_a_time = load_integer(model, Model.FFN_COLUMNS)
    inner = load_integer(model, Model.HEADS) * load_integer(model, Model.HEAD_DIM)
    norm = load_norm(layer + 8 * Layer.FFN_NORM)
    left = load_integer(room, Room.LEFT)
    most = load_integer(model, Model.GROUP_ROWS)
    step, left_step, inner_step = 4 * width, row_bytes(narrow, width), row_bytes(narrow, inner)
    number = 2 if narrow else 4
    together = hidden != 0  # all hidden channels, of which threads compute shares
    hidden_step = number * ((ffn + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS if together else at_a_time)
    if not together:
        hidden = load_integer(room, Room.HIDDEN)
    linear = load_integer(model, Model.LINEAR)
    out_proj, fc1, fc2 = layer + 8 * Layer.OUT_PROJ, layer + 8 * Layer.FC1, layer + 8 * Layer.FC2
    groups = (rows + most - 1) // most
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        y, attended, here = x + start * step, context + start * 4 * inner, short + 8 * start
        if steps & Steps.OUT_PROJ:
            low = low_part(narrow, here, count, most, inner_step)
            if narrow:
                narrow_rows(attended, count, inner, left, inner_step, low, here)
                attended = left
            lines = attended, inner_step, count, low, here
            call_kernel(linear, (ADD, *lines, out_proj, 0, inner, 0, width, y, step, 0, room, share, shares))
        low = low_part(narrow, here, count, most, left_step)
        lines = left, left_step, count, low, here
        if steps & Steps.FC1:
            layer_norm(narrow, y, count, width, norm, left, left_step, low, here)
        low = low_part(narrow, here, count, most, hidden_step)
        # A part of the hidden channels at a time: they and the rows stay in the second cache.
        for first in range(0, ffn, at_a_time):
            part = min(at_a_time, ffn - first)
            at = hidden + number * first if together else hidden
            if steps & Steps.FC1:
                fc1_part = fc1, 0, width, first, part, at, hidden_step, low, room, share, shares
                call_kernel(linear, (GELU, *lines, *fc1_part))
            if steps & Steps.FC2:
                hidden_lines = at, hidden_step, count, low, here
                fc2_part = fc2, first, part, 0, width, y, step, 0, room, share, shares
                call_kernel(linear, (ADD, *hidden_lines, *fc2_part))


@kernel
def project_qkv(model, layer, room, x, rows, positions, short, all_rows, out, share, shares):
    """LayerNorm(x) @ weight + bias, rotated, head by head: (R, D) -> `out`, see `gemm.linear_heads`.

    `layer` and so on are tables of layout.py; `positions` (R,) int64; `short` is of `Pass.SHORT_ROWS`; `out` is a
    buffer for `all_rows` rows. Of the tiles of the product, share number `share` of `shares` is computed.
    """
    _project_qkv(False, model, layer, room, x, rows, positions, short, all_rows, out, (share, shares))


@kernel
def project_qkv_bf16(model, layer, room, x, rows, positions, short, all_rows, out, share, shares):
    """`project_qkv` with products in bf16."""
    _project_qkv(True, model, layer, room, x, rows, positions, short, all_rows, out, (share, shares))


@kernel
def project_and_feed_forward(model, layer, room, context, x, rows, short, hidden, steps, share, shares):
    """x += context @ out_proj; x += gelu(LayerNorm(x) @ fc1) @ fc2, each with its bias, in place: (R, D), (R, D).

    `short` is of `Pass.SHORT_ROWS`. Rows of `context` are as wide as all heads, whose width is rounded up. Of the
    `steps`, and of the tiles of their products, a share may be computed: then `hidden` holds the hidden channels of all
    rows, which are one group. It is 0 where all is computed.
    """
    _project_and_feed_forward(False, model, layer, room, context, x, rows, short, hidden, steps, share, shares)


@kernel
def project_and_feed_forward_bf16(model, layer, room, context, x, rows, short, hidden, steps, share, shares):
    """`project_and_feed_forward` with products in bf16."""
    _project_and_feed_forward(True, model, layer, room, context, x, rows, short, hidden, steps, share, shares)


@kernel
def lm_head(head, room, x, rows, width, columns, hidden, out):
    """out = LayerNorm(gelu(x @ dense + its bias)) @ embedding + bias: (R, D) -> (R, V). `hidden` (R, D) is room.

    `head` is a table of `layout.LmHead`.
    """
    step, norm = 4 * width, load_norm(head + 8 * LmHead.NORM)
    dense, vocabulary = head + 8 * LmHead.DENSE, head + 8 * LmHead.VOCABULARY
    linear = load_integer(head, LmHead.LINEAR)
    call_kernel(linear, (GELU, x, step, rows, 0, 0, dense, 0, width, 0, width, hidden, step, 0, room, 0, 1))
    layer_norm(False, hidden, rows, width, norm, hidden, step, 0, 0)
    lines = hidden, step, rows, 0, 0
    call_kernel(linear, (STORE, *lines, vocabulary, 0, width, 0, columns, out, 4 * columns, 0, room, 0, 1))
