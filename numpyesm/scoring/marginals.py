"""Logits of single positions, masked or not, and how much of the protein the model sees around each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ..alphabet import MASK, TOKEN_ID, frame, residue_ids
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..heads import log_softmax
from ..options import SCAN_METHODS, whole_number

if TYPE_CHECKING:
    from ..passes import Passes

FloatArray = npt.NDArray[np.float64]
TokenArray = npt.NDArray[np.uint8]
# Tokens of one pass, and the rows whose logits are wanted.
Query: TypeAlias = tuple[TokenArray, npt.NDArray[np.intp]]
# Called with what is done and how much there is.
Progress = Callable[[int, int], None] | None

PROTEINGYM = "proteingym"
_PROTEINGYM_TOKENS = 1024
_ALL_TOKENS = slice(None)
# Token rows given to the model at a time: enough for several full passes, few enough to take little memory.
_ROWS_AT_A_TIME = 32768


@dataclass(frozen=True)
class Window:
    """What is seen around a residue, at most the whole protein.

    `size` residues, with `<cls>` in front and `<eos>` behind; or, with `of_tokens`, as ProteinGym cuts them: `size`
    tokens of the framed protein, so that a window inside of a long protein has neither.
    """

    size: int
    of_tokens: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens of a pass are seen, at most."""
        return self.size if self.of_tokens else self.size + 2

    def around(self, ids: TokenArray, index: int) -> tuple[TokenArray, int]:
        """Return a new array of the tokens that are seen, and the row of residue `index` in it.

        `ids` (L,) are the residues of the whole protein.
        """
        if self.of_tokens:
            start, stop = optimal_window(index + 1, len(ids) + 2, self.size)
            return frame(ids)[start:stop], index + 1 - start
        start, stop = window_around(index, len(ids), self.size)
        return frame(ids[start:stop]), index + 1 - start


def window_around(index: int, length: int, window: int) -> tuple[int, int]:
    """Return start and stop of the `window` residues around `index`, shifted inwards at the ends."""
    start = min(max(0, index - window // 2), length - window)
    return start, start + window


def optimal_window(position: int, length: int, window: int) -> tuple[int, int]:
    """Return start and stop of the tokens that ProteinGym gives the model around `position`.

    Its `get_optimal_window`, which is called with tokens: `<cls>` is position 0, and `length` counts it and `<eos>`. An
    odd window has one token less inside the protein than at its ends.
    """
    half = window // 2
    if length <= window:
        return 0, length
    if position < half:
        return 0, window
    if position >= length - half:
        return length - window, length
    return position - half, position + half


def check_window(window: object, length: int, method: str) -> Window:
    """Return what the model sees of a wild type of `length` residues.

    InvalidOption: the window is neither a number, nor ProteinGym's where ProteinGym has one, nor None. InvalidSequence:
    the whole wild type is to be seen at once, and the model cannot.
    """
    advice = "a window (window=1022, --window 1022) scores every position among that many residues around it"
    if method == "log-prob":
        advice = "the other methods can score it with a window (window=1022, --window 1022)"
    if isinstance(window, str) and window == PROTEINGYM:
        if method not in SCAN_METHODS:
            raise InvalidOption(f"window={window!r} is for {' and '.join(SCAN_METHODS)}, not for {method!r}")
        if method == "masked-marginals":
            return Window(min(_PROTEINGYM_TOKENS, length + 2), of_tokens=True)
        window, advice = None, "ProteinGym's wt-marginals see the whole wild type"
    if window is None:
        if length > MAX_RESIDUES:
            raise InvalidSequence(
                f"the wild type has {length} residues, at most {MAX_RESIDUES} are allowed at once; {advice}"
            )
        return Window(length)
    number = whole_number(window)
    if number is None or not 1 <= number <= MAX_RESIDUES:
        raise InvalidOption(
            f"window={window!r}: expected a whole number from 1 to {MAX_RESIDUES}, {PROTEINGYM!r}, or None"
        )
    return Window(min(number, length))


def position_logits(
    passes: Passes, sequence: str, indices: Sequence[int], method: str, window: Window, progress: Progress = None
) -> FloatArray:
    """Compute the logits of all 33 tokens at each index, as a marginal method needs them: ascending (n,) -> (n, 33).

    `masked-marginals` take one masked copy of its window for each index; copies are packed, and the LM head sees one
    row of each. `wt-marginals`, with nothing masked, take one pass for each distinct window.
    """
    ids = residue_ids(sequence)
    if method == "masked-marginals":
        queries = _masked_queries(ids, indices, window)
    else:
        windows = itertools.groupby(indices, lambda index: window_around(index, len(ids), window.size))
        queries = ((frame(ids[start:stop]), np.array(list(seen)) - start + 1) for (start, stop), seen in windows)
    return np.concatenate([np.empty((0, len(TOKEN_ID))), *_chunks(passes, queries, window, len(indices), progress)])


def pseudo_log_likelihoods(
    passes: Passes, sequences: Sequence[str], window: Window, progress: Progress = None
) -> FloatArray:
    """Sum log p(residue | all others) over the residues of each sequence: (n,). Over 33 tokens, as fair-esm."""
    residues = [residue_ids(sequence) for sequence in sequences]
    queries = (query for ids in residues for query in _masked_queries(ids, range(len(ids)), window))
    right = np.concatenate([np.empty(0, np.uint8), *residues])
    found = np.empty(len(right))
    done = 0
    for logits in _chunks(passes, queries, window, len(right), progress):
        rows = slice(done, done + len(logits))
        found[rows] = log_softmax(logits)[np.arange(len(logits)), right[rows]]
        done += len(logits)
    ends = np.cumsum([0, *map(len, sequences)])
    return np.array([found[a:b].sum() for a, b in itertools.pairwise(ends)])


def _masked_queries(ids: TokenArray, indices: Iterable[int], window: Window) -> Iterator[Query]:
    for index in indices:
        tokens, row = window.around(ids, index)
        tokens[row] = MASK
        yield tokens, np.array([row])


def _chunks(
    passes: Passes, queries: Iterator[Query], window: Window, total: int, progress: Progress
) -> Iterator[FloatArray]:
    """Yield logits (n, 33) of as many queries as run at a time; `total` is the sum of all n."""
    done = 0
    while batch := list(itertools.islice(queries, _ROWS_AT_A_TIME // window.tokens)):
        tokens, rows = zip(*batch, strict=True)
        found = np.concatenate(list(passes.logits(tokens, rows, _ALL_TOKENS))).astype(np.float64)
        done += len(found)
        if progress is not None:
            progress(done, total)
        yield found
