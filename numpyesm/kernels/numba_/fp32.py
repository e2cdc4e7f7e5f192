"""The linear steps of a layer, and the LM head, in float32."""

from __future__ import annotations

from numba import types

from .cache import kernel
from .gemm import ADD, GELU, STORE, linear
from .steps import layer_norm, rotate, scatter_heads

ROWS = types.float32[:, ::1]
FLAT = types.float32[::1]
INDEX = types.int64[::1]

# Lengths of the sums' pieces. Where torch's own rounding is small, ours must be too: queries and keys end up in an
# exponent, and the projection's error stays in the residual stream.
_QKV_PIECE, _PROJECTION_PIECE, _PIECE = 120, 96, 160

# Rows whose hidden activations are held at a time, at most: they stay in the second cache beside a panel of weights.
GROUP_ROWS = 100


@kernel("fp32", ROWS, FLAT, FLAT, FLAT, FLAT, ROWS, INDEX, *[types.int64] * 5, ROWS, ROWS, FLAT)
def project_qkv(
    x, gain, shift, weight, bias, table, positions, head_dim, out, step, part_step, head_step, normed, projected, tile
):
    """LayerNorm(x) @ weight + bias, rotated, head by head: (R, D) -> address `out`, see `scatter_heads`.

    `normed` (GROUP_ROWS, ≥ D), `projected` (GROUP_ROWS, 3D) and `tile` are room.
    """
    width = x.shape[1]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start = x.shape[0] * group // groups
        rows = x[start : x.shape[0] * (group + 1) // groups]
        y, z = normed[: rows.shape[0]], projected[: rows.shape[0]]
        layer_norm(rows, gain, shift, y)
        linear(y, width, _QKV_PIECE, weight, bias, 3 * width, STORE, z, tile)
        rotate(z, table, positions[start:])
        scatter_heads(z, head_dim, out + start * step, step, part_step, head_step)


@kernel("fp32", ROWS, ROWS, FLAT, FLAT, FLAT, FLAT, FLAT, FLAT, FLAT, FLAT, types.int64, ROWS, ROWS, FLAT)
def project_and_feed_forward(
    context, x, project, project_bias, gain, shift, up, up_bias, down, down_bias, ffn, normed, hidden, tile
):
    """x += context @ project; x += gelu(LayerNorm(x) @ up) @ down, each with its bias, in place: (R, D), (R, D).

    `normed` (GROUP_ROWS, ≥ D), `hidden` (GROUP_ROWS, ≥ F) and `tile` are room.
    """
    width = x.shape[1]
    groups = (x.shape[0] + GROUP_ROWS - 1) // GROUP_ROWS
    for group in range(groups):
        start, stop = x.shape[0] * group // groups, x.shape[0] * (group + 1) // groups
        rows, count = x[start:stop], stop - start
        y, h = normed[:count], hidden[:count]
        linear(context[start:stop], width, _PROJECTION_PIECE, project, project_bias, width, ADD, rows, tile)
        layer_norm(rows, gain, shift, y)
        linear(y, width, _PIECE, up, up_bias, ffn, GELU, h, tile)
        linear(h, ffn, _PIECE, down, down_bias, width, ADD, rows, tile)


@kernel("all", ROWS, FLAT, FLAT, ROWS)
def normalise(x, gain, shift, out):
    """LayerNorm: (R, D) -> out (R, D)"""
    layer_norm(x, gain, shift, out)


@kernel("all", ROWS, FLAT, FLAT, FLAT, FLAT, FLAT, FLAT, ROWS, ROWS, FLAT)
def lm_head(x, dense, dense_bias, gain, shift, embedding, bias, hidden, out, tile):
    """out = LayerNorm(gelu(x @ dense + its bias)) @ embedding + bias: (R, D) -> (R, V). `hidden` (R, ≥ D) is room."""
    width = x.shape[1]
    linear(x, width, _PROJECTION_PIECE, dense, dense_bias, width, GELU, hidden, tile)
    layer_norm(hidden, gain, shift, hidden)
    linear(hidden, width, _PIECE, embedding, bias, out.shape[1], STORE, out, tile)
