"""What people hand over instead of a list of sequences: taken for what it is, or refused, at every door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from numpyesm import ESM2, InvalidMutation, InvalidSequence
from numpyesm.fasta import Record
from numpyesm.given import labelled

pandas = pytest.importorskip("pandas")
polars = pytest.importorskip("polars")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("sklearn")

from numpyesm.sklearn import ESM2Embedder  # noqa: E402

FEW = ["MKT", "AYIAK", "W"]
IDS = ["sp|P1", "b", "17"]

TAKEN: dict[str, tuple[Callable[[], Any], list[str | None]]] = {
    "mapping": (lambda: dict(zip(IDS, FEW, strict=True)), list(IDS)),
    "mapping from numbers": (lambda: dict(enumerate(FEW)), ["0", "1", "2"]),
    "generator": (lambda: (s for s in FEW), [None] * 3),
    "array": (lambda: np.array(FEW), [None] * 3),
    "array of one column": (lambda: np.array(FEW, object)[:, None], [None] * 3),
    "series": (lambda: pandas.Series(FEW, index=[7, 8, 9]), [None] * 3),
    "series with names": (lambda: pandas.Series(FEW, index=IDS, dtype="category"), list(IDS)),
    "frame with names": (lambda: pandas.DataFrame({"sequence": FEW}, index=IDS), list(IDS)),
    "polars series": (lambda: polars.Series(FEW), [None] * 3),
    "polars frame": (lambda: polars.DataFrame({"any name": FEW}), [None] * 3),
    "arrow array": (lambda: pyarrow.chunked_array([FEW]), [None] * 3),
    "arrow table": (lambda: pyarrow.table({"sequence": FEW}), [None] * 3),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "set": (set(FEW), "a set, which has no order"),
    "text": ("MKT", "put it into a list"),
    "sequences as keys": ({"MKT": 1}, "MKT'?: expected a string, got int"),
    "frame": (pandas.DataFrame({"id": IDS, "sequence": FEW}), r"frame of 2 \('id', 'sequence'\): choose one"),
    "arrow table": (pyarrow.table({"id": IDS, "sequence": FEW}), "frame of 2"),
    "array of two columns": (np.array([FEW, FEW]), "one column"),
    "array of no dimension": (np.array("MKT"), "0 dimensions"),
    "nested lists": ([["MKT", "AYI"]], "expected .*got list"),
    "missing value": (pandas.Series([None]), "expected .*got (NoneType|float)"),
    "number": (7, "expected a list of sequences, got int"),
}


@pytest.mark.parametrize(("make", "ids"), TAKEN.values(), ids=TAKEN)
def test_taken_for_what_it_is(make: Callable[[], Any], ids: list[str | None]) -> None:
    assert list(labelled(make())) == list(zip(ids, FEW, strict=True))


@pytest.mark.parametrize("name", ["mapping", "generator", "frame with names", "polars frame", "arrow table"])
def test_every_door_takes_it(model: ESM2, name: str) -> None:
    make, ids = TAKEN[name]
    for one, other in zip(model.encode(make()), model.encode(FEW), strict=True):
        np.testing.assert_equal(one.embeddings, other.embeddings)
    np.testing.assert_array_equal(model.log_prob(make()), model.log_prob(FEW))
    found = list(model.embed_iter(make()))
    assert [(record.id, record.sequence) for record, _ in found] == [
        (label or f"sequence_{i + 1}", sequence) for i, (label, sequence) in enumerate(zip(ids, FEW, strict=True))
    ]
    with pytest.raises(InvalidSequence, match=r"item 0.*no <mask>"):  # a sequence, not a key or a column's name
        model.predict(make())


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_every_door_refuses_it(model: ESM2, given: Any, said: str) -> None:
    for call in (model.encode, model.predict, model.log_prob, lambda x: list(model.embed_iter(x))):
        with pytest.raises(InvalidSequence, match=said):
            call(given)


def test_what_is_iterated_over(model: ESM2) -> None:
    """Used up, or with an error of their own; and a record, which is not a list of them. Endless: test_bulk.py."""
    sequences = (s for s in FEW)
    assert len(model.encode(sequences)) == 3
    with pytest.raises(InvalidSequence, match="a generator gives its items only once"):
        model.encode(sequences)
    with pytest.raises(InvalidSequence, match="got one Record"):
        model.embed_iter(Record("a", "a", "MKT"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported"):
        model.encode(1 + s for s in FEW)  # type: ignore[operator]


def test_mutations(model: ESM2) -> None:
    expected = model.score_mutations("MKTW", ["M1A", "K2R:T3S"])
    for given in ({"first": "M1A", "second": "K2R:T3S"}, pandas.DataFrame({"mutant": ["M1A", "K2R:T3S"]})):
        np.testing.assert_array_equal(model.score_mutations("MKTW", given), expected)
    for wrong, said in (
        ({"M1A": 0.5}, "'M1A': expected a string, got float"),
        ({"M1A", "K2R"}, "a set, which has no order"),
        ("M1A", "put it into a list"),
        (pandas.DataFrame({"mutant": ["M1A"], "DMS_score": [1.0]}), "one column of mutations"),
    ):
        with pytest.raises(InvalidMutation, match=said):
            model.score_mutations("MKTW", wrong)


def test_scikit_learn(small_file: str) -> None:
    """A generator is read once for both steps; rows of one text each, which scikit-learn calls a column, are taken."""
    embedder = ESM2Embedder(small_file, backend="numpy")
    expected = embedder.transform(FEW)
    for make in (*(make for make, _ in TAKEN.values()), lambda: [[s] for s in FEW]):
        np.testing.assert_array_equal(embedder.fit_transform(make()), expected)
    for given, said in (REFUSED["set"], ([], "empty"), (["MKT", "MKtA"], "item 1: 't' at position 3")):
        for method in (embedder.fit, embedder.transform):
            with pytest.raises(InvalidSequence, match=said):
                method(given)
