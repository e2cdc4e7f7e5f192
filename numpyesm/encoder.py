"""The encoder: layers over blocks of packed rows, one barrier a layer, written once for every backend.

For each block of rows a thread does the attention of layer n, the output projection, the feed-forward part and the
query, key and value of layer n + 1, while the rows are in its cache. Attention reads keys and values of the whole
sequence, so the threads wait for each other once a layer, and query/key/value have two buffers that take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .batch import BLOCK_ROWS, Batch, Block, Tile
from .heads import AttentionSummary, ContactHead
from .kernels.base import AttentionMaps, Kernels
from .threads import WorkerPool

Array = npt.NDArray[Any]

# Rows that the LM head takes at a time.
_LM_HEAD_ROWS = 192


def encode_batch(
    kernels: Kernels,
    pool: WorkerPool,
    batch: Batch,
    *,
    representations: Collection[int],
    take: Callable[[int, Array], None],
    contacts: ContactHead | None = None,
    summary: AttentionSummary | None = None,
    block_rows: int = BLOCK_ROWS,
    threads: int | None = None,
) -> None:
    """Run as many layers as the wanted outputs need, and hand each wanted representation to `take`.

    Parameters
    ----------
    representations : collection of int
        0 (the scaled embedding) to num_layers (after the final LayerNorm).
    take : callable (layer, rows (T, D))
        Called in ascending order of layer; the rows are overwritten after it returns.
    contacts, summary
        Attention maps go there, if given.
    block_rows : int
        Rows that a thread takes at a time; results do not depend on it.
    threads : int, optional
        At most so many of the pool's.
    """
    num_layers = kernels.config.num_layers
    full_layers = max(representations, default=0)
    map_layers = max(contacts.last_layer if contacts else 0, num_layers if summary else 0)
    block_threads, step_threads = _divide_threads(kernels, batch.num_rows, threads or pool.threads)
    blocks = batch.blocks(block_threads, block_rows)
    tiles = [tile for block in blocks for tile in block.tiles]
    x = kernels.embed(batch.tokens, batch.embedding_scale)  # (T, D)
    if 0 in representations:
        take(0, x)
    layers = max(full_layers, map_layers)
    if layers == 0:
        return

    rotary = kernels.rotary_tables(max(last - first for first, last in batch.spans))
    current, following = kernels.new_qkv(batch.num_rows), kernels.new_qkv(batch.num_rows)

    def project_qkv(layer: int, block: Block, out: Array) -> None:
        rows = slice(block.start, block.stop)
        pieces = [rotary[tile.start - tile.first : tile.stop - tile.first] for tile in block.tiles]
        kernels.qkv(layer, x[rows], pieces, out[rows])

    with kernels.session(step_threads):
        pool.run(lambda block: project_qkv(0, block, current), blocks, threads)
    for layer in range(layers):
        maps = [_request_maps(layer, tile, contacts, summary) for tile in tiles]
        maps_only = layer >= full_layers and layer + 1 == map_layers

        # Bound as defaults: a closure over loop variables would see the next layer's.
        def run_block(
            block: Block,
            layer: int = layer,
            maps: Sequence[AttentionMaps | None] = maps,
            maps_only: bool = maps_only,
            qkv: Array = current,
            next_qkv: Array = following,
        ) -> None:
            rows = x[block.start : block.stop]
            context = None if maps_only else np.empty_like(rows)
            for tile in _merge_tiles(block.tiles, maps) if kernels.merges_tiles else block.tiles:
                out = None if context is None else context[tile.start - block.start : tile.stop - block.start]
                kernels.attention(qkv[tile.start : tile.stop], qkv[tile.first : tile.last], out, maps[tile.index])
            if context is None:
                return
            kernels.project_and_feed_forward(layer, context, rows)
            if layer + 1 < layers:
                project_qkv(layer + 1, block, next_qkv)
            elif layer + 1 == num_layers:
                kernels.final_norm(rows, out=rows)

        with kernels.session(step_threads):
            pool.run(run_block, blocks, threads)
        _collect_maps(layer, tiles, maps, contacts, summary)
        if layer + 1 in representations:
            take(layer + 1, x)
        current, following = following, current


def _merge_tiles(tiles: Sequence[Tile], maps: Sequence[AttentionMaps | None]) -> list[Tile]:
    """Neighbours of one sequence as one tile, where neither leaves maps: its keys are then read once."""
    merged: list[Tile] = []
    for tile in tiles:
        last = merged[-1] if merged else None
        if last and last.sequence == tile.sequence and maps[last.index] is None and maps[tile.index] is None:
            merged[-1] = replace(last, stop=tile.stop)
        else:
            merged.append(tile)
    return merged


def _divide_threads(kernels: Kernels, rows: int, threads: int) -> tuple[int, int]:
    """(blocks at a time, threads that one step may use by itself) for a batch of this many rows."""
    return (1, threads) if rows <= kernels.single_block_rows else (threads, 1)


def _request_maps(
    layer: int, tile: Tile, contacts: ContactHead | None, summary: AttentionSummary | None
) -> AttentionMaps | None:
    """What layer `layer` must leave of this tile's attention; None if nothing."""
    if contacts is None and summary is None:
        return None
    rows = slice(int(tile.start == tile.first), tile.stop - tile.start - int(tile.stop == tile.last))
    maps = AttentionMaps(rows)
    if contacts is not None:
        contacts.request(layer, tile, maps)
    if summary is not None:
        summary.request(tile, maps)
    return None if maps.heads is None and maps.summary is None else maps


def _collect_maps(
    layer: int,
    tiles: Sequence[Tile],
    maps: Sequence[AttentionMaps | None],
    contacts: ContactHead | None,
    summary: AttentionSummary | None,
) -> None:
    for tile, left in zip(tiles, maps, strict=True):
        if left is None:
            continue
        if contacts is not None:
            contacts.collect(layer, tile, left)
        if summary is not None:
            summary.collect(layer, tile, left)


def lm_logits(kernels: Kernels, pool: WorkerPool, rows: Array) -> Array:
    """Logits of the 20 amino acids for final-layer rows: (R, D) -> (R, 20)."""
    logits = np.empty((len(rows), 20), kernels.dtype)
    block_threads, step_threads = _divide_threads(kernels, len(rows), pool.threads)
    step = max(1, min(_LM_HEAD_ROWS, -(-len(rows) // block_threads)))

    def run(start: int) -> None:
        logits[start : start + step] = kernels.lm_head(rows[start : start + step])

    with kernels.session(step_threads):
        pool.run(run, range(0, len(rows), step))
    return logits
