"""The linear steps of a layer in bf16, summed in float32; LayerNorm and GELU stay float32."""

from __future__ import annotations

from numba import types

from .cache import kernel
from .fp32 import FLAT, GROUP_ROWS, INDEX, ROWS
from .gemm import ADD, GELU_BF16, STORE, linear_bf16
from .steps import layer_norm, narrow_rows, rotate, scatter_heads

NARROW = types.uint16[::1]
NARROW_ROWS = types.uint16[:, ::1]


@kernel("bf16", ROWS, FLAT, FLAT, NARROW, FLAT, ROWS, INDEX, *[types.int64] * 5, ROWS, NARROW_ROWS, ROWS, FLAT)
def project_qkv(
    x,
    gain,
    shift,
    weight,
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
    projected,
    tile,
):
    """`fp32.project_qkv` with packed bf16 weights; `left` (GROUP_ROWS, ≥ D) is room for the rows as bf16."""
    width = x.shape[1]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start = x.shape[0] * group // groups
        rows = x[start : x.shape[0] * (group + 1) // groups]
        y, z, a = normed[: rows.shape[0]], projected[: rows.shape[0]], left[: rows.shape[0]]
        layer_norm(rows, gain, shift, y)
        narrow_rows(y, width, a)
        linear_bf16(a, width, weight, bias, 3 * width, STORE, z.ctypes.data, 4 * z.shape[1], tile)
        rotate(z, table, positions[start:])
        scatter_heads(z, head_dim, out + start * step, step, part_step, head_step)


@kernel(
    "bf16",
    ROWS,
    ROWS,
    NARROW,
    FLAT,
    FLAT,
    FLAT,
    NARROW,
    FLAT,
    NARROW,
    FLAT,
    types.int64,
    ROWS,
    NARROW_ROWS,
    NARROW_ROWS,
    FLAT,
)
def project_and_feed_forward(
    context, x, project, project_bias, gain, shift, up, up_bias, down, down_bias, ffn, normed, left, hidden, tile
):
    """`fp32.project_and_feed_forward` with packed bf16 weights; `hidden` (GROUP_ROWS, > F) has room for whole tiles."""
    width = x.shape[1]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start, stop = x.shape[0] * group // groups, x.shape[0] * (group + 1) // groups
        rows, count = x[start:stop], stop - start
        y, a, h = normed[:count], left[:count], hidden[:count]
        narrow_rows(context[start:stop], width, a)
        linear_bf16(a, width, project, project_bias, width, ADD, rows.ctypes.data, 4 * width, tile)
        layer_norm(rows, gain, shift, y)
        narrow_rows(y, width, a)
        linear_bf16(a, width, up, up_bias, ffn, GELU_BF16, h.ctypes.data, 2 * h.shape[1], tile)
        linear_bf16(h, ffn, down, down_bias, width, ADD, rows.ctypes.data, 4 * width, tile)
