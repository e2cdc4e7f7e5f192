"""Sequences of more than 2048 residues: overlapping windows, and the averages of their results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import MAX_RESIDUES
from ..options import BY_LAYER, Outputs
from ..results import EncodeResult

Array = npt.NDArray[Any]


def cuts(length: int, overlap: int) -> list[tuple[int, int]]:
    """Cover `length` residues with evenly spread windows (start, stop) of as many as the model takes.

    Neighbours share at least `overlap` residues; a sequence that fits is one window.
    """
    if length <= MAX_RESIDUES:
        return [(0, length)]
    count = -(-(length - overlap) // (MAX_RESIDUES - overlap))
    starts = [(length - MAX_RESIDUES) * i // (count - 1) for i in range(count)]
    return [(start, start + MAX_RESIDUES) for start in starts]


def needed(outputs: Outputs) -> Outputs:
    """Outputs that windows are encoded with: a mean over all residues needs their rows."""
    include = dict.fromkeys("per_token" if name == "mean" else name for name in outputs.include)
    return Outputs(tuple(include), outputs.layers)


def average(windows: Iterable[tuple[int, EncodeResult]], length: int, outputs: Outputs, index: int) -> EncodeResult:
    """Average over the windows of one sequence; every window counts the same where several overlap.

    Rows of residues (`per_token`, `logits`, `attentions`) are averaged over the windows that contain the residue;
    `mean` is taken over these averaged rows; `bos` and the classes of a sequence are averaged over the windows. A pair
    of residues that no window contains has no contact probability: NaN.

    Parameters
    ----------
    windows : iterable of (int, EncodeResult)
        First residue and result of each window, encoded with `needed(outputs)`.
    length : int
        Residues of the whole sequence.
    outputs : Outputs
        What the result has to hold.
    index : int
        Its `sequence_index`.
    """
    out = EncodeResult(index)
    sums: dict[str, Array] = {}
    counts: dict[str, Array] = {}
    for start, result in windows:
        out.labels = result.labels
        window = slice(start, start + MAX_RESIDUES)
        for name, array in result.to_arrays().items():
            # Which axes of the whole a window is a part of.
            place = (window,) * (0 if array.ndim == 1 else 2 if name == "contacts" else 1)
            part = array.T if name == "attentions" else array
            if name not in sums:
                shape = (length,) * len(place) + part.shape[len(place) :]
                small = name == "contacts"  # in bytes, of which this is many
                sums[name] = np.zeros(shape, np.float32 if small else np.float64)
                counts[name] = np.zeros(shape[: len(place)], np.uint8 if small else np.int64)
            sums[name][place] += part
            counts[name][place] += 1
    arrays = {name: _quotient(total, counts[name]) for name, total in sums.items()}
    by_layer = {
        kind: {layer: arrays[f"{kind}_{layer}"] for layer in outputs.by_layer}
        for kind in needed(outputs).include
        if kind in BY_LAYER
    }
    if "mean" in outputs.include:
        out.embeddings = {layer: rows.mean(axis=0) for layer, rows in by_layer["per_token"].items()}
    if "per_token" in outputs.include:
        out.per_token_embeddings = by_layer["per_token"]
    out.bos_embeddings = by_layer.get("bos")
    out.contacts, out.logits, out.classes = arrays.get("contacts"), arrays.get("logits"), arrays.get("classes")
    if "attentions" in arrays:
        out.attentions = np.ascontiguousarray(arrays["attentions"].T)
    return out


def _quotient(total: Array, count: Array) -> Array:
    """Divide in place; 0 / 0 is NaN, of pairs that no window contains. Return float32."""
    with np.errstate(invalid="ignore"):
        total /= count.reshape(count.shape + (1,) * (total.ndim - count.ndim))
    return total.astype(np.float32, copy=False)
