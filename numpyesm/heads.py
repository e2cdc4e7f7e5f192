"""Heads: contacts and mean attention from attention maps, classes from rows, log-probabilities from logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACID_COLUMNS
from .batch import Batch, Tile
from .config import Classifier, ModelConfig
from .kernels.base import AttentionMaps

Array = npt.NDArray[Any]

# Rows of a contact map finished at a time, so that temporaries stay small compared to the map.
_CONTACT_ROWS = 128


class AttentionReader(Protocol):
    """Takes what it needs from the attention of a pass, tile by tile, layer by layer."""

    @property
    def last_layer(self) -> int:
        """Number of layers that must run for it."""

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        """Say in `maps` what the kernels must keep of this tile in layer `layer`, counted from 0."""

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        """Take what they kept; called in tile order, so that sums do not depend on threads."""


class ContactHead:
    """Contacts of a batch, accumulated head by head; never more than one map per sequence is held.

    fair-esm stacks the maps of all layers and heads, symmetrises, applies the average product correction (APC) to
    each, and runs a logistic regression over them. The regression is linear, so with S = A + Aᵀ, r = S·1 and t = Σ r

        logit = Σ_h w_h (S_h - r_h r_hᵀ / t_h) + b = M + Mᵀ - Rᵀ diag(w / t) R + b,   M = Σ_h w_h A_h

    where only M (L×L) and the row and column sums of each head are kept. Heads with w_h = 0 are never looked at.
    """

    def __init__(self, config: ModelConfig, weight: Array, bias: float, batch: Batch, dtype: npt.DTypeLike) -> None:
        by_layer = weight.reshape(config.num_layers, config.num_heads)
        self._heads = [np.flatnonzero(row) for row in by_layer]
        self._coefficients = [row[heads].astype(np.float64) for row, heads in zip(by_layer, self._heads, strict=True)]
        self._bias = bias
        self._dtype = np.dtype(dtype)
        residues = [last - first - 2 for first, last in batch.spans]
        used = sum(len(heads) for heads in self._heads)
        self._weighted = [np.zeros((n, n)) for n in residues]
        self._marginals = [np.zeros((used, n)) for n in residues]  # row sums + column sums of each head
        self._used_before = np.cumsum([0, *(len(heads) for heads in self._heads)])

    @property
    def last_layer(self) -> int:
        """The layers above have only zero coefficients."""
        used = [layer for layer, heads in enumerate(self._heads) if len(heads)]
        return used[-1] + 1 if used else 0

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        heads = self._heads[layer]
        if len(heads) == 0:
            return
        residues = _residues(tile, maps)
        length = tile.last - tile.first - 2
        maps.heads, maps.coefficients = heads, self._coefficients[layer]
        # Transposed: kernels have queries as neighbours, and M + Mᵀ is all that counts.
        maps.weighted = self._weighted[tile.sequence].T[residues]
        maps.row_sums = np.empty((len(heads), residues.stop - residues.start))
        maps.column_sums = np.empty((len(heads), length))

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        if maps.heads is None or maps.row_sums is None or maps.column_sums is None:
            return
        sums = self._marginals[tile.sequence][self._used_before[layer] : self._used_before[layer + 1]]
        sums[:, _residues(tile, maps)] += maps.row_sums
        sums += maps.column_sums

    def results(self) -> Iterator[Array]:
        """Yield the contact probabilities (L, L) of each sequence."""
        for sequence in range(len(self._weighted)):
            yield self._probabilities(sequence)
            self._weighted[sequence] = np.empty((0, 0))

    def _probabilities(self, sequence: int) -> Array:
        weighted, sums = self._weighted[sequence], self._marginals[sequence]
        coefficients = np.concatenate([np.empty(0), *self._coefficients])
        total = sums.sum(axis=1)
        # A head whose attention never falls on residues has t = 0: fair-esm divides 0 by 0 there, we leave it out.
        factor = np.divide(coefficients, total, out=np.zeros_like(total), where=total > 0)
        scaled = (sums * factor[:, None]).T
        length = len(weighted)
        contacts = np.empty((length, length), self._dtype)
        for i in range(0, length, _CONTACT_ROWS):
            rows = slice(i, min(i + _CONTACT_ROWS, length))
            for j in range(i, length, _CONTACT_ROWS):
                columns = slice(j, min(j + _CONTACT_ROWS, length))
                block = weighted[rows, columns] + weighted[columns, rows].T
                block -= scaled[rows] @ sums[:, columns]
                block += self._bias
                if i == j:  # rounding differs across the diagonal; the map is symmetric
                    block = (block + block.T) / 2
                block = sigmoid(block)
                contacts[rows, columns] = block
                contacts[columns, rows] = block.T
        return contacts


def _residues(tile: Tile, maps: AttentionMaps) -> slice:
    """Which residues of its sequence a tile holds, counted without `<cls>`."""
    before = tile.start - tile.first - 1
    return slice(before + maps.rows.start, before + maps.rows.stop)


class AttentionSummary:
    """Attention on each residue in each layer, averaged over heads and over all query rows."""

    def __init__(self, config: ModelConfig, batch: Batch, dtype: npt.DTypeLike) -> None:
        self._config = config
        self._dtype = np.dtype(dtype)
        self._sums = [np.zeros((config.num_layers, last - first), np.float64) for first, last in batch.spans]

    @property
    def last_layer(self) -> int:
        return self._config.num_layers

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        maps.summary = np.empty(tile.last - tile.first, self._dtype)

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        if maps.summary is not None:
            self._sums[tile.sequence][layer] += maps.summary

    def results(self) -> Iterator[Array]:
        """Yield (num_layers, L) for each sequence."""
        for sums in self._sums:
            yield (sums[:, 1:-1] / (sums.shape[1] * self._config.num_heads)).astype(self._dtype)


class FullAttention:
    """Every attention map of a batch, written by the kernels into the caller's arrays.

    Parameters
    ----------
    maps : sequence of ndarray (num_layers, H, T, T)
        One per sequence, `<cls>` and `<eos>` included.
    """

    def __init__(self, maps: Sequence[Array]) -> None:
        self._maps = maps

    @property
    def last_layer(self) -> int:
        return max((len(maps) for maps in self._maps), default=0)

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        maps.full = self._maps[tile.sequence][layer, :, tile.start - tile.first : tile.stop - tile.first]

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        """Nothing: the kernels have written into the caller's arrays."""


@dataclass(frozen=True)
class ClassificationHead:
    """The head of a fine-tuned classifier, for rows of the last layer.

    Attributes
    ----------
    classifier : Classifier
    dense : tuple of ndarray (D, D) and (D,), or None
        Of sequences: the layer before the last, followed by tanh.
    out_proj : tuple of ndarray (D, labels) and (labels,)
    """

    classifier: Classifier
    dense: tuple[Array, Array] | None
    out_proj: tuple[Array, Array]

    def rows(self, tokens: int) -> npt.NDArray[np.intp]:
        """Return which rows of a sequence of this many tokens are classified: `<cls>`, or every residue."""
        return np.arange(1) if self.classifier.head == "sequence" else np.arange(1, tokens - 1)

    def logits(self, x: Array) -> Array:
        """(R, D) -> (R, labels)."""
        if self.dense is not None:
            x = np.tanh(x @ self.dense[0] + self.dense[1])
        logits: Array = x @ self.out_proj[0] + self.out_proj[1]
        return logits

    def shaped(self, rows: Array) -> Array:
        """Give one sequence's rows their final shape: (labels,) if there is only one, or (L, labels)."""
        return rows[0] if self.classifier.head == "sequence" else rows

    def probabilities(self, logits: Array) -> Array:
        """Apply softmax or sigmoid over the last axis; a regression's numbers stay as they are."""
        if self.classifier.problem_type == "single_label_classification":
            return np.exp(log_softmax(logits)).astype(logits.dtype)
        return sigmoid(logits) if self.classifier.problem_type == "multi_label_classification" else logits


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Logarithm of the softmax over the last axis, in float64."""
    shifted = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def log_prob(logits: Array, tokens: Array) -> float:
    """Sum of log p(residue) over the canonical residues, softmax over the 20 amino acids.

    Parameters
    ----------
    logits : ndarray (L, 20)
    tokens : ndarray (L,)
        Token ids. Residues other than the 20 amino acids do not count.

    Returns
    -------
    float
        NaN if there is no canonical residue: 0, the empty sum, would be the best score there is.
    """
    columns = tokens.astype(np.intp) - AMINO_ACID_COLUMNS.start
    canonical = np.flatnonzero((columns >= 0) & (columns < logits.shape[1]))
    if len(canonical) == 0:
        return float("nan")
    return float(log_softmax(logits)[canonical, columns[canonical]].sum())
