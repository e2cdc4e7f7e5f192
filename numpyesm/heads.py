"""Heads: contacts and mean attention from attention maps, classes from rows, log-probabilities from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACID_COLUMNS
from .batch import Batch, Tile
from .config import ModelConfig
from .kernels.base import AttentionMaps
from .options import require_classifier
from .results import EncodeResult, FullOutput
from .weights.checkpoint import CLASSIFIER, Checkpoint

Array = npt.NDArray[Any]

# Rows of a contact map finished at a time, so that temporaries stay small compared to the map.
_CONTACT_ROWS = 128


class AttentionReader:
    """Takes what it needs from the attention of a pass, tile by tile, layer by layer; by default nothing."""

    last_layer: int  # number of layers that must run for it

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        """Say in `maps` what the kernels must keep of this tile in layer `layer`, counted from 0."""

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        """Take what they kept; called in tile order, so that sums do not depend on threads."""

    def store(self, results: Sequence[Any]) -> None:
        """Put what was found into the results of the batch's sequences."""


class ContactHead(AttentionReader):
    """Contacts of a batch, accumulated head by head; never more than one map per sequence is held.

    fair-esm stacks the maps of all layers and heads, symmetrises, applies the average product correction (APC) to
    each, and runs a logistic regression over them. The regression is linear, so with S = A + Aᵀ, r = S·1 and t = Σ r

        logit = Σ_h w_h (S_h - r_h r_hᵀ / t_h) + b = M + Mᵀ - Rᵀ diag(w / t) R + b,   M = Σ_h w_h A_h

    where only M (L×L) and the row and column sums of each head are kept. Heads with w_h = 0 are never looked at.
    """

    def __init__(self, checkpoint: Checkpoint, batch: Batch, dtype: np.dtype[Any]) -> None:
        weight = checkpoint.array("contact_head.weight", dtype)
        self._bias = float(checkpoint.array("contact_head.bias", dtype)[0])
        self._dtype = dtype
        self._heads = [np.flatnonzero(row) for row in weight.reshape(checkpoint.config.num_layers, -1)]
        self._coefficients = weight[weight != 0].astype(np.float64)
        ends = np.cumsum([len(heads) for heads in self._heads])
        # Which of these coefficients belong to each layer.
        self._shares = [slice(end - len(heads), end) for heads, end in zip(self._heads, ends, strict=True)]
        # The layers above have only zero coefficients.
        self.last_layer = max((layer for layer, heads in enumerate(self._heads, 1) if len(heads)), default=0)
        residues = [last - first - 2 for first, last in batch.spans]
        self._weighted = [np.zeros((n, n)) for n in residues]
        self._marginals = [np.zeros((len(self._coefficients), n)) for n in residues]  # row + column sums of each head

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        heads = self._heads[layer]
        if len(heads) == 0:
            return
        residues = _residues(tile, maps)
        length = tile.last - tile.first - 2
        maps.heads, maps.coefficients = heads, self._coefficients[self._shares[layer]]
        # Transposed: kernels have queries as neighbours, and M + Mᵀ is all that counts.
        maps.weighted = self._weighted[tile.sequence].T[residues]
        maps.row_sums = np.empty((len(heads), residues.stop - residues.start))
        maps.column_sums = np.empty((len(heads), length))

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        if len(maps.heads) == 0:
            return
        sums = self._marginals[tile.sequence][self._shares[layer]]
        sums[:, _residues(tile, maps)] += maps.row_sums
        sums += maps.column_sums

    def store(self, results: Sequence[EncodeResult | FullOutput]) -> None:
        for sequence, result in enumerate(results):
            result.contacts = self._probabilities(self._weighted[sequence], self._marginals[sequence])
            self._weighted[sequence] = np.empty((0, 0))

    def _probabilities(self, weighted: Array, sums: Array) -> Array:
        """Contacts of one sequence (L, L), from M (L, L) and R (heads, L)."""
        total = sums.sum(axis=1)
        # A head whose attention never falls on residues has t = 0: fair-esm divides 0 by 0 there, we leave it out.
        factor = np.divide(self._coefficients, total, out=np.zeros_like(total), where=total > 0)
        scaled = (sums * factor[:, None]).T
        length = len(weighted)
        contacts = np.empty((length, length), self._dtype)
        for i in range(0, length, _CONTACT_ROWS):
            rows = slice(i, i + _CONTACT_ROWS)
            for j in range(i, length, _CONTACT_ROWS):
                columns = slice(j, j + _CONTACT_ROWS)
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


class AttentionSummary(AttentionReader):
    """Attention on each residue in each layer, averaged over heads and over all query rows: (num_layers, L)."""

    def __init__(self, config: ModelConfig, batch: Batch, dtype: np.dtype[Any]) -> None:
        self.last_layer = config.num_layers
        self._num_heads = config.num_heads
        self._dtype = dtype
        self._sums = [np.zeros((config.num_layers, last - first)) for first, last in batch.spans]

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        maps.summary = np.empty(tile.last - tile.first, self._dtype)

    def collect(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        assert maps.summary is not None
        self._sums[tile.sequence][layer] += maps.summary

    def store(self, results: Sequence[EncodeResult]) -> None:
        for result, sums in zip(results, self._sums, strict=True):
            result.attentions = (sums[:, 1:-1] / (sums.shape[1] * self._num_heads)).astype(self._dtype)


class FullAttention(AttentionReader):
    """Every attention map of a batch, written by the kernels into the caller's arrays.

    `maps` has one (num_layers, H, T, T) for each sequence, `<cls>` and `<eos>` included.
    """

    def __init__(self, maps: Sequence[Array]) -> None:
        self._maps = maps
        self.last_layer = len(maps[0])

    def request(self, layer: int, tile: Tile, maps: AttentionMaps) -> None:
        maps.full = self._maps[tile.sequence][layer, :, tile.start - tile.first : tile.stop - tile.first]


class ClassificationHead:
    """The head of a fine-tuned classifier, for rows of the last layer; MissingHead if the weights have none."""

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype[Any]) -> None:
        self.classifier = require_classifier(checkpoint)
        # Of sequences, a layer before the last one, followed by tanh.
        names = ("dense", "out_proj") if self.classifier.head == "sequence" else ("out_proj",)
        self._weights = [checkpoint.array(f"{CLASSIFIER}{name}.weight", dtype) for name in names]
        self._biases = [checkpoint.array(f"{CLASSIFIER}{name}.bias", dtype) for name in names]

    def rows(self, tokens: int) -> npt.NDArray[np.intp]:
        """Return which rows of a sequence of this many tokens are classified: `<cls>`, or every residue."""
        return np.arange(1) if self.classifier.head == "sequence" else np.arange(1, tokens - 1)

    def logits(self, x: Array) -> Array:
        """(R, D) -> (R, labels). Row by row: BLAS rounds a row differently beside others."""
        x = x[:, None]
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = np.tanh(x @ weight + bias)
        logits: Array = (x @ self._weights[-1])[:, 0] + self._biases[-1]
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
    """Sum log p(residue) over the 20 amino acids among these residues, with softmax over them: (L, 20), (L,) -> ().

    NaN if there is none: 0, the empty sum, would be the best score there is.
    """
    columns = tokens.astype(np.intp) - AMINO_ACID_COLUMNS.start
    canonical = np.flatnonzero((columns >= 0) & (columns < logits.shape[1]))
    if len(canonical) == 0:
        return float("nan")
    return float(log_softmax(logits)[canonical, columns[canonical]].sum())
