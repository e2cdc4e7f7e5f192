"""The interface between `passes.py` and the backends.

Shapes: D width, H heads, C channels per head (D = H·C), F feed-forward width, R rows of one block or tile,
L tokens of one sequence (residues + 2), T rows of the whole packed batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..config import ModelConfig
from ..threads import WorkerPool

Array = npt.NDArray[Any]


_nothing = partial(np.empty, 0, np.intp)


@dataclass
class AttentionMaps:
    """What one tile of one layer adds to contact maps and attention summaries; no heads or None if it is not wanted.

    Attributes
    ----------
    heads : ndarray of intp (K,)
        Heads whose contact coefficient is not zero.
    coefficients : ndarray (K,)
        Their coefficients.
    weighted : ndarray (r, L - 2) float64
        Rows of the tile that are residues; `coefficient · attention` is added here, summed over heads.
    row_sums : ndarray (K, r) float64
        Set to the sum of each head's attention over residue columns.
    column_sums : ndarray (K, L - 2) float64
        Set to the sum of each head's attention over the tile's residue rows.
    summary : ndarray (L,) or None
        Set to the sum of attention over all heads and over all rows of the tile.
    full : ndarray (H, R, L) or None
        Set to the attention of every head and row of the tile.
    rows : slice
        Which rows of the tile are residues (all but `<cls>` and `<eos>`).
    """

    rows: slice
    heads: Array = field(default_factory=_nothing)
    coefficients: Array = field(default_factory=_nothing)
    weighted: Array = field(default_factory=_nothing)
    row_sums: Array = field(default_factory=_nothing)
    column_sums: Array = field(default_factory=_nothing)
    summary: Array | None = None
    full: Array | None = None


class Forward(ABC):
    """A forward pass under way: the embedding and layers follow as far as they are asked for.

    Attributes
    ----------
    x : ndarray (T, D)
        Rows of the residual stream after the layers so far; after the last layer, through the final LayerNorm.
    """

    x: Array

    @abstractmethod
    def advance(
        self, stop: int, maps: Sequence[AttentionMaps] = (), maps_only: bool = False, rows: Array | None = None
    ) -> None:
        """Run the layers that follow, up to number `stop`.

        Parameters
        ----------
        stop : int
            Layers done afterwards, 0 for the embedding alone; the next one where there are maps.
        maps : sequence of AttentionMaps, optional
            What each tile of the batch must leave.
        maps_only : bool
            Nothing else is wanted of this layer: `x` stays as it is, and no layer may follow.
        rows : ndarray of int, optional
            The rows that matter of the last of these layers, after which none follows; others may stay as they are. Not
            with maps.
        """


class Kernels(ABC):
    """Weights of one model, laid out for one backend, and the arithmetic on packed rows.

    All methods may be called from several threads at once.
    """

    config: ModelConfig
    name: str
    origin: str  # where compiled code comes from, or why there is none
    precision: str
    dtype: np.dtype[Any]

    @abstractmethod
    def forward(
        self, pool: WorkerPool, batch: Batch, layers: int, threads: int, block_rows: int | None, whole_tiles: bool
    ) -> Forward:
        """Begin a pass of `layers` layers over `batch`, on at most `threads` threads.

        Each takes `block_rows` rows at a time; None leaves that to the backend. `whole_tiles` neither cuts nor merges
        tiles, which leave maps one by one.
        """

    @abstractmethod
    def lm_head(self, x: Array) -> Array:
        """Logits of all tokens from final-norm rows: (R, D) -> (R, 33)."""
