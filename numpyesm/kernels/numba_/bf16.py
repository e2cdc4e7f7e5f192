"""The linear steps of a layer in bf16, summed in float32; LayerNorm and the residual stream stay float32."""

from __future__ import annotations

from .cache import kernel
from .emitter import TILE_BYTES
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
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INT,
    LEFT,
    OUT_PROJ,
    QKV,
    ROTARY,
    TILE,
    WEIGHT,
    WIDTH,
    ZEROS,
    groups_of,
)
from .gemm import ADD, GELU_BF16, linear_bf16, linear_heads_bf16, steps_of
from .steps import layer_norm_bf16, narrow_rows
from .vectors import load_integer


@kernel("bf16", *[INT] * 8)
def project_qkv(model, layer, room, x, rows, positions, all_rows, out):
    """`fp32.project_qkv` with packed bf16 weights; leaves bf16."""
    width, heads, head_dim = load_integer(model, WIDTH), load_integer(model, HEADS), load_integer(model, HEAD_DIM)
    table, tile = load_integer(model, ROTARY), load_integer(room, TILE)
    gain, shift, left = (
        load_integer(layer, ATTENTION_GAIN),
        load_integer(layer, ATTENTION_SHIFT),
        load_integer(room, LEFT),
    )
    step = 4 * width
    left_step = 4 * steps_of(width, 2)
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        layer_norm_bf16(x + start * step, step, count, width, gain, shift, left, left_step)
        linear_heads_bf16(
            left,
            left_step,
            count,
            width,
            layer + 8 * QKV,
            table,
            positions + 8 * start,
            heads,
            head_dim,
            all_rows,
            out + start * head_dim * 2,
            tile,
        )


@kernel("bf16", *[INT] * 6)
def project_and_feed_forward(model, layer, room, context, x, rows):
    """`fp32.project_and_feed_forward` with packed bf16 weights."""
    width, ffn, most = load_integer(model, WIDTH), load_integer(model, FFN), load_integer(model, FFN_COLUMNS)
    inner = load_integer(model, HEADS) * load_integer(model, HEAD_DIM)
    hidden, tile = load_integer(room, HIDDEN), load_integer(room, TILE)
    gain, shift, left = load_integer(layer, FFN_GAIN), load_integer(layer, FFN_SHIFT), load_integer(room, LEFT)
    out_weight, out_bias = load_integer(layer, OUT_PROJ + WEIGHT), load_integer(layer, OUT_PROJ + BIAS)
    up, up_bias = load_integer(layer, FC1 + WEIGHT), load_integer(layer, FC1 + BIAS)
    down, down_bias = load_integer(layer, FC2 + WEIGHT), load_integer(layer, FC2 + BIAS)
    zeros = load_integer(model, ZEROS)
    step, pairs, context_pairs = 4 * width, steps_of(width, 2), steps_of(inner, 2)
    groups = groups_of(model, rows)
    for group in range(groups):
        start = rows * group // groups
        count = rows * (group + 1) // groups - start
        y = x + start * step
        narrow_rows(context + start * 4 * inner, 4 * inner, count, inner, left, 4 * context_pairs)
        panel_step = context_pairs * TILE_BYTES
        linear_bf16(left, 4 * context_pairs, count, inner, out_weight, panel_step, out_bias, width, ADD, y, step, tile)
        layer_norm_bf16(y, step, count, width, gain, shift, left, 4 * pairs)
        for first in range(0, ffn, most):
            columns = min(most, ffn - first)
            panels = up + first * 4 * pairs
            linear_bf16(
                left,
                4 * pairs,
                count,
                width,
                panels,
                pairs * TILE_BYTES,
                up_bias + 4 * first,
                columns,
                GELU_BF16,
                hidden,
                2 * most,
                tile,
            )
            bias = down_bias if first == 0 else zeros
            panels = down + first // 2 * TILE_BYTES
            panel_step = steps_of(ffn, 2) * TILE_BYTES
            linear_bf16(hidden, 2 * most, count, columns, panels, panel_step, bias, width, ADD, y, step, tile)
