"""A forward pass put together from the steps of a backend: blocks of rows, one barrier a layer.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1, while the rows are in its cache. Attention reads keys and values of the whole
sequence, so the threads wait for each other once a layer, and query/key/value have two buffers that take turns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ..batch import BLOCK_ROWS, Batch, Block, Tile
from ..threads import WorkerPool
from .base import Array, AttentionMaps, Cut, Forward, SteppedKernels, divide_threads


class SteppedForward(Forward):
    """See `Forward`.

    Parameters
    ----------
    kernels : SteppedKernels
    pool : WorkerPool
    batch : Batch
    layers : int
        Layers that will be asked for.
    cut : Cut
    """

    def __init__(self, kernels: SteppedKernels, pool: WorkerPool, batch: Batch, layers: int, cut: Cut) -> None:
        self._kernels, self._pool, self._layers, self._done = kernels, pool, layers, 0
        self._threads = cut.threads
        block_threads, self._step_threads = divide_threads(kernels, batch.num_rows, cut.threads)
        self._blocks = batch.blocks(block_threads, cut.block_rows or BLOCK_ROWS)
        self.x = kernels.embed(batch.tokens, batch.embedding_scale)  # (T, D)
        if layers == 0:
            return
        self._rotary = kernels.rotary_tables(max(last - first for first, last in batch.spans))
        self._qkv, self._next_qkv = kernels.new_qkv(batch.num_rows), kernels.new_qkv(batch.num_rows)
        with kernels.session(self._step_threads):
            pool.run(lambda block: self._project_qkv(0, block, self._qkv), self._blocks, self._threads)

    def advance(
        self,
        stop: int,
        maps: Sequence[AttentionMaps | None] | None = None,
        maps_only: bool = False,
        rows: Array | None = None,
    ) -> None:
        blocks = self._blocks if rows is None else _blocks_with(self._blocks, rows)
        with self._kernels.session(self._step_threads):
            while self._done < stop:
                self._pool.run(lambda block: self._run_layer(block, maps, maps_only), blocks, self._threads)
                self._qkv, self._next_qkv = self._next_qkv, self._qkv
                self._done += 1

    def _run_layer(self, block: Block, maps: Sequence[AttentionMaps | None] | None, maps_only: bool) -> None:
        """The next layer of one block, and what the layer after it needs."""
        kernels, layer = self._kernels, self._done
        rows = self.x[block.start : block.stop]
        context = None if maps_only else np.empty_like(rows)
        for tile in block.tiles:
            out = None if context is None else context[tile.start - block.start : tile.stop - block.start]
            wanted = maps[tile.index] if maps else None
            kernels.attention(self._qkv[tile.start : tile.stop], self._qkv[tile.first : tile.last], out, wanted)
        if context is None:
            return
        kernels.project_and_feed_forward(layer, context, rows)
        if layer + 1 < self._layers:
            self._project_qkv(layer + 1, block, self._next_qkv)
        elif layer + 1 == kernels.config.num_layers:
            kernels.final_norm(rows, out=rows)

    def _project_qkv(self, layer: int, block: Block, out: Array) -> None:
        rows = slice(block.start, block.stop)
        pieces = [self._rotary[tile.start - tile.first : tile.stop - tile.first] for tile in block.tiles]
        self._kernels.qkv(layer, self.x[rows], pieces, out[rows])


def _blocks_with(blocks: Sequence[Block], rows: Array) -> list[Block]:
    """The blocks without the tiles that hold none of these rows; a block falls apart where tiles are missing."""
    wanted = np.sort(rows)

    def holds(tile: Tile) -> bool:
        return bool(np.searchsorted(wanted, tile.start) < np.searchsorted(wanted, tile.stop))

    return [
        Block(tuple(tiles)) for block in blocks for needed, tiles in itertools.groupby(block.tiles, holds) if needed
    ]
