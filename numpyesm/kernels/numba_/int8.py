"""The linear steps of a layer on bytes: a scale for each output channel, and for each row of activations.

LayerNorm, GELU and the residual stream stay float32. Hidden activations have a scale for each part that is computed
at a time.
"""

from __future__ import annotations

from .cache import helper, kernel
from .emitter import ISA, TILE_BYTES, TILE_COLUMNS
from .fp32 import (
    ATTENTION_GAIN,
    ATTENTION_SHIFT,
    BIAS,
    FC1,
    FC2,
    FFN,
    FFN_COLUMNS,
    FFN_GAIN,
    FFN_SHIFT,
    GROUP_ROWS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    HIDDEN_LEFT,
    INT,
    LEFT,
    LEVELS,
    NORMED,
    OFFSETS,
    OUT_PROJ,
    QKV,
    ROTARY,
    SCALES,
    TILE,
    WEIGHT,
    WIDTH,
    ZEROS,
    groups_of,
)
from .gemm import ADD, GELU_COARSE, linear_heads_int8, linear_int8, steps_of
from .steps import layer_norm, quantise_rows
from .vectors import load_integer

# Attention is in bf16 where the CPU multiplies it.
NARROW = ISA.bf16
_SIZE = 2 if NARROW else 4


@helper
def _bytes(width):
    """Room for a row of bytes: whole steps of a product."""
    return 4 * steps_of(width, 4)


@kernel("int8", *[INT] * 8)
def project_qkv(model, layer, room, x, rows, positions, all_rows, out):
    """`fp32.project_qkv` with packed int8 weights; leaves bf16 where the CPU multiplies it."""
    width, heads, head_dim = load_integer(model, WIDTH), load_integer(model, HEADS), load_integer(model, HEAD_DIM)
    table, normed, tile = load_integer(model, ROTARY), load_integer(room, NORMED), load_integer(room, TILE)
    gain, shift = load_integer(layer, ATTENTION_GAIN), load_integer(layer, ATTENTION_SHIFT)
    left, levels, most = load_integer(room, LEFT), load_integer(room, LEVELS), load_integer(model, GROUP_ROWS)
    step, left_step = 4 * width, _bytes(width)
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        layer_norm(x + start * step, step, count, width, gain, shift, normed, step)
        quantise_rows(normed, step, count, width, left, left_step, levels, most)
        linear_heads_int8(
            NARROW,
            left,
            left_step,
            count,
            width,
            levels,
            most,
            layer + 8 * QKV,
            table,
            positions + 8 * start,
            heads,
            head_dim,
            all_rows,
            out + start * head_dim * _SIZE,
            tile,
        )


@helper
def _linear(x, x_step, rows, inner, levels, max_rows, layer, matrix, columns, step, out, out_step, tile):
    """A whole matrix of a layer."""
    linear_int8(
        x,
        x_step,
        rows,
        inner,
        levels,
        max_rows,
        load_integer(layer, matrix + WEIGHT),
        steps_of(inner, 4) * TILE_BYTES,
        load_integer(layer, matrix + OFFSETS),
        load_integer(layer, matrix + SCALES),
        load_integer(layer, matrix + BIAS),
        columns,
        step,
        out,
        out_step,
        tile,
    )


@kernel("int8", *[INT] * 6)
def project_and_feed_forward(model, layer, room, context, x, rows):
    """`fp32.project_and_feed_forward` with packed int8 weights."""
    width, ffn, most = load_integer(model, WIDTH), load_integer(model, FFN), load_integer(model, FFN_COLUMNS)
    inner = load_integer(model, HEADS) * load_integer(model, HEAD_DIM)
    normed, hidden, tile = load_integer(room, NORMED), load_integer(room, HIDDEN), load_integer(room, TILE)
    left, levels, hidden_left = load_integer(room, LEFT), load_integer(room, LEVELS), load_integer(room, HIDDEN_LEFT)
    gain, shift, max_rows = (
        load_integer(layer, FFN_GAIN),
        load_integer(layer, FFN_SHIFT),
        load_integer(model, GROUP_ROWS),
    )
    hidden_levels = levels + 8 * max_rows
    up, up_bias = load_integer(layer, FC1 + WEIGHT), load_integer(layer, FC1 + BIAS)
    up_offsets, up_scales = load_integer(layer, FC1 + OFFSETS), load_integer(layer, FC1 + SCALES)
    down, down_bias = load_integer(layer, FC2 + WEIGHT), load_integer(layer, FC2 + BIAS)
    down_offsets, down_scales = load_integer(layer, FC2 + OFFSETS), load_integer(layer, FC2 + SCALES)
    zeros = load_integer(model, ZEROS)
    step, left_step, context_step = 4 * width, _bytes(width), _bytes(inner)
    padded = 4 * ((width + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS)
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        y = x + start * step
        quantise_rows(context + start * 4 * inner, 4 * inner, count, inner, left, context_step, levels, max_rows)
        _linear(left, context_step, count, inner, levels, max_rows, layer, OUT_PROJ, width, ADD, y, step, tile)
        layer_norm(y, step, count, width, gain, shift, normed, step)
        quantise_rows(normed, step, count, width, left, left_step, levels, max_rows)
        for first in range(0, ffn, most):
            columns = min(most, ffn - first)
            linear_int8(
                left,
                left_step,
                count,
                width,
                levels,
                max_rows,
                up + first * left_step,
                left_step // 4 * TILE_BYTES,
                up_offsets + 4 * first,
                up_scales + 4 * first,
                up_bias + 4 * first,
                columns,
                GELU_COARSE,
                hidden,
                4 * most,
                tile,
            )
            quantise_rows(hidden, 4 * most, count, columns, hidden_left, most, hidden_levels, max_rows)
            linear_int8(
                hidden_left,
                most,
                count,
                columns,
                hidden_levels,
                max_rows,
                down + first // 4 * TILE_BYTES,
                _bytes(ffn) // 4 * TILE_BYTES,
                down_offsets + first // most * padded,
                down_scales,
                down_bias if first == 0 else zeros,
                width,
                ADD,
                y,
                step,
                tile,
            )
