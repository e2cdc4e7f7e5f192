"""The NumPy backend: weights as its steps take them, and a pass put together from the steps, one barrier per layer.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1. BLAS lays out the weights anew for every product, which large blocks pay for.
Attention reads keys and values of the whole sequence, so the threads wait for each other once per layer, and
query/key/value have two buffers that take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..batch import BLOCK_ROWS, Batch, Block, Tile, cut_evenly
from ..threads import WorkerPool
from ..weights.checkpoint import FREQUENCIES, Checkpoint
from .base import Array, AttentionMaps, Forward, Kernels
from .blas import blas_threads
from .narrow import NarrowMatrix
from .numpy_steps import SCORE_BYTES, attend, gelu, layer_norm, linear
from .rotary import rotary_turns
from .scratch import scratch
from .shared import shared

# Batches of at most this many rows are one block: two Python threads in lock step would lose more to the interpreter
# lock than they gain, and BLAS's own threads win.
_SINGLE_BLOCK_ROWS = 160
# Rows that attention takes at a time at least, if the sequence has so many: fewer cost more than scores out of cache.
_FEWEST_ATTENDED = 128
# Numbers in a cache line, of which a row of query, key and value has a whole number.
_LINE = 16


class NumpyKernels(Kernels):
    """Weights laid out for NumPy and its BLAS, in float32 or, for tests, float64.

    All steps may be called from several threads at once, on blocks that do not overlap.

    Query and key columns are reordered at load so that the two channels that rotate together are neighbours: the
    rotation is then one multiplication of complex numbers. Scores do not change, both sides being reordered alike.
    Values have one more channel, of ones: what attention makes of it is the sum of the row's exponentials. Such a row
    has W numbers. Matrices stored in less than float32 stay as they are, and with `in_place` those in float32 stay
    where the file is mapped: then the rows that come out are reordered instead, for 2 % of the time and nothing of
    memory.
    """

    name = "numpy"

    def __init__(self, checkpoint: Checkpoint, precision: str = "fp32", in_place: bool = False) -> None:
        self.config = checkpoint.config
        self.precision = precision
        self.dtype = np.dtype(np.float64 if precision == "fp64" else np.float32)
        self._complex = np.dtype(np.complex128 if precision == "fp64" else np.complex64)
        self._rotary = np.empty((0, self.config.embed_dim), self._complex)
        w: dict[str, Any] = {name: self._laid_out(name, checkpoint) for name in checkpoint.tensors}
        self._w = w
        names = [f"layers.{layer}.qkv." for layer in range(self.config.num_layers)]
        self._reorders_rows = [in_place or isinstance(w[name + "weight"], NarrowMatrix) for name in names]
        for name, reorders_rows in zip(names, self._reorders_rows, strict=True):
            if reorders_rows:
                continue
            tensor, plain = checkpoint.tensors[name + "weight"], w[name + "weight"]
            w[name + "weight"] = shared(tensor, (self.dtype, "heads"), partial(self._rearranged, plain, 0))
            w[name + "bias"] = self._rearranged(w[name + "bias"][None], 1)[0]
        if checkpoint.has_lm_head:
            w["lm_head.vocabulary"] = checkpoint.vocabulary(self.dtype)

    def _laid_out(self, name: str, checkpoint: Checkpoint) -> Array | NarrowMatrix:
        """A tensor as the steps take it: float32, or as it is stored if that is narrower and a matrix of a layer."""
        tensor = checkpoint.tensors[name]
        narrow = self.dtype == np.float32 and NarrowMatrix.suits(tensor) and name != "embed_tokens.weight"
        if narrow:
            return NarrowMatrix(tensor)
        return shared(tensor, self.dtype, lambda: tensor.astype(self.dtype))

    def forward(
        self, pool: WorkerPool, batch: Batch, layers: int, threads: int, block_rows: int | None, whole_tiles: bool
    ) -> Forward:
        return NumpyForward(self, pool, batch, layers, threads, block_rows or BLOCK_ROWS)

    def embed(self, tokens: Array, scale: Array) -> Array:
        """Rows of the embedding times their scale: (T,), (T,) -> (T, D)."""
        x: Array = self._w["embed_tokens.weight"][tokens]
        x *= scale.astype(self.dtype)[:, None]
        return x

    def rotary_tables(self, length: int) -> Array:
        """`rotary_turns` with queries times C^-1/2: (length, D) complex."""
        rotary = self._rotary
        if len(rotary) < length:  # two threads may both make one, and each keeps its own
            rows = max(length, min(2 * len(rotary), 2050))
            turns = rotary_turns(
                self._w[FREQUENCIES], self.config.num_heads, rows, query_scale=self.config.head_dim**-0.5
            )
            rotary = self._rotary = turns.astype(self._complex)
        return rotary[:length]

    def new_qkv(self, rows: int) -> Array:
        """Uninitialised query, key and value of `rows` rows: (T, W)."""
        width = 3 * self.config.embed_dim + self.config.num_heads
        return np.empty((rows, -(-width // _LINE) * _LINE), self.dtype)

    def qkv(self, layer: int, x: Array, rotary: list[Array], out: Array) -> None:
        """LayerNorm, query/key/value projection, rotation: (R, D) -> out (R, W).

        `rotary` holds consecutive parts of the rotary table that together cover the R rows.
        """
        name = f"layers.{layer}"
        y = self._norm(f"{name}.attention_norm", x, scratch("norm", x.shape, self.dtype))
        if self._reorders_rows[layer]:
            plain = scratch("qkv", (len(x), 3 * self.config.embed_dim), self.dtype)
            self._rearrange(self._linear(f"{name}.qkv", y, plain), out, 1)
        else:
            self._linear(f"{name}.qkv", y, out)
        pairs = out[:, : 2 * self.config.embed_dim].view(self._complex)
        start = 0
        for table in rotary:
            pairs[start : start + len(table)] *= table
            start += len(table)

    def _rearranged(self, plain: Array, ones: int) -> Array:
        """`_rearrange` into a new array: (R, 3·D) -> (R, W)."""
        out = self.new_qkv(len(plain))
        out[:, 3 * self.config.embed_dim :] = 0  # also what no head reads
        self._rearrange(plain, out, ones)
        return out

    def _rearrange(self, plain: Array, out: Array, ones: int) -> None:
        """Rows with the checkpoint's columns of query, key and value, to rows as they lie here: (R, 3·D) -> (R, W)."""
        rows, turned, channels = len(plain), 2 * self.config.embed_dim, self.config.head_dim
        halves = plain[:, :turned].reshape(rows, -1, 2, channels // 2)
        out[:, :turned].reshape(rows, -1, channels // 2, 2)[...] = halves.swapaxes(2, 3)
        values = self._heads(out)[2].swapaxes(0, 1)
        values[:, :, :channels] = plain[:, turned:].reshape(rows, -1, channels)
        values[:, :, channels] = ones

    def _heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Query (H, R, C), key (H, R, C), and value with its channel of ones (H, R, C + 1), as views."""
        width, heads = self.config.embed_dim, self.config.num_heads
        parts = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width : 3 * width + heads]
        query, key, value = (part.reshape(len(qkv), heads, -1).swapaxes(0, 1) for part in parts)
        return query, key, value

    def attention(self, query: Array, keys: Array, out: Array | None, maps: AttentionMaps | None) -> None:
        """Attention of the rows `query` of `qkv`'s output over the sequence `keys`: -> out (R, D)."""
        q, (_, k, v) = self._heads(query)[0], self._heads(keys)
        shaped = None if out is None else out.reshape(len(query), self.config.num_heads, self.config.head_dim)
        attend(q, k, v, shaped, maps)

    def project_and_feed_forward(self, layer: int, context: Array, x: Array) -> None:
        """x += out_proj(context); x += fc2(gelu(fc1(LayerNorm(x)))), in place: (R, D), (R, D)."""
        name = f"layers.{layer}"
        y = scratch("norm", x.shape, self.dtype)
        x += self._linear(f"{name}.out_proj", context, y)
        self._norm(f"{name}.ffn_norm", x, y)
        h = self._linear(f"{name}.fc1", y, scratch("hidden", (len(x), self.config.ffn_dim), self.dtype))
        gelu(h)
        x += self._linear(f"{name}.fc2", h, y)

    def final_norm(self, x: Array) -> None:
        """LayerNorm after the last layer, in place: (R, D)."""
        self._norm("final_norm", x, x)

    def lm_head(self, x: Array) -> Array:
        y = self._linear("lm_head.dense", x)
        gelu(y)
        y = self._norm("lm_head.norm", y, y)
        return linear(y, self._w["lm_head.vocabulary"], self._w["lm_head.bias"])

    def _linear(self, name: str, x: Array, out: Array | None = None) -> Array:
        return linear(x, self._w[f"{name}.weight"], self._w[f"{name}.bias"], out)

    def _norm(self, name: str, x: Array, out: Array) -> Array:
        return layer_norm(x, self._w[f"{name}.weight"], self._w[f"{name}.bias"], out)


class NumpyForward(Forward):
    """See `Forward`."""

    def __init__(
        self, kernels: NumpyKernels, pool: WorkerPool, batch: Batch, layers: int, threads: int, block_rows: int
    ) -> None:
        self._kernels, self._pool, self._layers, self._done = kernels, pool, layers, 0
        self._threads = threads
        block_threads, self._step_threads = (1, threads) if batch.num_rows <= _SINGLE_BLOCK_ROWS else (threads, 1)
        self._blocks = batch.blocks(block_threads, block_rows)
        self.x = kernels.embed(batch.tokens, batch.embedding_scale)  # (T, D)
        if layers == 0:
            return
        self._rotary = kernels.rotary_tables(max(last - first for first, last in batch.spans))
        self._qkv, self._next_qkv = kernels.new_qkv(batch.num_rows), kernels.new_qkv(batch.num_rows)
        pool.run(lambda block: self._project_qkv(0, block, self._qkv), self._blocks, self._threads)

    def advance(
        self, stop: int, maps: Sequence[AttentionMaps] = (), maps_only: bool = False, rows: Array | None = None
    ) -> None:
        while self._done < stop:
            last = self._done + 1 == stop
            blocks = self._blocks if rows is None or not last else _blocks_with(self._blocks, rows)
            self._pool.run(lambda block: self._run_layer(block, maps, maps_only), blocks, self._threads)
            self._qkv, self._next_qkv = self._next_qkv, self._qkv
            self._done += 1

    def _run_layer(self, block: Block, maps: Sequence[AttentionMaps], maps_only: bool) -> None:
        """The next layer of one block, and what the layer after it needs."""
        kernels, layer = self._kernels, self._done
        rows = self.x[block.start : block.stop]
        context = None if maps_only else scratch("context", rows.shape, rows.dtype)
        with blas_threads(1):  # the products of one head are too small to divide
            for tile in block.tiles if maps else _attended(block, rows.dtype.itemsize):
                out = None if context is None else context[tile.start - block.start : tile.stop - block.start]
                wanted = maps[tile.index] if maps else None
                kernels.attention(self._qkv[tile.start : tile.stop], self._qkv[tile.first : tile.last], out, wanted)
        if context is None:
            return
        with blas_threads(self._step_threads):
            kernels.project_and_feed_forward(layer, context, rows)
        if layer + 1 < self._layers:
            self._project_qkv(layer + 1, block, self._next_qkv)
        elif layer + 1 == kernels.config.num_layers and kernels.config.whole_layers is None:
            kernels.final_norm(rows)

    def _project_qkv(self, layer: int, block: Block, out: Array) -> None:
        rows = slice(block.start, block.stop)
        pieces = [self._rotary[tile.start - tile.first : tile.stop - tile.first] for tile in block.tiles]
        with blas_threads(self._step_threads):
            self._kernels.qkv(layer, self.x[rows], pieces, out[rows])


def _attended(block: Block, itemsize: int) -> Iterator[Tile]:
    """A block's tiles, those of one sequence together as far as scores of a head fit their room."""
    for _, run in itertools.groupby(block.tiles, lambda tile: tile.sequence):
        tiles = list(run)
        first, last = tiles[0], tiles[-1]
        most = max(_FEWEST_ATTENDED, SCORE_BYTES // (itemsize * (first.last - first.first)))
        for start, stop in cut_evenly(first.start, last.stop, -(-(last.stop - first.start) // most)):
            yield replace(first, start=start, stop=stop)


def _blocks_with(blocks: Sequence[Block], rows: Array) -> list[Block]:
    """The blocks without the tiles that hold none of these rows; a block falls apart where tiles are missing."""
    wanted = np.sort(rows)

    def holds(tile: Tile) -> bool:
        return bool(np.searchsorted(wanted, tile.start) < np.searchsorted(wanted, tile.stop))

    return [
        Block(tuple(tiles)) for block in blocks for needed, tiles in itertools.groupby(block.tiles, holds) if needed
    ]
