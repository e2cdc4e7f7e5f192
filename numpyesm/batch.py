"""Packing: sequences one after another, without padding, cut into tiles and blocks of rows.

A *tile* is a run of rows of one sequence; attention leaves maps a tile at a time. Where a sequence is cut depends only
on its own length, so that a map depends neither on the rest of the batch nor on the number of threads.
A *block* is a run of whole tiles, of one or several sequences: the unit of work that one thread takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .alphabet import MASK

TILE_ROWS = 64
BLOCK_ROWS = 700
# Several blocks of work for each thread, which can be dealt out evenly.
_FEWEST_ROWS, _ROWS_PER_THREAD = 4096, 2048

# Training masked 15 % of the residues and hid 80 % of those; token dropout rescales to that share.
_TRAINED_MASK_RATIO = 0.15 * 0.8


def rows_for(threads: int) -> int:
    """Rows of a batch that keep so many threads busy, if memory does not matter."""
    return max(_FEWEST_ROWS, _ROWS_PER_THREAD * threads)


def equal_parts(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Cut a run of sizes into parts of near-equal sums, of at most `most` or of one size."""
    total = sum(sizes)
    count = -(-total // most)
    start = held = before = number = 0
    for i, size in enumerate(sizes):
        full = held + size > most or before + held + size / 2 > total * (number + 1) / count
        if i > start and full:
            yield slice(start, i)
            start, held, before, number = i, 0, before + held, number + 1
        held += size
    if sizes:
        yield slice(start, len(sizes))


def cut_evenly(start: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
    """First row and end of each of so many near-equal parts."""
    return itertools.pairwise(start + (stop - start) * part // parts for part in range(parts + 1))


@dataclass(frozen=True)
class Tile:
    """Rows `start:stop` of the packed batch, all of them in the sequence at rows `first:last`."""

    index: int
    sequence: int
    start: int
    stop: int
    first: int
    last: int

    @property
    def residues(self) -> slice:
        """Which of its rows are residues: all but `<cls>` and `<eos>`."""
        return slice(int(self.start == self.first), self.stop - self.start - int(self.stop == self.last))


@dataclass(frozen=True)
class Block:
    """Consecutive whole tiles; together the rows `start:stop`."""

    tiles: tuple[Tile, ...]

    @property
    def start(self) -> int:
        return self.tiles[0].start

    @property
    def stop(self) -> int:
        return self.tiles[-1].stop


@dataclass(frozen=True)
class Batch:
    """Token rows of n sequences, T in all, `<cls>` and `<eos>` included."""

    tokens: npt.NDArray[np.uint8]  # (T,)
    offsets: tuple[int, ...]  # (n + 1,): sequence i is at rows `offsets[i]:offsets[i + 1]`
    embedding_scale: npt.NDArray[np.float64]  # (T,): factor of each embedded row (token dropout); 0 for `<mask>`

    @classmethod
    def pack(cls, sequences: Sequence[npt.NDArray[np.uint8]]) -> Batch:
        """Pack tokenized sequences."""
        lengths = np.array([len(ids) for ids in sequences])
        tokens = np.concatenate(sequences)
        masked = tokens == MASK
        offsets = (0, *np.cumsum(lengths).tolist())
        # esm2.py: x * (1 - mask_ratio_train) / (1 - mask_ratio_observed), <cls> and <eos> counted as tokens.
        observed = np.add.reduceat(masked, offsets[:-1], dtype=np.intp) / lengths
        scale = np.repeat((1 - _TRAINED_MASK_RATIO) / (1 - observed), lengths)
        scale[masked] = 0.0
        return cls(tokens, offsets, scale)

    @property
    def num_rows(self) -> int:
        return self.offsets[-1]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Row span of each sequence, `<cls>` and `<eos>` included."""
        return list(itertools.pairwise(self.offsets))

    def tiles(self) -> list[Tile]:
        """All tiles in row order."""
        out: list[Tile] = []
        for sequence, (first, last) in enumerate(self.spans):
            rows = last - first
            # An even number of near-equal parts, so that two threads share a single sequence evenly.
            parts = 1 if rows < 32 else 2 * -(-rows // (2 * TILE_ROWS))
            for start, stop in cut_evenly(first, last, parts):
                out.append(Tile(len(out), sequence, start, stop, first, last))
        return out

    def blocks(self, threads: int, block_rows: int = BLOCK_ROWS) -> list[Block]:
        """Tiles gathered into blocks of at most about `block_rows` rows, near-equal and as many for every thread."""
        tiles = self.tiles()
        count = threads * -(-self.num_rows // (threads * block_rows))
        blocks: list[Block] = []
        start = 0
        for i, tile in enumerate(tiles):
            following = tiles[i + 1].stop - tile.stop if i + 1 < len(tiles) else 0
            # Close the block at the cut between tiles that is nearest to an even division.
            due = (len(blocks) + 1) * self.num_rows / count
            if i + 1 == len(tiles) or tile.stop + following / 2 > due:
                blocks.append(Block(tuple(tiles[start : i + 1])))
                start = i + 1
        return blocks
