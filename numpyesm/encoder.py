"""The encoder: which layers a batch runs through, and what is taken on the way, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .batch import Batch, Tile
from .config import VOCAB_SIZE
from .heads import AttentionSummary, ContactHead, FullAttention
from .kernels.base import AttentionMaps, Cut, Kernels, divide_threads
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
    full: FullAttention | None = None,
    final_rows: Array | None = None,
    block_rows: int | None = None,
    threads: int | None = None,
) -> None:
    """Run as many layers as the wanted outputs need, and hand each wanted representation to `take`.

    Parameters
    ----------
    representations : collection of int
        0 (the scaled embedding) to num_layers (after the final LayerNorm).
    take : callable (layer, rows (T, D))
        Called in ascending order of layer; the rows are overwritten after it returns.
    contacts, summary, full
        Attention maps go there, if given.
    final_rows : ndarray of int, optional
        The rows of the last layer that matter: others may be left out of it, and `take` gets what was there before.
        Not together with maps.
    block_rows : int, optional
        Rows that a thread takes at a time; results do not depend on it.
    threads : int, optional
        At most so many of the pool's.
    """
    num_layers = kernels.config.num_layers
    full_layers = max(representations, default=0)
    map_layers = max(contacts.last_layer if contacts else 0, num_layers if summary or full else 0)
    layers = max(full_layers, map_layers)
    cut = Cut(threads or pool.threads, block_rows, whole_tiles=map_layers > 0)
    forward = kernels.forward(pool, batch, layers, cut)
    if 0 in representations:
        take(0, forward.x)
    tiles = batch.tiles() if map_layers else []
    layer = 0
    while layer < layers:
        if layer < map_layers:
            stop = layer + 1
            maps = [_request_maps(layer, tile, contacts, summary, full) for tile in tiles]
            forward.advance(stop, maps, maps_only=layer >= full_layers and stop == map_layers)
            _collect_maps(layer, tiles, maps, contacts, summary)
        else:
            stop = min(wanted for wanted in representations if wanted > layer)
            if final_rows is not None and stop == num_layers and layer + 1 < num_layers:
                stop = num_layers - 1  # the last one by itself
            forward.advance(stop, rows=final_rows if stop == num_layers else None)
        if stop in representations:
            take(stop, forward.x)
        layer = stop


def _request_maps(
    layer: int,
    tile: Tile,
    contacts: ContactHead | None,
    summary: AttentionSummary | None,
    full: FullAttention | None,
) -> AttentionMaps | None:
    """What layer `layer` must leave of this tile's attention; None if nothing."""
    if contacts is None and summary is None and full is None:
        return None
    rows = slice(int(tile.start == tile.first), tile.stop - tile.start - int(tile.stop == tile.last))
    maps = AttentionMaps(rows)
    if contacts is not None:
        contacts.request(layer, tile, maps)
    if summary is not None:
        summary.request(tile, maps)
    if full is not None:
        full.request(layer, tile, maps)
    return None if maps.heads is None and maps.summary is None and maps.full is None else maps


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
    """Logits of all tokens for final-layer rows: (R, D) -> (R, 33)."""
    logits = np.empty((len(rows), VOCAB_SIZE), kernels.dtype)
    block_threads, step_threads = divide_threads(kernels, len(rows), pool.threads)
    step = max(1, min(_LM_HEAD_ROWS, -(-len(rows) // block_threads)))

    def run(start: int) -> None:
        logits[start : start + step] = kernels.lm_head(rows[start : start + step])

    with kernels.session(step_threads):
        pool.run(run, range(0, len(rows), step))
    return logits
