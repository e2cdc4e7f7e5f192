"""The linear steps of a layer in every precision, and the LM head.

Products are in float32 or, where the CPU multiplies it, in bf16 summed in float32. LayerNorm, GELU, attention's result
and the residual stream are float32. Weights in less than that are widened panel by panel, unless they are bf16 and so
is the product.
"""

from __future__ import annotations

from ..compiled.layout import Layer, LmHead, Model, Room
from .cache import helper, kernel
from .gemm import ADD, GELU, GELU_BF16, STORE, linear, linear_heads, low_part, steps_of
from .steps import layer_norm, layer_norm_bf16, narrow_rows
from .vectors import load_integer

# Compiled code knows no enumerations.
_WIDTH, _HEADS, _HEAD_DIM, _FFN = int(Model.WIDTH), int(Model.HEADS), int(Model.HEAD_DIM), int(Model.FFN)
_GROUP_ROWS, _FFN_COLUMNS, _ROTARY = int(Model.GROUP_ROWS), int(Model.FFN_COLUMNS), int(Model.ROTARY)
_ATTENTION_GAIN, _ATTENTION_SHIFT = int(Layer.ATTENTION_GAIN), int(Layer.ATTENTION_SHIFT)
_FFN_GAIN, _FFN_SHIFT = int(Layer.FFN_GAIN), int(Layer.FFN_SHIFT)
_QKV, _OUT_PROJ, _FC1, _FC2 = 8 * Layer.QKV, 8 * Layer.OUT_PROJ, 8 * Layer.FC1, 8 * Layer.FC2
_DENSE, _VOCABULARY = 8 * LmHead.DENSE, 8 * LmHead.VOCABULARY
_HEAD_GAIN, _HEAD_SHIFT = int(LmHead.GAIN), int(LmHead.SHIFT)
_LEFT, _HIDDEN = int(Room.LEFT), int(Room.HIDDEN)


@helper
def _row_bytes(narrow, width):
    """Bytes of a row of `width` numbers as a product takes it."""
    return 4 * steps_of(width, narrow)


@helper
def _normalised(narrow, x, step, rows, width, gain, shift, out, out_step, low, short):
    """LayerNorm, ready for a product."""
    if narrow:
        layer_norm_bf16(x, step, rows, width, gain, shift, out, out_step, low, short)
    else:
        layer_norm(x, step, rows, width, gain, shift, out, out_step)


@helper
def _project_qkv(narrow, model, layer, room, x, rows, positions, short, all_rows, out):
    width, head_dim = load_integer(model, _WIDTH), load_integer(model, _HEAD_DIM)
    gain, shift, left = (
        load_integer(layer, _ATTENTION_GAIN),
        load_integer(layer, _ATTENTION_SHIFT),
        load_integer(room, _LEFT),
    )
    step, left_step = 4 * width, _row_bytes(narrow, width)
    most = load_integer(model, _GROUP_ROWS)
    groups = (rows + most - 1) // most
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        here = short + 8 * start
        low = low_part(narrow, here, count, most, left_step)
        _normalised(narrow, x + start * step, step, count, width, gain, shift, left, left_step, low, here)
        linear_heads(
            narrow,
            (left, left_step, count, low, here),
            layer + _QKV,
            width,
            load_integer(model, _ROTARY),
            positions + 8 * start,
            load_integer(model, _HEADS),
            head_dim,
            all_rows,
            out + start * head_dim * 4,
            room,
        )


@helper
def _project_and_feed_forward(narrow, model, layer, room, context, x, rows, short):
    width, ffn, at_a_time = load_integer(model, _WIDTH), load_integer(model, _FFN), load_integer(model, _FFN_COLUMNS)
    inner = load_integer(model, _HEADS) * load_integer(model, _HEAD_DIM)
    gain, shift = load_integer(layer, _FFN_GAIN), load_integer(layer, _FFN_SHIFT)
    left, hidden = load_integer(room, _LEFT), load_integer(room, _HIDDEN)
    step, left_step, inner_step = 4 * width, _row_bytes(narrow, width), _row_bytes(narrow, inner)
    hidden_step = (2 if narrow else 4) * at_a_time
    gelu = GELU_BF16 if narrow else GELU
    out_proj, fc1, fc2 = layer + _OUT_PROJ, layer + _FC1, layer + _FC2
    most = load_integer(model, _GROUP_ROWS)
    groups = (rows + most - 1) // most
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        y, attended, here = x + start * step, context + start * 4 * inner, short + 8 * start
        low = low_part(narrow, here, count, most, inner_step)
        if narrow:
            narrow_rows(attended, 4 * inner, count, inner, left, inner_step, low, here)
            attended = left
        lines = attended, inner_step, count, low, here
        linear(narrow, ADD, lines, out_proj, inner, 0, inner, 0, width, y, step, 0, room)
        low = low_part(narrow, here, count, most, left_step)
        _normalised(narrow, y, step, count, width, gain, shift, left, left_step, low, here)
        lines = left, left_step, count, low, here
        low = low_part(narrow, here, count, most, hidden_step)
        hidden_lines = hidden, hidden_step, count, low, here
        # A part of the hidden channels at a time: they and the rows stay in the second cache.
        for first in range(0, ffn, at_a_time):
            part = min(at_a_time, ffn - first)
            linear(narrow, gelu, lines, fc1, width, 0, width, first, part, hidden, hidden_step, low, room)
            linear(narrow, ADD, hidden_lines, fc2, ffn, first, part, 0, width, y, step, 0, room)


@kernel
def project_qkv(model, layer, room, x, rows, positions, short, all_rows, out):
    """LayerNorm(x) @ weight + bias, rotated, head by head: (R, D) -> `out`, see `gemm.linear_heads`.

    `layer` and so on are tables of layout.py; `positions` (R,) int64; `short` is of `Pass.SHORT_ROWS`; `out` is a
    buffer for `all_rows` rows.
    """
    _project_qkv(False, model, layer, room, x, rows, positions, short, all_rows, out)


@kernel
def project_qkv_bf16(model, layer, room, x, rows, positions, short, all_rows, out):
    """`project_qkv` with products in bf16."""
    _project_qkv(True, model, layer, room, x, rows, positions, short, all_rows, out)


@kernel
def project_and_feed_forward(model, layer, room, context, x, rows, short):
    """x += context @ out_proj; x += gelu(LayerNorm(x) @ fc1) @ fc2, each with its bias, in place: (R, D), (R, D).

    `short` is of `Pass.SHORT_ROWS`. Rows of `context` are as wide as all heads, whose width is rounded up.
    """
    _project_and_feed_forward(False, model, layer, room, context, x, rows, short)


@kernel
def project_and_feed_forward_bf16(model, layer, room, context, x, rows, short):
    """`project_and_feed_forward` with products in bf16."""
    _project_and_feed_forward(True, model, layer, room, context, x, rows, short)


@kernel
def lm_head(head, room, x, rows, width, columns, hidden, out):
    """out = LayerNorm(gelu(x @ dense + its bias)) @ embedding + bias: (R, D) -> (R, V). `hidden` (R, D) is room.

    `head` is a table of `layout.LmHead`.
    """
    step, gain, shift = 4 * width, load_integer(head, _HEAD_GAIN), load_integer(head, _HEAD_SHIFT)
    dense, vocabulary = head + _DENSE, head + _VOCABULARY
    linear(False, GELU, (x, step, rows, 0, 0), dense, width, 0, width, 0, width, hidden, step, 0, room)
    layer_norm(hidden, step, rows, width, gain, shift, hidden, step)
    lines = hidden, step, rows, 0, 0
    linear(False, STORE, lines, vocabulary, width, 0, width, 0, columns, out, 4 * columns, 0, room)
