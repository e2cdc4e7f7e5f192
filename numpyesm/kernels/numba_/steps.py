"""Steps on rows beside the products: LayerNorm and rotation."""

from __future__ import annotations

import math

import numpy as np

from ..reference_numpy import LAYER_NORM_EPSILON
from .cache import helper
from .emitter import ISA, LANES, copy_eight, load_number, store_bf16, store_number, store_number_bf16

_EPSILON = np.float32(LAYER_NORM_EPSILON)
_ONE = np.float32(1)
_ZERO = np.float32(0)

# What a sum over a row needs to be vectorised; infinities and NaN keep their meaning.
REASSOCIATE = {"reassoc", "contract", "nsz"}


@helper(fastmath=REASSOCIATE)
def layer_norm(x, weight, bias, out):
    """(x - mean) / sqrt(variance + 1e-5) · weight + bias for each row: (R, ≥ D), (D,), (D,) -> out (R, ≥ D)."""
    width = weight.shape[0]
    for i in range(x.shape[0]):
        total = _ZERO
        for j in range(width):
            total += x[i, j]
        mean = total / np.float32(width)
        square = _ZERO
        for j in range(width):
            difference = x[i, j] - mean
            square += difference * difference
        scale = _ONE / np.float32(math.sqrt(square / np.float32(width) + _EPSILON))
        for j in range(width):
            out[i, j] = (x[i, j] - mean) * scale * weight[j] + bias[j]


@helper
def rotate(x, table, positions):
    """Multiply the first 2D channels, taken as D complex numbers, by the table's row of their position, in place.

    x (R, ≥ 2D), table (positions, 2D) as (real, imaginary) pairs, positions (R,).
    """
    for i in range(x.shape[0]):
        turn = table[positions[i]]
        row = x[i]
        for j in range(table.shape[1] // 2):
            real, imaginary = row[2 * j], row[2 * j + 1]
            cosine, sine = turn[2 * j], turn[2 * j + 1]
            row[2 * j] = real * cosine - imaginary * sine
            row[2 * j + 1] = real * sine + imaginary * cosine


@helper
def scatter_heads(x, head_dim, out, step, part_step, head_step):
    """Rows of (part, head, channel) to where each head's rows follow each other: (R, 3D) -> address `out`.

    There, rows are `step` bytes apart, query, key and value `part_step`, heads `head_step`.
    """
    heads = x.shape[1] // (3 * head_dim)
    source = x.ctypes.data
    for part in range(3):
        for head in range(heads):
            first = 4 * (part * heads + head) * head_dim
            for i in range(x.shape[0]):
                row = source + 4 * i * x.shape[1] + first
                target = out + i * step + part * part_step + head * head_step
                whole = head_dim // 8 * 8
                for channel in range(0, whole, 8):
                    copy_eight(row + 4 * channel, target + 4 * channel)
                for channel in range(whole, head_dim):
                    store_number(load_number(row + 4 * channel), target + 4 * channel)


@helper
def narrow_rows(x, width, out):
    """The first `width` columns, rounded to bf16: (R, ≥ width) -> out (R, ≥ width) uint16"""
    whole = width // LANES * LANES
    for i in range(x.shape[0]):
        source, target = x.ctypes.data + 4 * i * x.shape[1], out.ctypes.data + 2 * i * out.shape[1]
        for j in range(0, whole, LANES):
            store_bf16(source + 4 * j, target + 2 * j)
        for j in range(whole, width):
            store_number_bf16(source + 4 * j, target + 2 * j)


# ARM multiplies signed by signed bytes, x86 unsigned by signed.
_LOWEST_BYTE = 128 if ISA.name == "neon" else 0


@helper(fastmath={"nnan", "nsz", "reassoc"})
def quantise_rows(x, width, out, scales, offsets):
    """Each row as whole numbers from 0 to 255 between its least and its greatest: (R, ≥ width) -> out uint8, (R,), (R,)

    x is about `scales[r] · out + offsets[r]`. On ARM 128 is taken off, so that the bytes are signed.
    """
    for i in range(x.shape[0]):
        low = high = x[i, 0]
        for j in range(width):
            low = min(low, x[i, j])
            high = max(high, x[i, j])
        scale = (high - low) / np.float32(255)
        inverse = np.float32(0) if scale == 0 else _ONE / scale
        for j in range(width):
            level = np.int32((x[i, j] - low) * inverse + np.float32(0.5))
            out[i, j] = np.uint8(level - _LOWEST_BYTE)
        scales[i] = scale
        offsets[i] = low + np.float32(_LOWEST_BYTE) * scale
