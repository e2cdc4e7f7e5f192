"""The linear steps of a layer, and the LM head, in float32."""

from __future__ import annotations

from numba import types

from .cache import helper, kernel
from .emitter import TILE_BYTES
from .gemm import ADD, GELU, STORE, linear, linear_heads
from .layout import Layer, Matrix, Model, Room
from .steps import layer_norm
from .vectors import load_integer

INT = types.int64

# Terms that are summed in one chain: shorter chains of additions round less. Queries and keys end up in an exponent,
# and the projection's error stays in the residual stream.
QKV_PIECE, PROJECTION_PIECE, FFN_PIECE = 120, 96, 160

# Compiled code knows no enumerations.
WIDTH, HEADS, HEAD_DIM, FFN = int(Model.WIDTH), int(Model.HEADS), int(Model.HEAD_DIM), int(Model.FFN)
GROUP_ROWS, FFN_COLUMNS, ROTARY, ZEROS = (
    int(Model.GROUP_ROWS),
    int(Model.FFN_COLUMNS),
    int(Model.ROTARY),
    int(Model.ZEROS),
)
ATTENTION_GAIN, ATTENTION_SHIFT = int(Layer.ATTENTION_GAIN), int(Layer.ATTENTION_SHIFT)
FFN_GAIN, FFN_SHIFT = int(Layer.FFN_GAIN), int(Layer.FFN_SHIFT)
QKV, OUT_PROJ, FC1, FC2 = int(Layer.QKV), int(Layer.OUT_PROJ), int(Layer.FC1), int(Layer.FC2)
WEIGHT, BIAS, OFFSETS, SCALES = (int(entry) for entry in Matrix)
NORMED, LEFT, LEVELS, HIDDEN = int(Room.NORMED), int(Room.LEFT), int(Room.LEVELS), int(Room.HIDDEN)
HIDDEN_LEFT, TILE = int(Room.HIDDEN_LEFT), int(Room.TILE)


@helper
def groups_of(model, rows):
    """Into how many near-equal groups these rows are divided."""
    largest = load_integer(model, GROUP_ROWS)
    return (rows + largest - 1) // largest


@kernel("fp32", *[INT] * 8)
def project_qkv(model, layer, room, x, rows, positions, all_rows, out):
    """LayerNorm(x) @ weight + bias, rotated, head by head: (R, D) -> `out`, see `gemm.linear_heads`.

    `layer` and so on are tables of layout.py; `positions` (R,) int64; `out` is a buffer for `all_rows` rows.
    """
    width, heads, head_dim = load_integer(model, WIDTH), load_integer(model, HEADS), load_integer(model, HEAD_DIM)
    table, normed, tile = load_integer(model, ROTARY), load_integer(room, NORMED), load_integer(room, TILE)
    gain, shift = load_integer(layer, ATTENTION_GAIN), load_integer(layer, ATTENTION_SHIFT)
    step = 4 * width
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        layer_norm(x + start * step, step, count, width, gain, shift, normed, step)
        linear_heads(
            normed,
            step,
            count,
            width,
            QKV_PIECE,
            layer + 8 * QKV,
            table,
            positions + 8 * start,
            heads,
            head_dim,
            all_rows,
            out + start * head_dim * 4,
            tile,
        )


@kernel("fp32", *[INT] * 6)
def project_and_feed_forward(model, layer, room, context, x, rows):
    """x += context @ out_proj; x += gelu(LayerNorm(x) @ fc1) @ fc2, each with its bias, in place: (R, D), (R, D).

    Rows of `context` are as wide as all heads, whose width is rounded up.
    """
    width, ffn, most = load_integer(model, WIDTH), load_integer(model, FFN), load_integer(model, FFN_COLUMNS)
    inner = load_integer(model, HEADS) * load_integer(model, HEAD_DIM)
    normed, hidden, tile = load_integer(room, NORMED), load_integer(room, HIDDEN), load_integer(room, TILE)
    gain, shift = load_integer(layer, FFN_GAIN), load_integer(layer, FFN_SHIFT)
    out_weight, out_bias = load_integer(layer, OUT_PROJ + WEIGHT), load_integer(layer, OUT_PROJ + BIAS)
    up, up_bias = load_integer(layer, FC1 + WEIGHT), load_integer(layer, FC1 + BIAS)
    down, down_bias = load_integer(layer, FC2 + WEIGHT), load_integer(layer, FC2 + BIAS)
    zeros = load_integer(model, ZEROS)
    step = 4 * width
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        y, left = x + start * step, context + start * 4 * inner
        linear(
            left,
            4 * inner,
            count,
            inner,
            PROJECTION_PIECE,
            out_weight,
            inner * TILE_BYTES,
            out_bias,
            width,
            ADD,
            y,
            step,
            tile,
        )
        layer_norm(y, step, count, width, gain, shift, normed, step)
        # A part of the hidden channels at a time: they and the rows stay in the second cache.
        for first in range(0, ffn, most):
            columns = min(most, ffn - first)
            panels = up + first * 4 * width
            linear(
                normed,
                step,
                count,
                width,
                FFN_PIECE,
                panels,
                width * TILE_BYTES,
                up_bias + 4 * first,
                columns,
                GELU,
                hidden,
                4 * most,
                tile,
            )
            bias = down_bias if first == 0 else zeros
            panels = down + first * TILE_BYTES
            linear(
                hidden,
                4 * most,
                count,
                columns,
                FFN_PIECE,
                panels,
                ffn * TILE_BYTES,
                bias,
                width,
                ADD,
                y,
                step,
                tile,
            )


@kernel("all", *[INT] * 6)
def normalise(x, rows, width, gain, shift, out):
    """LayerNorm: address of (R, D) -> address of (R, D)"""
    layer_norm(x, 4 * width, rows, width, gain, shift, out, 4 * width)


@kernel("all", *[INT] * 13)
def lm_head(x, rows, width, dense, dense_bias, gain, shift, embedding, bias, columns, hidden, out, tile):
    """out = LayerNorm(gelu(x @ dense + its bias)) @ embedding + bias: (R, D) -> (R, V). `hidden` (R, D) is room."""
    step, panel = 4 * width, width * TILE_BYTES
    linear(x, step, rows, width, PROJECTION_PIECE, dense, panel, dense_bias, width, GELU, hidden, step, tile)
    layer_norm(hidden, step, rows, width, gain, shift, hidden, step)
    linear(hidden, step, rows, width, FFN_PIECE, embedding, panel, bias, columns, STORE, out, 4 * columns, tile)
