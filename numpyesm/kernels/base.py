"""What a backend provides; `encoder.py` is written once against it.

A backend either takes a pass through the layers as a whole (`Kernels.forward`), or provides the handful of numeric
steps that a layer consists of (`SteppedKernels`).

Shapes: D width, H heads, C channels a head (D = H·C), F feed-forward width, R rows of one block or tile,
L tokens of one sequence (residues + 2), T rows of the whole packed batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..config import ModelConfig
from ..threads import WorkerPool

Array = npt.NDArray[Any]

# Sequences of at most so many tokens, `<cls>` and `<eos>` included, have passes of their own on `Kernels.careful`.
FEW_TOKENS = 4


@dataclass
class AttentionMaps:
    """What one tile of one layer adds to contact maps and attention summaries; None for what is not wanted.

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
    heads: Array | None = None
    coefficients: Array | None = None
    weighted: Array | None = None
    row_sums: Array | None = None
    column_sums: Array | None = None
    summary: Array | None = None
    full: Array | None = None


@dataclass(frozen=True)
class Cut:
    """How a batch is divided among threads; results do not depend on it.

    Attributes
    ----------
    threads : int
        At most so many work on it.
    block_rows : int or None
        Rows that a thread takes at a time; None leaves it to the backend.
    whole_tiles : bool
        Tiles are neither cut nor put together: each leaves maps of its own.
    """

    threads: int
    block_rows: int | None = None
    whole_tiles: bool = False


class Forward(ABC):
    """A forward pass under way: the embedding is done, and layers follow as far as they are asked for.

    Attributes
    ----------
    x : ndarray (T, D)
        Rows of the residual stream after the layers so far; after the last layer, through the final LayerNorm.
    """

    x: Array

    @abstractmethod
    def advance(
        self,
        stop: int,
        maps: Sequence[AttentionMaps | None] | None = None,
        maps_only: bool = False,
        rows: Array | None = None,
    ) -> None:
        """Run the layers that follow, up to number `stop`.

        Parameters
        ----------
        stop : int
            Layers done afterwards; the next one where there are maps.
        maps : sequence of AttentionMaps or None, optional
            What each tile of the batch must leave.
        maps_only : bool
            Nothing else is wanted of this layer: `x` stays as it is, and no layer may follow.
        rows : ndarray of int, optional
            The rows that matter of this layer, the last one; others may stay as they are. Not with maps.
        """


class Kernels(ABC):
    """Weights of one model, laid out for one backend, and the arithmetic on packed rows.

    All methods may be called from several threads at once.
    """

    config: ModelConfig
    name: str
    precision: str
    dtype: np.dtype[Any]

    # Batches of at most this many rows run as one block: the backend spreads its own steps over the threads.
    single_block_rows: int = 0

    @property
    def careful(self) -> Kernels:
        """The same weights, with sums in pieces as short as a BLAS has them for a handful of rows.

        For sequences of at most `FEW_TOKENS` tokens: there torch's rounding is half of what it is on longer ones.
        """
        return self

    def session(self, threads: int) -> AbstractContextManager[Any]:
        """Held while a forward pass runs; `threads` is how many threads one step may use by itself."""
        return nullcontext()

    @abstractmethod
    def forward(self, pool: WorkerPool, batch: Batch, layers: int, cut: Cut) -> Forward:
        """Begin a pass of `layers` layers over `batch`."""

    @abstractmethod
    def lm_head(self, x: Array) -> Array:
        """Logits of all tokens from final-norm rows: (R, D) -> (R, 33)."""


class SteppedKernels(Kernels):
    """A backend that provides the steps of a layer, each on a block of rows; `SteppedForward` puts them together.

    All steps may be called from several threads at once, on blocks that do not overlap.
    """

    def forward(self, pool: WorkerPool, batch: Batch, layers: int, cut: Cut) -> Forward:
        from .stepped import SteppedForward

        return SteppedForward(self, pool, batch, layers, cut)

    @abstractmethod
    def embed(self, tokens: Array, scale: Array) -> Array:
        """Rows of the embedding times their scale: (T,), (T,) -> (T, D)."""

    @abstractmethod
    def rotary_tables(self, length: int) -> Array:
        """Whatever `qkv` needs to rotate positions 0 to `length - 1`; the first axis is the position."""

    @abstractmethod
    def new_qkv(self, rows: int) -> Array:
        """Room for query, key and value of `rows` rows; the first axis is the row."""

    @abstractmethod
    def qkv(self, layer: int, x: Array, rotary: list[Array], out: Array) -> None:
        """LayerNorm, query/key/value projection, rotation: (R, D) -> out (R, ...).

        `rotary` holds consecutive pieces of the rotary table that together cover the R rows.
        """

    @abstractmethod
    def attention(self, query: Array, keys: Array, out: Array | None, maps: AttentionMaps | None) -> None:
        """Attention of the rows `query` (a piece of `qkv`'s output) over the sequence `keys`: -> out (R, D)."""

    @abstractmethod
    def project_and_feed_forward(self, layer: int, context: Array, x: Array) -> None:
        """x += out_proj(context); x += fc2(gelu(fc1(LayerNorm(x)))), in place: (R, D), (R, D)."""

    @abstractmethod
    def final_norm(self, x: Array, out: Array) -> None:
        """LayerNorm after the last layer: (R, D) -> out (R, D)."""


def divide_threads(kernels: Kernels, rows: int, threads: int) -> tuple[int, int]:
    """(blocks at a time, threads that one step may use by itself) for a batch of this many rows."""
    return (1, threads) if rows <= kernels.single_block_rows else (threads, 1)
