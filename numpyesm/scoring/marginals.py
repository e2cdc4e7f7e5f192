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
# Called with what is done and how much there is.
Progress = Callable[[int, int], None] | None

ALL_TOKENS = slice(None)

# Token rows given to the model at a time: enough for several full passes, few enough to take little memory.
_ROWS_AT_A_TIME = 32768


class _Query(NamedTuple):
    """Tokens of one pass, and the rows whose logits are wanted."""

    tokens: TokenArray
    rows: npt.NDArray[np.intp]


def position_logits(
    passes: Passes, sequence: str, indices: Sequence[int], method: str, window: Window, progress: Progress = None
) -> FloatArray:
    """Compute the logits of all 33 tokens at each index, as a marginal method needs them: (n, 33).

    `masked-marginals` take one masked copy of its window for each index; copies are packed, and the LM head sees one
    row of each. `wt-marginals`, with nothing masked, take one pass for each distinct window.
    """
    if method == "masked-marginals":
        order, queries = list(range(len(indices))), _masked_queries(sequence, indices, window)
    else:
        ids = residue_ids(sequence)
        by_window: dict[tuple[int, int], list[int]] = {}
        for place, index in enumerate(indices):
            by_window.setdefault(window_around(index, len(ids), window.size), []).append(place)
        order = [place for places in by_window.values() for place in places]
        queries = (
            _Query(frame(ids[start:stop]), np.array([indices[place] - start + 1 for place in places]))
            for (start, stop), places in by_window.items()
        )
    found = np.concatenate([np.empty((0, len(TOKEN_ID))), *_chunks(passes, queries, len(indices), progress)])
    return found[np.argsort(order)]


def pseudo_log_likelihoods(
    passes: Passes, sequences: Sequence[str], window: Window, progress: Progress = None
) -> FloatArray:
    """Sum log p(residue | all others) over the residues of each sequence: (n,). Over 33 tokens, as fair-esm."""
    queries = (query for sequence in sequences for query in _masked_queries(sequence, range(len(sequence)), window))
    right = np.concatenate([np.empty(0, np.uint8), *map(residue_ids, sequences)])
    found = np.empty(len(right))
    done = 0
    for logits in _chunks(passes, queries, len(right), progress):
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


def _chunks(passes: Passes, queries: Iterable[_Query], total: int, progress: Progress) -> Iterator[FloatArray]:
    """Yield logits (n, 33) of as many queries as run at a time; `total` is the sum of all n."""
    done = 0
    for batch in _batches(queries):
        tokens, rows = zip(*batch, strict=True)
        found = np.concatenate(list(passes.logits(tokens, rows, ALL_TOKENS))).astype(np.float64)
        done += len(found)
        if progress is not None:
            progress(done, total)
        yield found


def _batches(queries: Iterable[_Query]) -> Iterator[list[_Query]]:
    """Cut queries into batches of at most `_ROWS_AT_A_TIME` tokens, or one query."""
    batch: list[_Query] = []
    rows = 0
    for query in queries:
        if batch and rows + len(query.tokens) > _ROWS_AT_A_TIME:
            yield batch
            batch, rows = [], 0
        batch.append(query)
        rows += len(query.tokens)
    if batch:
        yield batch
