"""How much of a protein the model sees when a residue is scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..alphabet import frame
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..options import SCAN_METHODS, whole_number

TokenArray = npt.NDArray[np.uint8]

PROTEINGYM = "proteingym"
_PROTEINGYM_TOKENS = 1024


@dataclass(frozen=True)
class Window:
    """What is seen around a residue.

    Attributes
    ----------
    size : int
        At most the length of the protein, unless it counts tokens.
    of_tokens : bool
        False: `size` residues, with `<cls>` in front and `<eos>` behind. True: `size` tokens of the framed protein, as
        ProteinGym cuts them, so that a window inside of a long protein has neither.
    """

    size: int
    of_tokens: bool = False

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

    Raises
    ------
    InvalidOption
        The window is neither a number, nor ProteinGym's where ProteinGym has one, nor None.
    InvalidSequence
        The whole wild type is to be seen at once, and the model cannot.
    """
    advice = "a window (window=1022, --window 1022) scores every position among that many residues around it"
    if isinstance(window, str) and window == PROTEINGYM:
        if method not in SCAN_METHODS:
            raise InvalidOption(f"window={window!r} is for {' and '.join(SCAN_METHODS)}, not for {method!r}")
        if method == "masked-marginals":
            return Window(_PROTEINGYM_TOKENS, of_tokens=True)
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
