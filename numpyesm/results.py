"""What the model returns, and how large it is. `to_dict()` has the JSON shape of the HTTP service."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .alphabet import AMINO_ACIDS
from .config import ModelConfig
from .options import BY_LAYER, Outputs

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """One array of a result (`mean_12`, `contacts`): its kind, as in `include`, and its layer, if it belongs to one."""

    kind: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """As in `EncodeResult.to_arrays`."""
        return self.kind if self.layer is None else f"{self.kind}_{self.layer}"

    def shape(self, config: ModelConfig, residues: int) -> tuple[int, ...]:
        """Shape of the array for a sequence of this many residues."""
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (config.embed_dim,),
            "bos": (config.embed_dim,),
            "per_token": (residues, config.embed_dim),
            "contacts": (residues, residues),
            "logits": (residues, len(AMINO_ACIDS)),
            "attentions": (config.num_layers, residues),
        }
        if config.classifier is not None:
            labels = len(config.classifier.labels)
            shapes["classes"] = (labels,) if config.classifier.head == "sequence" else (residues, labels)
        return shapes[self.kind]


def fields(outputs: Outputs) -> Iterator[Field]:
    """Yield the arrays that a result holds, in a fixed order."""
    for kind in outputs.include:
        for layer in outputs.layers if kind in BY_LAYER else (None,):
            yield Field(kind, layer)


def count_numbers(outputs: Outputs, config: ModelConfig, residues: int) -> int:
    """Count the numbers in the result of one sequence, all arrays together."""
    return sum(math.prod(field.shape(config, residues)) for field in fields(outputs))


# Each kind of embedding, its attribute of EncodeResult, and what its arrays are called in JSON.
_PER_LAYER = (
    ("mean", "embeddings", "embedding"),
    ("bos", "bos_embeddings", "embedding"),
    ("per_token", "per_token_embeddings", "embeddings"),
)
# The other arrays of EncodeResult, and the attributes that name their columns.
_WHOLE = {"contacts": None, "logits": "vocab_tokens", "attentions": None, "classes": "labels"}


@dataclass(eq=False)
class EncodeResult:
    """Outputs of `ESM2.encode` for one sequence of L residues; None for what was not asked for.

    Attributes
    ----------
    sequence_index : int
        Place of the sequence in the batch.
    embeddings : dict of int to ndarray (D,) float32, or None
        Mean over the residues, per layer, ascending.
    bos_embeddings : dict of int to ndarray (D,) float32, or None
        The `<cls>` row.
    per_token_embeddings : dict of int to ndarray (L, D) float32, or None
        One row per residue.
    contacts : ndarray (L, L) float32, or None
        Contact probabilities.
    logits : ndarray (L, 20) float32, or None
        Columns in the order of `vocab_tokens`.
    attentions : ndarray (num_layers, L) float32, or None
        Mean over heads and over all query positions (`<cls>` and `<eos>` counted), at each residue.
    classes : ndarray (labels,) float32, or (L, labels) of a head for residues, or None
        Probabilities as `ClassifyResult` has them; columns in the order of `labels`.
    labels : list of str, or None
    """

    sequence_index: int
    embeddings: dict[int, FloatArray] | None = None
    bos_embeddings: dict[int, FloatArray] | None = None
    per_token_embeddings: dict[int, FloatArray] | None = None
    contacts: FloatArray | None = None
    logits: FloatArray | None = None
    attentions: FloatArray | None = None
    classes: FloatArray | None = None
    labels: list[str] | None = None

    @property
    def vocab_tokens(self) -> list[str]:
        """Amino acids of the 20 logit columns."""
        return list(AMINO_ACIDS)

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """The service's JSON shape: lists and numbers only; with `arrays`, the arrays as they are."""
        form: Any = np.asarray if arrays else np.ndarray.tolist
        out: dict[str, Any] = {"sequence_index": self.sequence_index}
        for _, name, key in _PER_LAYER:
            if (by_layer := getattr(self, name)) is not None:
                out[name] = [{"layer": layer, key: form(values)} for layer, values in by_layer.items()]
        for name, columns in _WHOLE.items():
            if (array := getattr(self, name)) is not None:
                out[name] = form(array)
                if columns:
                    out[columns] = getattr(self, columns)
        return out

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Flat named arrays for `np.savez`: `mean_6`, `bos_12`, `per_token_12`, and others by their names."""
        out = {
            f"{kind}_{layer}": values
            for kind, name, _ in _PER_LAYER
            for layer, values in (getattr(self, name) or {}).items()
        }
        return out | {name: getattr(self, name) for name in _WHOLE if getattr(self, name) is not None}


@dataclass
class FullOutput:
    """Where everything about one sequence of T tokens goes, `<cls>` and `<eos>` included, for the fair-esm look-alike.

    Arrays to be filled; None for what is not asked for.
    """

    representations: dict[int, FloatArray]  # of each layer (T, D)
    logits: FloatArray | None  # (T, 33)
    attentions: FloatArray | None  # (num_layers, H, T, T)
    contacts: FloatArray | None  # (T - 2, T - 2)


@dataclass(eq=False)
class PredictResult:
    """Outputs of `ESM2.predict` for one sequence of L residues.

    Attributes
    ----------
    sequence_index : int
        Place of the sequence in the batch.
    logits : ndarray (L, 20) float32, or (masks, 20) with `positions="masked"`
        Columns in the order of `vocab_tokens`.
    sequence_tokens : list of str
        The L residues, `<mask>` as one token.
    mask_positions : list of int
        0-based indices of the masks in `sequence_tokens`, ascending: the rows of `logits` with `positions="masked"`.
    """

    sequence_index: int
    logits: FloatArray
    sequence_tokens: list[str]
    mask_positions: list[int]

    @property
    def vocab_tokens(self) -> list[str]:
        """Amino acids of the 20 logit columns."""
        return list(AMINO_ACIDS)

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """The service's JSON shape: lists and numbers only; with `arrays`, the arrays as they are."""
        return {
            "logits": self.logits if arrays else self.logits.tolist(),
            "sequence_tokens": self.sequence_tokens,
            "vocab_tokens": self.vocab_tokens,
        }

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Flat named arrays for `np.savez`."""
        return {"logits": self.logits, "mask_positions": np.asarray(self.mask_positions, dtype=np.int64)}


@dataclass(eq=False)
class ClassifyResult:
    """Outputs of `ESM2.classify` for one sequence of L residues.

    Attributes
    ----------
    sequence_index : int
        Place of the sequence in the batch.
    logits : ndarray (labels,) float32, or (L, labels) of a head for residues
        What the head gives, columns in the order of `labels`.
    probabilities : ndarray of the same shape
        Softmax of the logits or, if labels do not exclude each other, sigmoid; of a regression, the logits themselves.
    labels : list of str
    """

    sequence_index: int
    logits: FloatArray
    probabilities: FloatArray
    labels: list[str]

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """The service's JSON shape: lists, numbers and names only; with `arrays`, the arrays as they are."""
        form: Any = np.asarray if arrays else np.ndarray.tolist
        return {
            "sequence_index": self.sequence_index,
            "logits": form(self.logits),
            "probabilities": form(self.probabilities),
            "labels": self.labels,
        }

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Flat named arrays for `np.savez`."""
        return {"logits": self.logits, "probabilities": self.probabilities}


def stack_results(results: Sequence[EncodeResult | PredictResult | ClassifyResult]) -> dict[str, npt.NDArray[Any]]:
    """Collect the arrays of all sequences: vectors (`mean_12`) as (n, D), others one by one (`contacts_0`)."""
    arrays = [result.to_arrays() for result in results]
    stacked = {
        name: np.stack([one[name] for one in arrays])
        for name, array in arrays[0].items()
        if array.ndim == 1 and name != "mask_positions"
    }
    return stacked | {
        f"{name}_{i}": value for i, one in enumerate(arrays) for name, value in one.items() if name not in stacked
    }
