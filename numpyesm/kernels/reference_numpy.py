"""The model's arithmetic in plain NumPy: readable, complete, and the reference for every other backend.

Shapes as in `base.py`. Every function works on a block of rows small enough to stay in the CPU's caches, mostly in
place: at these sizes memory traffic, not arithmetic, is what NumPy code pays for.
"""

from __future__ import annotations

import copy
import math
import threading
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np

from ..weights.checkpoint import FREQUENCIES, Checkpoint
from .base import Array, AttentionMaps, SteppedKernels
from .blas import blas_threads
from .narrow import NarrowMatrix
from .rotary import rotary_pair_order, rotary_turns
from .scratch import scratch as _scratch

LAYER_NORM_EPSILON = 1e-5

# Numbers that GELU, and bytes of attention scores that softmax, take at a time: what fits a core's L2 cache.
_GELU_ELEMENTS = 32 * 1920
_SCORE_BYTES = 512 * 1024

# OpenBLAS sums in another order when a product is smaller than this (its small-matrix kernels). Rows are padded above
# it, so that a row's result does not depend on how many rows share its block.
_SMALL_PRODUCT = 1_000_000

# BLAS adds up the inner dimension number by number, and rounding grows with the length of the sum. Adding up pieces
# of these sizes makes the error that of torch, whose BLAS has several sums in flight, for 5 % of the time.
_PIECES = {"qkv": 96, "out_proj": 60, "fc1": 160, "fc2": 240, "lm_head": 60, "vocabulary": 0}
# The same for a handful of rows, for which a BLAS has shorter sums still.
_CAREFUL_PIECE = 24

# exp() of a score within ± this neither overflows nor vanishes, even summed over 2050 keys: no need to subtract the
# row's maximum first.
_SAFE_SCORE = 60.0

# gelu(x) = x / (1 + exp(-x P(x²))): P is a minimax fit of logit(Φ(x)) / x, highest power first, weighted by its effect
# on the result; the largest error against the exact erf form is 7e-8 (tools/fit_gelu.py).
_GELU_P = (
    3.6187271938271902e-09,
    -2.67293764072034e-07,
    7.946226863840827e-06,
    -0.00011055588674078872,
    -6.590950812169469e-05,
    0.07266782266675867,
    1.5957689853266488,
)


def layer_norm(x: Array, weight: Array, bias: Array, out: Array | None = None) -> Array:
    """(x - mean) / sqrt(variance + 1e-5) · weight + bias over the last axis: (R, D) -> (R, D)."""
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
    square = np.multiply(x, x, out=_scratch.room("gelu square", x.shape, x.dtype))
    p = np.multiply(square, np.float32(-_GELU_P[0]), out=_scratch.room("gelu p", x.shape, x.dtype))
    p += np.float32(-_GELU_P[1])
    for coefficient in _GELU_P[2:]:
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


def linear(
    x: Array, weight: Array | NarrowMatrix, bias: Array | None = None, piece: int = 0, out: Array | None = None
) -> Array:
    """x @ weight + bias: (R, K), (K, N) -> (R, N); summed in pieces of K, if `piece` is given, for less rounding."""
    inner, columns = weight.shape
    first = min(piece or inner, inner)
    if out is None:
        out = np.empty((len(x), columns), x.dtype)
    _product(x[:, :first], weight[:first], out)
    if first < inner:
        part = _scratch.room("part", out.shape, out.dtype)
        for start in range(first, inner, piece):
            out += _product(x[:, start : start + piece], weight[start : start + piece], part)
    if isinstance(weight, NarrowMatrix) and weight.scale is not None:
        out *= weight.scale
    if bias is not None:
        out += bias
    return out


def _product(x: Array, weight: Array, out: Array) -> Array:
    """x @ weight, each row computed in the same way however many there are."""
    least = _SMALL_PRODUCT // weight.size + 1
    if len(x) >= least:
        return np.matmul(x, weight, out=out)
    padded = np.zeros((least, len(weight)), x.dtype)
    padded[: len(x)] = x
    out[...] = np.matmul(padded, weight)[: len(x)]
    return out


def exp_scores(scores: Array) -> None:
    """exp(score - shift), in place, with a shift a row that keeps it in range: (G, R, L)."""
    highest = scores.max(axis=-1, keepdims=True)
    if not (np.abs(highest) < _SAFE_SCORE).all():
        scores -= highest
    np.exp(scores, out=scores)


class NumpyKernels(SteppedKernels):
    """All steps on NumPy and its BLAS, in float32 or, for reference, float64.

    Query and key columns are reordered at load so that the two channels that rotate together are neighbours: the
    rotation is then one multiplication of complex numbers. Scores do not change, both sides being reordered alike.
    Matrices stored in less than float32 stay so, and with `in_place` those in float32 stay where the file is mapped:
    then the rows that come out are reordered instead, for 2 % of the time and nothing of memory.
    """

    name = "numpy"
    # Below this, two Python threads in lock step lose more to the interpreter lock than they gain; BLAS's threads win.
    single_block_rows = 160

    def __init__(self, checkpoint: Checkpoint, precision: str = "fp32", in_place: bool = False) -> None:
        self.config = checkpoint.config
        self.precision = precision
        self.dtype = np.dtype(np.float64 if precision == "fp64" else np.float32)
        self._pieces = _PIECES
        self._complex = np.dtype(np.complex128 if precision == "fp64" else np.complex64)
        self._rotary = np.empty((0, self.config.embed_dim), self._complex)
        self._rotary_lock = threading.Lock()
        w: dict[str, Any] = {name: self._laid_out(name, checkpoint) for name in checkpoint.tensors}
        self._w = w
        order = rotary_pair_order(self.config)
        self._reorders_rows: list[bool] = []
        for layer in range(self.config.num_layers):
            prefix = f"layers.{layer}.qkv."
            reorders_rows = in_place or isinstance(w[prefix + "weight"], NarrowMatrix)
            if not reorders_rows:
                w[prefix + "weight"] = np.take(w[prefix + "weight"], order, axis=-1)
                w[prefix + "bias"] = w[prefix + "bias"][order]
            self._reorders_rows.append(reorders_rows)
        if checkpoint.has_lm_head:
            w["lm_head.vocabulary"] = np.ascontiguousarray(w["embed_tokens.weight"].T)

    def _laid_out(self, name: str, checkpoint: Checkpoint) -> Array | NarrowMatrix:
        """A tensor as the steps take it: float32, or as it is stored if that is narrower and a matrix of a layer."""
        tensor = checkpoint.tensors[name]
        narrow = self.dtype == np.float32 and NarrowMatrix.suits(tensor) and name != "embed_tokens.weight"
        if narrow:
            return NarrowMatrix(tensor)
        wide: Array = tensor.astype(self.dtype)
        return wide

    @cached_property
    def careful(self) -> NumpyKernels:
        other = copy.copy(self)
        other._pieces = dict.fromkeys(_PIECES, _CAREFUL_PIECE)
        return other

    def session(self, threads: int) -> AbstractContextManager[Any]:
        return blas_threads(threads)

    def embed(self, tokens: Array, scale: Array) -> Array:
        x: Array = self._w["embed_tokens.weight"][tokens]
        x *= scale.astype(self.dtype)[:, None]
        return x

    def rotary_tables(self, length: int) -> Array:
        """`rotary_turns` with queries times C^-1/2: (length, D) complex."""
        with self._rotary_lock:
            if len(self._rotary) < length:
                rows = max(length, min(2 * len(self._rotary), 2050))
                turns = rotary_turns(
                    self._w[FREQUENCIES], self.config.num_heads, rows, query_scale=self.config.head_dim**-0.5
                )
                self._rotary = turns.astype(self._complex)
            return self._rotary[:length]

    def new_qkv(self, rows: int) -> Array:
        return np.empty((rows, 3 * self.config.embed_dim), self.dtype)

    def qkv(self, layer: int, x: Array, rotary: list[Array], out: Array) -> None:
        w, prefix = self._w, f"layers.{layer}."
        y = _scratch.room("norm", x.shape, self.dtype)
        layer_norm(x, w[prefix + "attention_norm.weight"], w[prefix + "attention_norm.bias"], out=y)
        weight, bias = w[prefix + "qkv.weight"], w[prefix + "qkv.bias"]
        if self._reorders_rows[layer]:
            self._pair_up(
                linear(y, weight, bias, self._pieces["qkv"], out=_scratch.room("qkv", out.shape, self.dtype)), out
            )
        else:
            linear(y, weight, bias, self._pieces["qkv"], out=out)
        pairs = out[:, : 2 * self.config.embed_dim].view(self._complex)
        start = 0
        for table in rotary:
            pairs[start : start + len(table)] *= table
            start += len(table)

    def _pair_up(self, plain: Array, out: Array) -> None:
        """Rows of query, key and value in the checkpoint's order -> out, as `rotary_pair_order` has them: (R, 3D)."""
        rows, turned = len(plain), 2 * self.config.embed_dim
        halves = plain[:, :turned].reshape(rows, -1, 2, self.config.head_dim // 2)
        out[:, :turned].reshape(rows, -1, self.config.head_dim // 2, 2)[...] = halves.swapaxes(2, 3)
        out[:, turned:] = plain[:, turned:]

    def _heads(self, qkv: Array, part: int) -> Array:
        """Query (0), key (1) or value (2) as (H, R, C), a view."""
        width = self.config.embed_dim
        columns = qkv[:, part * width : (part + 1) * width]
        return columns.reshape(len(qkv), self.config.num_heads, self.config.head_dim).swapaxes(0, 1)

    def attention(self, query: Array, keys: Array, out: Array | None, maps: AttentionMaps | None) -> None:
        q, k, v = self._heads(query, 0), self._heads(keys, 1), self._heads(keys, 2)
        rows, length = len(query), len(keys)
        group = max(1, _SCORE_BYTES // (rows * length * self.dtype.itemsize))
        room = _scratch.room("scores", (min(group, len(q)), rows, length), self.dtype)
        if maps is not None and maps.summary is not None:
            maps.summary[...] = 0
        for first in range(0, len(q), group):
            heads = slice(first, min(first + group, len(q)))
            scores = np.matmul(q[heads], k[heads].swapaxes(1, 2), out=room[: heads.stop - first])  # (G, R, L)
            exp_scores(scores)
            norm = 1 / scores.sum(axis=-1)  # (G, R)
            if out is not None:
                context = np.matmul(scores, v[heads])  # (G, R, C)
                context *= norm[:, :, None]
                out.reshape(rows, *q.shape[::2])[:, heads] = context.swapaxes(0, 1)
            if maps is not None:
                _add_to_maps(maps, first, scores, norm)

    def project_and_feed_forward(self, layer: int, context: Array, x: Array) -> None:
        w, prefix = self._w, f"layers.{layer}."
        y = _scratch.room("norm", x.shape, self.dtype)
        h = _scratch.room("hidden", (len(x), self.config.ffn_dim), self.dtype)
        x += linear(
            context, w[prefix + "out_proj.weight"], w[prefix + "out_proj.bias"], self._pieces["out_proj"], out=y
        )
        layer_norm(x, w[prefix + "ffn_norm.weight"], w[prefix + "ffn_norm.bias"], out=y)
        linear(y, w[prefix + "fc1.weight"], w[prefix + "fc1.bias"], self._pieces["fc1"], out=h)
        gelu(h)
        x += linear(h, w[prefix + "fc2.weight"], w[prefix + "fc2.bias"], self._pieces["fc2"], out=y)

    def final_norm(self, x: Array, out: Array) -> None:
        layer_norm(x, self._w["final_norm.weight"], self._w["final_norm.bias"], out=out)

    def lm_head(self, x: Array) -> Array:
        w = self._w
        y = linear(x, w["lm_head.dense.weight"], w["lm_head.dense.bias"], self._pieces["lm_head"])
        gelu(y)
        y = layer_norm(y, w["lm_head.norm.weight"], w["lm_head.norm.bias"])
        return linear(y, w["lm_head.vocabulary"], w["lm_head.bias"], self._pieces["vocabulary"])


def _add_to_maps(maps: AttentionMaps, first: int, scores: Array, norm: Array) -> None:
    """Add the heads `first ...` of one tile: unnormalised attention (G, R, L) and 1 / row sum (G, R)."""
    if maps.summary is not None:
        maps.summary += np.matmul(norm[:, None, :], scores)[:, 0].sum(axis=0)
    if maps.full is not None:
        np.multiply(scores, norm[:, :, None], out=maps.full[first : first + len(scores)])
    if maps.heads is None:
        return
    assert maps.coefficients is not None
    assert maps.weighted is not None
    assert maps.row_sums is not None
    assert maps.column_sums is not None
    here = np.flatnonzero((maps.heads >= first) & (maps.heads < first + len(scores)))
    for index in here:
        head = maps.heads[index] - first
        unnormalised = scores[head][maps.rows, 1:-1]  # (r, L - 2)
        # In float64: where attention is spread evenly, the map and its average product cancel to a few digits.
        attention = _scratch.room("attention", unnormalised.shape, np.dtype(np.float64))
        np.multiply(unnormalised, norm[head][maps.rows, None], out=attention)
        maps.row_sums[index] = attention.sum(axis=1)
        maps.column_sums[index] = attention.sum(axis=0)
        attention *= maps.coefficients[index]
        maps.weighted += attention
