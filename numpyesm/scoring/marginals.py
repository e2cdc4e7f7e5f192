"""Logits of single positions, masked or not; many masked copies are packed into one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..alphabet import MASK, TOKEN_ID, frame, residue_ids
from ..heads import log_softmax
from .windows import TokenArray, Window, window_around

if TYPE_CHECKING:
    from ..passes import Passes

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int], None]

ALL_TOKENS = slice(None)

# Token rows given to the model at a time: enough for several full passes, few enough to take little memory.
_ROWS_AT_A_TIME = 32768


class _Query(NamedTuple):
    """Tokens of one pass, and the rows whose logits are wanted."""

    tokens: TokenArray
    rows: npt.NDArray[np.intp]


def masked_logits(
    passes: Passes, sequence: str, indices: Sequence[int], window: Window, progress: Progress | None = None
) -> FloatArray:
    """Compute the logits of all 33 tokens at each index, with only that residue masked: (n, 33).

    Each index costs one masked copy of its window; copies are packed, and the LM head sees one row of each.
    """
    return _logits_of(passes, _masked_queries(sequence, indices, window), len(indices), progress)


def plain_logits(
    passes: Passes, sequence: str, indices: Sequence[int], window: Window, progress: Progress | None = None
) -> FloatArray:
    """Compute the logits of all 33 tokens at each index, nothing masked: (n, 33). One pass per distinct window."""
    ids = residue_ids(sequence)
    by_window: dict[tuple[int, int], list[int]] = {}
    for place, index in enumerate(indices):
        by_window.setdefault(window_around(index, len(ids), window.size), []).append(place)
    order = [place for places in by_window.values() for place in places]
    queries = (
        _Query(frame(ids[start:stop]), np.array([indices[place] - start + 1 for place in places]))
        for (start, stop), places in by_window.items()
    )
    logits = np.empty((len(indices), len(TOKEN_ID)))
    logits[order] = _logits_of(passes, queries, len(indices), progress)
    return logits


def pseudo_log_likelihoods(
    passes: Passes, sequences: Sequence[str], window: Window, progress: Progress | None = None
) -> FloatArray:
    """Sum log p(residue | all others) over the residues of each sequence: (n,). Over 33 tokens, as fair-esm."""
    residues = sum(map(len, sequences))
    queries = (query for sequence in sequences for query in _masked_queries(sequence, range(len(sequence)), window))
    right = np.concatenate([np.empty(0, np.uint8), *map(residue_ids, sequences)])
    found = np.empty(residues)
    done = 0
    for logits in _chunks(passes, queries, progress):
        rows = slice(done, done + len(logits))
        found[rows] = log_softmax(logits)[np.arange(len(logits)), right[rows]]
        done += len(logits)
    ends = np.cumsum([0, *map(len, sequences)])
    return np.array([found[a:b].sum() for a, b in itertools.pairwise(ends)])


def _masked_queries(sequence: str, indices: Iterable[int], window: Window) -> Iterator[_Query]:
    ids = residue_ids(sequence)
    for index in indices:
        tokens, row = window.around(ids, index)
        tokens[row] = MASK
        yield _Query(tokens, np.array([row]))


def _logits_of(passes: Passes, queries: Iterable[_Query], count: int, progress: Progress | None) -> FloatArray:
    """Compute the logits of all queries, in order: (count, 33)."""
    logits = np.empty((count, len(TOKEN_ID)))
    done = 0
    for chunk in _chunks(passes, queries, progress):
        logits[done : done + len(chunk)] = chunk
        done += len(chunk)
    return logits


def _chunks(passes: Passes, queries: Iterable[_Query], progress: Progress | None) -> Iterator[FloatArray]:
    """Yield logits (n, 33), as many queries at a time as the model gets; `progress` is called with each n."""
    batch: list[_Query] = []
    rows = 0

    def run() -> FloatArray:
        tokens, wanted = [query.tokens for query in batch], [query.rows for query in batch]
        found = np.concatenate(list(passes.logits(tokens, wanted, ALL_TOKENS))).astype(np.float64)
        if progress is not None:
            progress(len(found))
        return found

    for query in queries:
        if batch and rows + len(query.tokens) > _ROWS_AT_A_TIME:
            yield run()
            batch, rows = [], 0
        batch.append(query)
        rows += len(query.tokens)
    if batch:
        yield run()
