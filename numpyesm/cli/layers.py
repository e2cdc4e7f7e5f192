"""`numpyesm layers`: find the layer whose embeddings predict a property best, by cross-validation."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import tokenize
from ..errors import InvalidOption, InvalidSequence
from ..extras import require
from ..model import ESM2
from ..options import Outputs
from ..scoring.correlation import spearman
from .inputs import check_output_is_another, load_model
from .outputs import Destination, csv_pieces, destination, table
from .variant_table import InvalidTable, VariantTable, read_table

_ENDINGS = {".tsv": "tsv", ".csv": "csv", ".txt": "table"}
_BAR = 40  # characters of the best score's bar


def run(arguments: argparse.Namespace) -> int:
    """Embed once with all layers, score each, and say which is best and how much stopping there saves."""
    target = destination(arguments, _ENDINGS, terminal="table", otherwise="table")
    selection = require("sklearn.model_selection", "numpyesm layers", "sklearn")
    if arguments.folds < 2:
        raise InvalidOption(f"--folds {arguments.folds}: expected 2 or more")
    check_output_is_another(arguments.table, target.path)
    found = read_table(arguments.table, [arguments.sequence_column, arguments.target])
    sequences = found.require(arguments.sequence_column, "--sequence-column")
    tokens = _tokens(found, sequences)
    groups = np.unique([ids.tobytes() for ids in tokens], return_inverse=True)[1]
    task, labels = _labels(found, groups, arguments)
    # A sequence with several rows is in one fold only: otherwise a model would know it from training.
    folds = selection.StratifiedGroupKFold(arguments.folds, shuffle=True, random_state=0)
    strata = labels if task == "classification" else np.zeros(len(labels))
    splits = list(folds.split(strata, strata, groups))
    model = load_model(arguments)
    embeddings = _embeddings(model, tokens)
    layers = range(embeddings.shape[1])
    scores = [_scores(embeddings[:, layer], labels, task, splits) for layer in layers]
    _write(target, np.array(scores), task)
    _advise(np.mean(scores, axis=1))
    return 0


def _labels(
    found: VariantTable, groups: npt.NDArray[np.intp], arguments: argparse.Namespace
) -> tuple[str, npt.NDArray[Any]]:
    """Return the task and the target's values: numbers for regression, names for classification.

    `groups` numbers the sequences; equal ones have the same number.
    """
    fields = [field.strip() for field in found.require(arguments.target, "--target")]
    numbers = [math.nan if number is None else number for number in found.numbers(arguments.target, "--target")]
    task = arguments.task or ("regression" if sum(map(math.isfinite, numbers)) * 2 > len(fields) else "classification")
    for row, field, number in zip(found.rows, fields, numbers, strict=True):
        if not field or (task == "regression" and not math.isfinite(number)):
            expected = "a number (--task classification takes names)" if task == "regression" else "a name"
            place = f"{found.name}, line {row.line}"
            raise InvalidTable(f"{place}: {arguments.target} is {field[:40]!r}, expected {expected}")
    smallest, what = len(set(groups)), "different sequences"
    if task == "classification":
        pairs = set(zip(fields, groups, strict=True))
        smallest = min(Counter(field for field, _ in pairs).values(), default=0)
        what += " of the rarest class"
    if smallest < arguments.folds:
        raise InvalidTable(f"{found.name} has {smallest} {what}, fewer than the {arguments.folds} --folds")
    if len(set(fields)) < 2:
        raise InvalidTable(f"{found.name}: {arguments.target} is {fields[0][:40]!r} in every row")
    return task, np.array(fields if task == "classification" else numbers)


def _tokens(found: VariantTable, sequences: Sequence[str]) -> list[npt.NDArray[np.uint8]]:
    try:
        return tokenize([sequence.strip() for sequence in sequences])
    except InvalidSequence as error:
        if error.item is None:
            raise
        raise InvalidTable(f"{found.name}, line {found.rows[error.item].line}: {error.reason}") from error


def _embeddings(model: ESM2, tokens: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Means of all layers from one pass each: (n, layers + 1, D)."""
    outputs = Outputs.check(model.checkpoint, range(model.config.num_representations), ["mean"])
    embeddings = np.empty((len(tokens), model.config.num_representations, model.config.embed_dim), np.float32)
    for row, result in zip(embeddings, model.passes.encode(tokens, outputs), strict=True):
        row[...] = list(result.to_arrays().values())
    return embeddings


def _scores(X: npt.NDArray[np.float32], y: npt.NDArray[Any], task: str, splits: Any) -> list[float]:
    """One score per fold: Spearman's correlation of ridge regression, accuracy of logistic regression."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if task == "classification":
        head, scoring = LogisticRegression(max_iter=1000), "accuracy"
    else:
        head, scoring = RidgeCV(np.logspace(-2, 5, 8)), make_scorer(lambda a, b: spearman(a, b) or 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about convergence, which hardly changes how layers rank
        scores: npt.NDArray[np.float64] = cross_val_score(
            make_pipeline(StandardScaler(), head), X, y, cv=splits, scoring=scoring
        )
    return list(map(float, np.nan_to_num(scores)))


def _write(target: Destination, scores: npt.NDArray[np.float64], task: str) -> None:
    """Write a line per layer: mean and standard deviation over the folds and, in a table for reading, a bar."""
    name = "accuracy" if task == "classification" else "spearman"
    means = scores.mean(axis=1)
    rows = list(zip(range(len(means)), means.tolist(), scores.std(axis=1).tolist(), strict=True))
    if target.form != "table":
        target.write(csv_pieces(("layer", name, "std"), rows, target.form))
        return
    best, most = int(means.argmax()), max(float(means.max()), 1e-9)
    bars = ["█" * round(_BAR * max(0.0, mean) / most) + " best" * (layer == best) for layer, mean, _ in rows]
    lines = [(layer, mean, f"±{std:.4f}", bar) for (layer, mean, std), bar in zip(rows, bars, strict=True)]
    target.write(table(("layer", name, "std", ""), lines))


def _advise(means: npt.NDArray[np.float64]) -> None:
    best, last = int(means.argmax()), len(means) - 1
    saved = round(100 * (last - best) / last)
    text = f"layer {best} is best: {means[best]:.4f}; the last layer has {means[last]:.4f}"
    if best == 0:
        text += "; layer 0 embeds single letters, so here the composition says as much as the model"
    elif saved:
        text += f"; `numpyesm convert WEIGHTS --layers {best} -o FILE` drops those above: {saved} % less to compute"
    print(f"numpyesm: {text}", file=sys.stderr)
