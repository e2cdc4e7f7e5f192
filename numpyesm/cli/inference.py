"""`numpyesm encode`, `predict`, `classify`, `log-prob`."""

from __future__ import annotations

import argparse
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from ..alphabet import AMINO_ACIDS, nothing_to_score
from ..config import Classifier
from ..errors import InputWarning, InvalidOption, warn
from ..fasta import Record
from ..formats import Result
from ..heads import log_softmax
from ..model import ESM2
from ..options import check_includes, require_classifier
from ..results import ClassifyResult, EncodeResult, PredictResult
from .inputs import compute, read_records
from .outputs import Destination, csv_pieces, destination, result_pieces, table

_ENDINGS = {".json": "json", ".npz": "npz", ".csv": "csv", ".tsv": "tsv", ".txt": "table"}
# Outputs that a table can hold: a row per sequence, or a row per residue.
_PER_SEQUENCE, _PER_RESIDUE = {"mean", "bos"}, {"per_token", "logits"}
# Labels that do not exclude each other hold from this probability on.
_HOLDS = 0.5

Table = tuple[Sequence[str], Iterable[Sequence[object]]]
AnyResult = TypeVar("AnyResult", bound=Result)


def encode(arguments: argparse.Namespace) -> int:
    """Write embeddings and whatever else `--include` names."""
    target, records = _prepare(arguments)
    wanted = check_includes(arguments.include)
    if target.form in ("csv", "tsv") and not (wanted <= _PER_SEQUENCE or wanted <= _PER_RESIDUE):
        raise InvalidOption(
            f"{target.form} has a row per sequence (mean, bos) or a row per residue (per_token, logits), "
            f"and --include asks for {', '.join(sorted(wanted))}: write .npz or .json"
        )
    _, results = compute(arguments, records, lambda model, s: model.encode(s, arguments.layers, arguments.include))
    return _write(target, records, results, _sequence_rows if wanted <= _PER_SEQUENCE else _residue_rows, _summary)


def predict(arguments: argparse.Namespace) -> int:
    """Write logits at the masks or everywhere."""
    target, records = _prepare(arguments, masks=True)
    positions = arguments.positions or ("masked" if target.form == "table" else "all")
    _, results = compute(arguments, records, lambda model, s: model.predict(s, positions))
    return _write(target, records, results, _logit_rows, most_probable)


def classify(arguments: argparse.Namespace) -> int:
    """Write the label and the probability of each label, per sequence or per residue (as the head has it)."""
    target, records = _prepare(arguments)
    model, results = compute(arguments, records, ESM2.classify)
    rows = partial(_class_rows, classifier=require_classifier(model.checkpoint))
    return _write(target, records, results, rows, partial(rows, text=False))


def log_prob(arguments: argparse.Namespace) -> int:
    """Write one number per sequence."""
    target, records = _prepare(arguments)
    with warnings.catch_warnings():
        # The model's own note numbers the items; here they have names.
        warnings.filterwarnings("ignore", re.escape(nothing_to_score([])), InputWarning)
        _, found = compute(arguments, records, ESM2.log_prob)
    scores = found.tolist()
    if empty := [r.id for r, score in zip(records, scores, strict=True) if math.isnan(score)]:
        warn(nothing_to_score(empty), InputWarning)
    return _write(target, records, scores, _score_rows, _score_rows)


def _prepare(arguments: argparse.Namespace, masks: bool = False) -> tuple[Destination, list[Record]]:
    """Check where the results will go, and read the records."""
    target = destination(arguments, _ENDINGS, terminal="table", otherwise="json")
    return target, read_records(arguments.input, target.path, arguments.ids, masks)


def _write(
    target: Destination,
    records: Sequence[Record],
    results: Sequence[AnyResult],
    spreadsheet: Callable[[Sequence[Record], Sequence[AnyResult]], Table],
    summary: Callable[[Sequence[Record], Sequence[AnyResult]], Table],
) -> int:
    """Write the chosen form; the others are not computed."""
    if target.form in ("json", "npz"):
        target.write(result_pieces(target.form, results, [record.id for record in records]))
    elif target.form == "table":
        target.write(table(*summary(records, results)))
    else:
        target.write(csv_pieces(*spreadsheet(records, results), target.form))
    return 0


def _score_rows(records: Sequence[Record], scores: Sequence[float]) -> Table:
    rows = [(r.id, len(r.sequence), score) for r, score in zip(records, scores, strict=True)]
    return ("id", "length", "log_prob"), rows


def _sequence_rows(records: Sequence[Record], results: Sequence[EncodeResult]) -> Table:
    """Return a row per sequence, a column per number: `mean_12_0`, `mean_12_1`, …"""
    arrays = [result.to_arrays() for result in results]
    header = ["id", *(f"{name}_{i}" for name, array in arrays[0].items() for i in range(array.size))]
    return header, (
        [record.id, *_digits(np.concatenate(list(one.values())))] for record, one in zip(records, arrays, strict=True)
    )


def _residue_rows(records: Sequence[Record], results: Sequence[EncodeResult]) -> Table:
    """Return a row per residue: id, position (from 1), residue, and a column per number."""
    arrays = [result.to_arrays() for result in results]
    header = ["id", "position", "residue"]
    for name, array in arrays[0].items():
        header += [f"{name}_{column}" for column in (AMINO_ACIDS if name == "logits" else range(array.shape[1]))]
    return header, (
        [record.id, position, residue, *_digits(row)]
        for record, one in zip(records, arrays, strict=True)
        for position, (residue, row) in enumerate(zip(record.sequence, np.hstack(list(one.values())), strict=True), 1)
    )


def _logit_rows(records: Sequence[Record], results: Sequence[PredictResult]) -> Table:
    """Return a row per residue or mask: id, position (from 1), token, and a logit per amino acid."""
    return ["id", "position", "token", *AMINO_ACIDS], (
        [record.id, position + 1, result.sequence_tokens[position], *_digits(row)]
        for record, result in zip(records, results, strict=True)
        for position, row in _rows(result)
    )


def _rows(result: PredictResult) -> Iterator[tuple[int, np.ndarray]]:
    """Pair each row of logits with its position (from 0): all residues, or the masks alone."""
    everywhere = len(result.logits) != len(result.mask_positions)
    return zip(range(len(result.logits)) if everywhere else result.mask_positions, result.logits, strict=True)


def _class_rows(
    records: Sequence[Record], results: Sequence[ClassifyResult], classifier: Classifier, text: bool = True
) -> Table:
    """Return a row per sequence or residue: id (position from 1, residue), label, and the probability of each label."""
    residues, regression = classifier.head == "token", classifier.problem_type == "regression"
    header = ["id", *(["position", "residue"] if residues else []), *([] if regression else ["label"])]

    def rows() -> Iterator[Sequence[object]]:
        for record, result in zip(records, results, strict=True):
            letters: Sequence[str] = record.sequence if residues else [""]
            for position, (letter, row) in enumerate(zip(letters, np.atleast_2d(result.probabilities), strict=True), 1):
                place = [position, letter] if residues else []
                label = [] if regression else [_label(row, classifier)]
                yield [record.id, *place, *label, *(_digits(row) if text else row.tolist())]

    return [*header, *classifier.labels], rows()


def _label(probabilities: np.ndarray, classifier: Classifier) -> str:
    """Name the most probable label or, where several may hold, all those with a probability of at least 0.5."""
    if classifier.problem_type == "multi_label_classification":
        return ";".join(classifier.labels[i] for i in np.flatnonzero(probabilities >= _HOLDS))
    return classifier.labels[int(np.argmax(probabilities))]


def _digits(row: np.ndarray) -> list[str]:
    """Write each float32 with the fewest digits that give it back."""
    written: list[str] = row.astype("U32").tolist()
    return written


def _summary(records: Sequence[Record], results: Sequence[EncodeResult]) -> Table:
    """Return a line per sequence and output: its shape and first values."""
    rows = []
    for record, result in zip(records, results, strict=True):
        for name, array in result.to_arrays().items():
            shape, first = "×".join(map(str, array.shape)), " ".join(f"{v:9.5f}" for v in array.flat[:5])
            rows.append((record.id, len(record.sequence), name, shape, first))
    return ("id", "length", "output", "shape", "first values"), rows


def most_probable(records: Sequence[Record], results: Sequence[PredictResult]) -> Table:
    """Return a line per residue or mask: the five most probable amino acids."""
    rows = []
    for record, result in zip(records, results, strict=True):
        for position, logits in _rows(result):
            probability = np.exp(log_softmax(logits[None]))[0]
            best = [f"{AMINO_ACIDS[i]} {probability[i]:.3f}" for i in np.argsort(-probability)[:5]]
            rows.append((record.id, position + 1, "  ".join(best)))
    return ("id", "position", "most probable"), rows
