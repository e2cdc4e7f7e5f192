"""`numpyesm encode`, `predict`, `log-prob`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import AMINO_ACIDS
from ..fasta import Record
from ..results import EncodeResult, PredictResult, stack_results
from .inputs import load_model, on_records, read_records
from .outputs import chosen_format, json_bytes, npz_bytes, table, write

_ID_LENGTH = 200
_ENDINGS = {".npz": "npz", ".json": "json", ".txt": "table"}


def encode(arguments: argparse.Namespace) -> int:
    """Embeddings and whatever else `--include` names."""
    records = read_records(arguments.input, arguments.output)
    model = load_model(arguments)
    results = on_records(records, lambda s: model.encode(s, arguments.layers, arguments.include))
    return _write_results(arguments, records, results, lambda: _encode_table(records, results))


def predict(arguments: argparse.Namespace) -> int:
    """Logits at the masks or everywhere."""
    records = read_records(arguments.input, arguments.output)
    model = load_model(arguments)
    results = on_records(records, lambda s: model.predict(s, arguments.positions))
    return _write_results(arguments, records, results, lambda: predict_table(records, results, arguments.positions))


def log_prob(arguments: argparse.Namespace) -> int:
    """One number a sequence."""
    records = read_records(arguments.input, arguments.output)
    model = load_model(arguments)
    scores = on_records(records, model.log_prob)
    rows = [(r.id, len(r.sequence), float(score)) for r, score in zip(records, scores, strict=True)]
    return _write(
        arguments,
        records,
        lambda: [{"log_prob": float(score)} for score in scores],
        lambda: {"log_prob": scores},
        lambda: table(("id", "length", "log_prob"), rows),
    )


def _write_results(
    arguments: argparse.Namespace,
    records: Sequence[Record],
    results: Sequence[EncodeResult] | Sequence[PredictResult],
    as_table: Callable[[], str],
) -> int:
    """Write model results in the chosen format."""
    return _write(
        arguments, records, lambda: [result.to_dict() for result in results], lambda: stack_results(results), as_table
    )


def _write(
    arguments: argparse.Namespace,
    records: Sequence[Record],
    as_json: Callable[[], list[dict[str, Any]]],
    as_arrays: Callable[[], dict[str, npt.NDArray[Any]]],
    as_table: Callable[[], str],
) -> int:
    """Write whichever form is chosen; the others are not made."""
    form = chosen_format(arguments, _ENDINGS, "table", "json")
    if form == "json":
        data = json_bytes({"results": as_json()})
    elif form == "npz":
        data = npz_bytes(_names(records) | as_arrays())
    else:
        data = as_table().encode()
    write(data, arguments.output)
    return 0


def _names(records: Sequence[Record]) -> dict[str, npt.NDArray[Any]]:
    # A fixed width for all: one header of a megabyte must not cost a megabyte a record.
    return {"ids": np.array([record.id[:_ID_LENGTH] for record in records])}


def _encode_table(records: Sequence[Record], results: Sequence[EncodeResult]) -> str:
    """One line a sequence and output: its shape and first values."""
    rows = [
        (
            record.id,
            len(record.sequence),
            name,
            "×".join(map(str, array.shape)),
            " ".join(f"{v:9.5f}" for v in array.flat[:5]),
        )
        for record, result in zip(records, results, strict=True)
        for name, array in result.to_arrays().items()
    ]
    return table(("id", "length", "output", "shape", "first values"), rows)


def predict_table(records: Sequence[Record], results: Sequence[PredictResult], positions: str) -> str:
    """One line a mask: the five most probable amino acids."""
    rows = []
    for record, result in zip(records, results, strict=True):
        for row, position in enumerate(result.mask_positions):
            logits = result.logits[row if positions == "masked" else position].astype(np.float64)
            probability = np.exp(logits - logits.max())
            probability /= probability.sum()
            best = np.argsort(-probability)[:5]
            rows.append((record.id, position + 1, "  ".join(f"{AMINO_ACIDS[i]} {probability[i]:.3f}" for i in best)))
    return table(("id", "position", "most probable"), rows)
