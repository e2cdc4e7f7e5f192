"""The linear steps of a layer on bytes: a scale for each output channel, and for each row of activations.

LayerNorm, GELU and the residual stream stay float32.
"""

from __future__ import annotations

from numba import types

from .cache import kernel
from .fp32 import FLAT, GROUP_ROWS, INDEX, ROWS
from .gemm import ADD, GELU, STORE, linear_int8
from .steps import layer_norm, quantise_rows, rotate, scatter_heads

BYTES = types.int8[::1]
BYTE_ROWS = types.uint8[:, ::1]
# Packed weights, the sums of their columns, the scales of their columns, bias.
LINEAR = (BYTES, FLAT, FLAT, FLAT)


@kernel("int8", ROWS, FLAT, FLAT, *LINEAR, ROWS, INDEX, *[types.int64] * 5, ROWS, BYTE_ROWS, FLAT, ROWS, FLAT)
def project_qkv(
    x,
    gain,
    shift,
    weight,
    sums,
    factors,
    bias,
    table,
    positions,
    head_dim,
    out,
    step,
    part_step,
    head_step,
    normed,
    left,
    levels,
    projected,
    tile,
):
    """`fp32.project_qkv` with packed int8 weights; `left` (GROUP_ROWS, ≥ D) and `levels` hold quantised rows."""
    width = x.shape[1]
    scales, offsets = levels[:GROUP_ROWS], levels[GROUP_ROWS:]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start = x.shape[0] * group // groups
        rows = x[start : x.shape[0] * (group + 1) // groups]
        y, z, a = normed[: rows.shape[0]], projected[: rows.shape[0]], left[: rows.shape[0]]
        layer_norm(rows, gain, shift, y)
        quantise_rows(y, width, a, scales, offsets)
        linear_int8(a, scales, offsets, width, weight, sums, factors, bias, 3 * width, STORE, z, tile)
        rotate(z, table, positions[start:])
        scatter_heads(z, head_dim, out + start * step, step, part_step, head_step)


@kernel("int8", ROWS, ROWS, *LINEAR, FLAT, FLAT, *LINEAR, *LINEAR, types.int64, ROWS, BYTE_ROWS, FLAT, ROWS, FLAT)
def project_and_feed_forward(
    context,
    x,
    project,
    project_sums,
    project_factors,
    project_bias,
    gain,
    shift,
    up,
    up_sums,
    up_factors,
    up_bias,
    down,
    down_sums,
    down_factors,
    down_bias,
    ffn,
    normed,
    left,
    levels,
    hidden,
    tile,
):
    """`fp32.project_and_feed_forward` with packed int8 weights; `left` (GROUP_ROWS, ≥ F) is room for quantised rows."""
    width = x.shape[1]
    scales, offsets = levels[:GROUP_ROWS], levels[GROUP_ROWS:]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start, stop = x.shape[0] * group // groups, x.shape[0] * (group + 1) // groups
        rows, count = x[start:stop], stop - start
        y, a, h = normed[:count], left[:count], hidden[:count]
        quantise_rows(context[start:stop], width, a, scales, offsets)
        linear_int8(
            a, scales, offsets, width, project, project_sums, project_factors, project_bias, width, ADD, rows, tile
        )
        layer_norm(rows, gain, shift, y)
        quantise_rows(y, width, a, scales, offsets)
        linear_int8(a, scales, offsets, width, up, up_sums, up_factors, up_bias, ffn, GELU, h, tile)
        quantise_rows(h, ffn, a, scales, offsets)
        linear_int8(a, scales, offsets, ffn, down, down_sums, down_factors, down_bias, width, ADD, rows, tile)
