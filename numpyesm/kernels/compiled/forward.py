"""The compiled backend, and one pass through its layers: blocks of rows, tables of addresses, threads."""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...batch import Batch
from ...config import VOCAB_SIZE
from ...threads import WorkerPool
from ...weights.checkpoint import Checkpoint
from ..base import Array, AttentionMaps, Forward, Kernels
from ..scratch import scratch
from .code import Code
from .layout import SHORT, Maps, Pass, Steps, address, table
from .packing import PackedModel
from .panels import aligned

# Threads get whole sequences if the longest has at most so many rows, and the busiest thread at most so many times its
# fair share (float32, bf16): beyond that, waiting for it costs more than barriers in every layer and traffic to L3.
_MOST_APART, _IMBALANCE = 1100, (1.05, 1.12)

Span = tuple[int, int]
Piece = tuple[int, int, int, int]  # first row, last row, first and last row of the sequence


class CompiledKernels(Kernels):
    """Compiled steps over packed weights."""

    name = "compiled"
    dtype = np.dtype(np.float32)

    def __init__(self, checkpoint: Checkpoint, precision: str, code: Code, pool: WorkerPool) -> None:
        self.config, self.precision, self.code = checkpoint.config, precision, code
        self.origin = str(code)
        self.packed = PackedModel(checkpoint, precision, code, pool)

    def forward(
        self, pool: WorkerPool, batch: Batch, layers: int, threads: int, block_rows: int | None, whole_tiles: bool
    ) -> Forward:
        most = self.packed.block_rows  # more of them would leave the L2 cache
        return CompiledForward(self, pool, batch, layers, threads, min(block_rows or most, most), whole_tiles)

    def lm_head(self, x: Array) -> Array:
        assert self.packed.lm_head is not None
        x = np.ascontiguousarray(x, np.float32)
        hidden, out = scratch("lm_head", x.shape, self.dtype), np.empty((len(x), VOCAB_SIZE), np.float32)
        room = self.packed.room(block_rows=1, length=1, with_maps=False)
        sizes, buffers = (len(x), self.config.embed_dim, VOCAB_SIZE), (address(hidden), address(out))
        self.code.call("lm_head", address(self.packed.lm_head), address(room), address(x), *sizes, *buffers)
        return out


class CompiledForward(Forward):
    """See `Forward`.

    Blocks are whole sequences, if those can be dealt out to the threads evenly. Else they are cut anywhere, since the
    result of a row does not depend on its neighbours; with maps they are whole tiles, which leave their sums one by
    one. Few rows are not cut between the threads: they take shares of the products.
    """

    def __init__(
        self,
        kernels: CompiledKernels,
        pool: WorkerPool,
        batch: Batch,
        layers: int,
        threads: int,
        block_rows: int,
        whole_tiles: bool,
    ) -> None:
        self._code, self._packed, self._pool, self._phase = kernels.code, kernels.packed, pool, 0
        self._batch, self._threads, self._most_rows, self._whole_tiles = batch, threads, block_rows, whole_tiles
        packed, rows, config = kernels.packed, batch.num_rows, kernels.config
        lengths = [last - first for first, last in batch.spans]
        self._length = max(lengths)
        self.x = aligned(rows * config.embed_dim).reshape(rows, config.embed_dim)
        self._stop = np.zeros(1, np.int64)
        self._model, rotary = packed.model_table(self._length)
        counters = aligned(16 * Steps.COUNT * (layers + 1), np.int64)  # a line of the cache for each
        counters[:] = 0
        shares = threads if threads > 1 and rows <= min(packed.shared_rows * threads, packed.group_rows) else 0
        uneven = _IMBALANCE[packed.narrow]
        self._apart = (
            None if shares or whole_tiles else whole_sequences(batch.spans, threads, packed.group_rows, uneven)
        )
        buffers = packed.take_buffers(0 if self._apart else rows, shares)
        weakref.finalize(self, packed.keep_buffers, buffers).atexit = False
        entries: dict[int, int | Array] = {
            Pass.ROWS: rows,
            Pass.POSITIONS: np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            Pass.TOKENS: batch.tokens,
            Pass.TOKEN_SCALE: batch.embedding_scale.astype(np.float32),
            Pass.X: self.x,
            **dict(zip((Pass.QKV, Pass.QKV_ODD, Pass.CONTEXT, Pass.HIDDEN), buffers, strict=False)),
            Pass.LAYERS: packed.layers,
            Pass.COUNTERS: counters,
            Pass.STOP: self._stop,
            Pass.SHARES: shares,
            Pass.APART: int(self._apart is not None),
            Pass.LAST: layers,
            Pass.NORM_AFTER: config.num_layers if config.whole_layers is None else -1,
        }
        if packed.narrow:
            short = np.repeat([length <= SHORT for length in lengths], lengths)
            entries[Pass.SHORT_ROWS] = np.cumsum(np.append(False, short), dtype=np.int64)
        self._table, self._kept = table(Pass, entries), (rotary, entries)  # what the tables point at
        self._use_blocks()

    def _use_blocks(self, wanted: Array | None = None) -> None:
        """Cut the batch into what the phases that follow work on; with `wanted`, sorted, they need those rows only."""
        columns = self._code.isa.strip_columns
        if self._apart is not None:
            blocks = self._apart
        elif self._whole_tiles:
            parts = self._batch.blocks(self._threads, self._most_rows)
            blocks = [[(tile.start, tile.stop, tile.first, tile.last) for tile in part.tiles] for part in parts]
        else:
            blocks = cut_blocks(self._batch.spans, self._threads, self._most_rows, columns, wanted)
        spans = [(block[0][0], block[-1][1]) for block in blocks]
        if self._apart is not None and wanted is not None:
            blocks = [pieces_with(block, columns, wanted) for block in blocks]
        self._pieces = list(itertools.chain.from_iterable(blocks))
        self._block_rows = max(last - first for first, last in spans)
        counts = [0, *itertools.accumulate(map(len, blocks))]
        block_table = [(*span, *counts[i : i + 2]) for i, span in enumerate(spans) if blocks[i]]
        self._workers = max(min(self._threads, len(block_table)), int(self._table[Pass.SHARES]))
        self._block_table, self._piece_table = np.array(block_table, np.int64), np.array(self._pieces, np.int64)
        self._table[Pass.BLOCKS] = len(block_table)
        self._table[Pass.BLOCK_TABLE] = address(self._block_table)
        self._table[Pass.PIECE_TABLE] = address(self._piece_table)

    def advance(
        self, stop: int, maps: Sequence[AttentionMaps] = (), maps_only: bool = False, rows: Array | None = None
    ) -> None:
        if rows is not None:
            self._run(stop)  # but for the last of these layers
            self._use_blocks(np.sort(rows))
        if rows is not None or maps_only:  # a part of the rows, or of the steps
            self._table[Pass.SHARES] = 0
        self._table[Pass.MAPS] = 0
        if not maps:
            self._run(stop + 1)
            return
        lengths = [last - first for _, _, first, last in self._pieces]
        rows, summaries, kept = map_table(maps, lengths, self._packed.config.num_heads, maps_only)
        self._table[Pass.MAPS] = address(rows)
        self._run(stop + 1)
        del kept  # until here, compiled code reads them
        for left, summary in zip(maps, summaries, strict=True):
            if left.summary is not None:
                left.summary[...] = summary

    def _run(self, stop: int) -> None:
        """Phases up to `stop`, on all threads that have work."""
        if self._phase == stop:
            return
        arguments = address(self._table), address(self._model)

        def work(_: int) -> None:
            room = self._packed.room(self._block_rows, self._length, self._whole_tiles, self._apart is not None)
            self._code.call("run_phases", *arguments, address(room), self._phase, stop)

        def give_up() -> None:
            self._stop[0] = 1

        self._pool.run_together(work, self._workers, give_up)
        self._phase = stop


def map_table(
    maps: Sequence[AttentionMaps], lengths: Sequence[int], heads: int, maps_only: bool
) -> tuple[npt.NDArray[np.int64], list[Array | None], list[Array]]:
    """`layout.Maps` of each piece, its summary (summed in float64), and the arrays that the table points at besides."""
    rows = np.zeros((len(maps), Maps.ENTRIES), np.int64)
    summaries: list[Array | None] = []
    kept: list[Array] = []
    for row, wanted, length in zip(rows, maps, lengths, strict=True):
        row[Maps.ONLY] = maps_only
        summary = None if wanted.summary is None else np.zeros(length)
        row[Maps.SUMMARY] = address(summary)
        if wanted.full is not None:
            assert wanted.full.strides[2] == 4
            row[Maps.FULL] = address(wanted.full)
            row[Maps.FULL_HEAD_STEP], row[Maps.FULL_ROW_STEP] = wanted.full.strides[:2]
        summaries.append(summary)
        if len(wanted.heads) == 0:
            continue
        map_of_head = np.full(heads, -1, np.int64)
        map_of_head[wanted.heads] = np.arange(len(wanted.heads))
        coefficients = np.ascontiguousarray(wanted.coefficients, np.float64)
        kept += [map_of_head, coefficients]
        wanted.column_sums[...] = 0
        row[Maps.MAP_OF_HEAD] = address(map_of_head)
        row[Maps.COEFFICIENTS] = address(coefficients)
        row[Maps.WEIGHTED], row[Maps.WEIGHTED_STEP] = address(wanted.weighted), wanted.weighted.strides[1]
        row[Maps.ROW_SUMS], row[Maps.ROW_SUMS_STEP] = address(wanted.row_sums), wanted.row_sums.strides[0]
        row[Maps.COLUMN_SUMS] = address(wanted.column_sums)
        row[Maps.COLUMN_SUMS_STEP] = wanted.column_sums.strides[0]
        row[Maps.FIRST_RESIDUE], row[Maps.LAST_RESIDUE] = wanted.rows.start, wanted.rows.stop
    return rows, summaries, kept


def cut_blocks(
    spans: Sequence[Span], threads: int, block_rows: int, columns: int, wanted: Array | None = None
) -> list[list[Piece]]:
    """Blocks of near-equal numbers of rows, as many for every thread, as pieces of sequences.

    `columns` are those of a register tile. With `wanted`, sorted, blocks need hold those rows only.
    """
    rows = spans[-1][1]
    count = threads * -(-rows // (threads * block_rows))
    # Attention takes a register tile of queries at a time; where each thread has one block, equal shares matter more.
    strips = _strips(spans, columns if count > threads else 8, wanted)
    return _gather(strips, count, rows)


def whole_sequences(spans: Sequence[Span], threads: int, block_rows: int, uneven: float) -> list[list[Piece]] | None:
    """Blocks of whole sequences, largest first; None if some are too large, or one thread would have too much to do.

    Of about `block_rows` rows, or half as many if that is `uneven`: the busiest thread has so many times its share.
    """
    rows = spans[-1][1]
    pieces = [(first, last, first, last) for first, last in spans]
    for most in (block_rows, block_rows // 2):
        blocks = _gather(pieces, threads * -(-rows // (threads * most)), rows)
        blocks.sort(key=lambda block: block[0][0] - block[-1][1])
        sizes = [block[-1][1] - block[0][0] for block in blocks]
        busy = [0] * threads
        for size in sizes:
            heapq.heapreplace(busy, busy[0] + size)
        if sizes[0] <= _MOST_APART and max(busy) * threads <= uneven * rows:
            return blocks
    return None


def pieces_with(block: Sequence[Piece], columns: int, wanted: Array) -> list[Piece]:
    """The pieces of some whole sequences that hold these rows, which are sorted."""
    strips = _strips([(first, last) for _, _, first, last in block], columns, wanted)
    return list(itertools.chain.from_iterable(_gather(strips, 1, block[-1][1])))


def _strips(spans: Sequence[Span], step: int, wanted: Array | None) -> list[Piece]:
    """Pieces of up to `step` rows; those that hold `wanted` rows, which are sorted, or all."""
    strips = [
        (start, min(start + step, last), first, last) for first, last in spans for start in range(first, last, step)
    ]
    if wanted is None:
        return strips
    before = np.searchsorted(wanted, [(start, stop) for start, stop, _, _ in strips])
    return [strip for strip, (first, last) in zip(strips, before, strict=True) if first < last]


def _gather(strips: Sequence[Piece], count: int, rows: int) -> list[list[Piece]]:
    """About `count` blocks of near-equal numbers of rows, of `rows` in all; a new one begins also where strips miss."""
    blocks: list[list[Piece]] = []
    share = -1
    for start, stop, first, last in strips:
        before_share, share = share, (start + stop) * count // (2 * rows)
        if share != before_share or blocks[-1][-1][1] != start:
            blocks.append([(start, stop, first, last)])
        elif blocks[-1][-1][2] == first:
            blocks[-1][-1] = (blocks[-1][-1][0], stop, first, last)
        else:
            blocks[-1].append((start, stop, first, last))
    return blocks
