"""The arithmetic of `numpyesm.reference` on NumPy, made for speed: blocks of rows in float32, mostly in place.

Shapes as in `base.py`. GELU and attention take pieces of a block that stay in the CPU's caches: at these sizes memory
traffic, not arithmetic, is what NumPy code pays for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Array, AttentionMaps
from .constants import GELU_POLYNOMIAL, LAYER_NORM_EPSILON
from .narrow import WIDENED_ROWS, NarrowMatrix
from .scratch import scratch

# Numbers that GELU, and bytes of attention scores that softmax, take at a time: what fits a core's L2 cache.
_GELU_ELEMENTS = 48 * 1920
SCORE_BYTES = 1024 * 1024

# OpenBLAS sums in another order when a product is smaller than this (its small-matrix kernels). Rows are padded above
# it, so that a row's result does not depend on how many rows share its block. On AVX2 it still depends on the row's
# place: of every 12 rows the first 6 are summed in another order than the last 6.
_SMALL_PRODUCT = 1_000_000

# exp() of a score within ± this neither overflows nor vanishes, even summed over 2050 keys: no need to subtract the
# row's maximum first.
_SAFE_SCORE = 60.0


def layer_norm(x: Array, weight: Array, bias: Array, out: Array) -> Array:
    """(x - mean) / sqrt(variance + 1e-5) · weight + bias over the last axis: (R, D) -> out (R, D), which may be x."""
    y: Array = np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
    variance = np.einsum("ij,ij->i", y, y) / x.dtype.type(x.shape[1])
    y *= (1 / np.sqrt(variance + x.dtype.type(LAYER_NORM_EPSILON)))[:, None]
    y *= weight
    y += bias
    return y


def gelu(x: Array) -> None:
    """x · (1 + erf(x / √2)) / 2, the exact form, in place: (R, F)."""
    if x.dtype == np.float64:
        x *= 0.5 * (1.0 + _erf_float64(x * math.sqrt(0.5)))
        return
    rows = max(1, _GELU_ELEMENTS // x.shape[1])
    for start in range(0, len(x), rows):
        _gelu_float32(x[start : start + rows])


def _gelu_float32(x: Array) -> None:
    """gelu(x) in place, for a piece that fits the cache."""
    square = np.multiply(x, x, out=scratch("gelu square", x.shape, x.dtype))
    p = np.multiply(square, np.float32(-GELU_POLYNOMIAL[0]), out=scratch("gelu p", x.shape, x.dtype))
    p += np.float32(-GELU_POLYNOMIAL[1])
    for coefficient in GELU_POLYNOMIAL[2:]:
        p *= square
        p += np.float32(-coefficient)
    p *= x
    with np.errstate(over="ignore"):  # exp is infinite below x = -13, and the result is then -0
        np.exp(p, out=p)
    p += np.float32(1)
    x /= p


def _erf_float64(x: Array) -> Array:
    """erf to float64 rounding; slow, for the reference precision only."""
    return np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def linear(x: Array, weight: Array | NarrowMatrix, bias: Array, out: Array | None = None) -> Array:
    """x @ weight + bias: (R, K), (K, N) -> (R, N)."""
    if out is None:
        out = np.empty((len(x), weight.shape[1]), x.dtype)
    step = WIDENED_ROWS if isinstance(weight, NarrowMatrix) else len(weight)
    _product(x[:, :step], weight[:step], out)
    for start in range(step, weight.shape[0], step):
        rows = slice(start, start + step)
        out += _product(x[:, rows], weight[rows], scratch("part", out.shape, out.dtype))
    out += bias
    return out


def _product(x: Array, weight: Array, out: Array) -> Array:
    """x @ weight, with products large enough that all take the same path through BLAS."""
    least = _SMALL_PRODUCT // weight.size + 1
    if len(x) >= least:
        return np.matmul(x, weight, out=out)
    padded = np.zeros((least, len(weight)), x.dtype)
    padded[: len(x)] = x
    out[...] = np.matmul(padded, weight)[: len(x)]
    return out


def attend(q: Array, k: Array, v: Array, out: Array | None, maps: AttentionMaps | None) -> None:
    """Attention of some rows of a sequence, and what it leaves for `maps`: (H, R, C), (H, L, C) -> out (R, H, C).

    The last channel of `v` (H, L, C + 1) is ones: its products are the sums of the rows' exponentials.
    """
    rows, length, channels = q.shape[1], *k.shape[1:]
    group = min(len(q), max(1, SCORE_BYTES // (rows * length * q.dtype.itemsize)))
    # BLAS is fastest with the rows of these products innermost in memory; maps are read along the keys.
    turned = maps is None
    room = _room("scores", (group, rows, length), q.dtype, turned)
    sums = _room("sums", (len(q), rows, channels + 1), q.dtype, turned)
    longest = [np.einsum("hrc,hrc->hr", x, x).max(axis=1) for x in (q, k)]
    within_range = longest[0] * longest[1] < _SAFE_SCORE**2  # (H,), since |q · k| <= |q| |k|
    if maps is not None and maps.summary is not None:
        maps.summary[...] = 0
    for first in range(0, len(q), group):
        heads = slice(first, min(first + group, len(q)))
        scores = np.matmul(q[heads], k[heads].swapaxes(1, 2), out=room[: heads.stop - first])  # (G, R, L)
        if not within_range[heads].all():
            scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        context = np.matmul(scores, v[heads], out=sums[heads])  # (G, R, C + 1)
        if maps is not None:
            _add_to_maps(maps, first, scores, 1 / context[:, :, channels])
    if out is not None:
        np.divide(sums[:, :, :channels], sums[:, :, channels:], out=out.swapaxes(0, 1))


def _room(name: str, shape: tuple[int, int, int], dtype: np.dtype[Any], turned: bool) -> Array:
    """`scratch`, with the last two axes in each other's place in memory if it is `turned`."""
    if turned:
        return scratch(name, (shape[0], shape[2], shape[1]), dtype).swapaxes(1, 2)
    return scratch(name, shape, dtype)


def _add_to_maps(maps: AttentionMaps, first: int, scores: Array, norm: Array) -> None:
    """Add the heads `first ...` of one tile: unnormalised attention (G, R, L) and 1 / row sum (G, R)."""
    if maps.summary is not None:
        maps.summary += np.matmul(norm[:, None, :], scores)[:, 0].sum(axis=0)
    if maps.full is not None:
        np.multiply(scores, norm[:, :, None], out=maps.full[first : first + len(scores)])
    for index in np.flatnonzero((maps.heads >= first) & (maps.heads < first + len(scores))):
        head = maps.heads[index] - first
        unnormalised = scores[head][maps.rows, 1:-1]  # (r, L - 2)
        # In float64: where attention is spread evenly, the map and its average product cancel to a few digits.
        attention = scratch("attention", unnormalised.shape, np.dtype(np.float64))
        np.multiply(unnormalised, norm[head][maps.rows, None], out=attention)
        maps.row_sums[index] = attention.sum(axis=1)
        maps.column_sums[index] = attention.sum(axis=0)
        attention *= maps.coefficients[index]
        maps.weighted += attention
