"""Sequences of more than 2048 residues: overlapping windows, and the averages of their results."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import MAX_RESIDUES
from ..options import Outputs
from ..results import EncodeResult

Array = npt.NDArray[Any]


def cuts(length: int, overlap: int, size: int = MAX_RESIDUES) -> list[tuple[int, int]]:
    """Cover `length` residues with evenly spread windows (start, stop) of `size` residues.

    Neighbours share at least `overlap` residues; a sequence that fits is one window.
    """
    if length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = [(length - size) * i // (count - 1) for i in range(count)]
    return [(start, start + size) for start in starts]


class WindowAverage:
    """The average over the windows of one sequence; every window counts the same where several overlap.

    Rows of residues (`per_token`, `logits`, `attentions`) are averaged over the windows that contain the residue;
    `mean` is taken over these averaged rows; `bos` and the classes of a sequence are averaged over the windows. A pair
    of residues that no window contains has no contact probability: NaN.

    Parameters
    ----------
    length : int
        Residues of the whole sequence.
    outputs : Outputs
        What the result has to hold; the windows must be encoded with `needed(outputs)`.
    """

    def __init__(self, length: int, outputs: Outputs) -> None:
        self._length = length
        self._outputs = outputs
        self._windows = 0
        self._seen = np.zeros(length)
        self._rows: dict[int | str, Array] = {}
        self._vectors: dict[int | str, Array] = {}
        self._labels: list[str] | None = None
        self._contacts: Array | None = None
        self._pairs: Array | None = None

    @staticmethod
    def needed(outputs: Outputs) -> Outputs:
        """Outputs that the windows are encoded with: a mean over all residues needs their rows."""
        include = dict.fromkeys("per_token" if name == "mean" else name for name in outputs.include)
        return Outputs(tuple(include), outputs.layers)

    def add(self, start: int, result: EncodeResult) -> None:
        """Add the result of the window that begins at residue `start`."""
        self._windows += 1
        for layer, rows in (result.per_token_embeddings or {}).items():
            self._add_rows(layer, start, rows)
        for layer, row in (result.bos_embeddings or {}).items():
            self._add_vector(layer, row)
        if result.classes is not None:
            self._labels = result.labels
            if result.classes.ndim == 1:
                self._add_vector("classes", result.classes)
            else:
                self._add_rows("classes", start, result.classes)
        if result.logits is not None:
            self._add_rows("logits", start, result.logits)
        if result.attentions is not None:
            self._add_rows("attentions", start, result.attentions.T)
        if result.contacts is not None:
            if self._contacts is None or self._pairs is None:
                self._contacts = np.zeros((self._length, self._length), np.float32)
                self._pairs = np.zeros((self._length, self._length), np.uint8)
            stop = start + len(result.contacts)
            self._contacts[start:stop, start:stop] += result.contacts
            self._pairs[start:stop, start:stop] += 1
        self._seen[start : start + MAX_RESIDUES] += 1

    def _add_vector(self, name: int | str, vector: Array) -> None:
        self._vectors[name] = self._vectors.get(name, 0) + vector.astype(np.float64)

    def _add_rows(self, name: int | str, start: int, rows: Array) -> None:
        if name not in self._rows:
            self._rows[name] = np.zeros((self._length, rows.shape[1]))
        self._rows[name][start : start + len(rows)] += rows

    def result(self, index: int) -> EncodeResult:
        """The averages, once all windows have been added."""
        include, layers = self._outputs.include, self._outputs.layers
        out = EncodeResult(index)
        rows = {name: (total / self._seen[:, None]).astype(np.float32) for name, total in self._rows.items()}
        vectors = {name: (total / self._windows).astype(np.float32) for name, total in self._vectors.items()}
        if "mean" in include:
            out.embeddings = {layer: rows[layer].mean(axis=0) for layer in layers}
        if "per_token" in include:
            out.per_token_embeddings = {layer: rows[layer] for layer in layers}
        if "bos" in include:
            out.bos_embeddings = {layer: vectors[layer] for layer in layers}
        if "logits" in include:
            out.logits = rows["logits"]
        if "attentions" in include:
            out.attentions = np.ascontiguousarray(rows["attentions"].T)
        if "classes" in include:
            out.classes, out.labels = (rows | vectors)["classes"], self._labels
        if self._contacts is not None and self._pairs is not None:
            with np.errstate(invalid="ignore"):
                # 0 / 0 where no window contains the pair.
                out.contacts = np.divide(self._contacts, self._pairs, out=self._contacts, dtype=np.float32)
        return out
