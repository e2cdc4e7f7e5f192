"""Every single substitution of a protein: an L×20 matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..alphabet import TOKEN_ID, warn_of_odd_sequences
from ..options import SCAN_METHODS, one_of, require_head
from .marginals import Progress, position_logits
from .notation import check_offset, check_wild_type
from .windows import check_window

if TYPE_CHECKING:
    from ..passes import Passes

# Columns of a scan: the alphabet's order, not the model's.
SCAN_LETTERS = "ACDEFGHIKLMNPQRSTVWY"


@dataclass(eq=False)
class MutationScan:
    """Scores of all single substitutions of one protein.

    Attributes
    ----------
    wild_type : str
        L residues.
    offset : int
        Position of the first of them.
    method : str
    scores : ndarray (L, 20) float64
        log p(column's amino acid) - log p(wild type's), 0 for the wild type's own letter; columns as `amino_acids`.
    """

    wild_type: str
    offset: int
    method: str
    scores: npt.NDArray[np.float64]

    @property
    def amino_acids(self) -> str:
        """The columns: `ACDEFGHIKLMNPQRSTVWY`."""
        return SCAN_LETTERS

    @property
    def positions(self) -> list[int]:
        """Of the rows, counted from `offset`."""
        return list(range(self.offset, self.offset + len(self.wild_type)))


def scan_mutations(
    passes: Passes,
    wild_type: str,
    method: str = "masked-marginals",
    *,
    offset: int = 1,
    window: int | str | None = None,
    progress: Progress = None,
) -> MutationScan:
    """Score all single substitutions; see `ESM2.scan_mutations`."""
    one_of("method", method, SCAN_METHODS)
    wild_type = check_wild_type(wild_type)
    offset = check_offset(offset)
    seen = check_window(window, len(wild_type), method)
    require_head(passes.checkpoint, "scan_mutations")
    warn_of_odd_sequences([wild_type], stacklevel=4)
    length = len(wild_type)
    logits = position_logits(passes, wild_type, range(length), method, seen, progress)
    own = logits[np.arange(length), [TOKEN_ID[letter] for letter in wild_type]]
    scores = logits[:, [TOKEN_ID[letter] for letter in SCAN_LETTERS]] - own[:, None]
    return MutationScan(wild_type, offset, method, scores)
