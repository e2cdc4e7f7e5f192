"""The scikit-learn transformer: the library's own checks, pipelines, pickling."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import SMALL, assert_close, random_sequence

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.utils import check_array
from sklearn.utils.estimator_checks import parametrize_with_checks

import numpyesm
from numpyesm import ESM2, InvalidOption
from numpyesm.errors import InputWarning
from numpyesm.scoring import SCAN_LETTERS
from numpyesm.sklearn import ESM2Embedder
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")

SEQUENCES = [random_sequence(n % 23 + 4, n) for n in range(24)]


def embedder(**options: Any) -> ESM2Embedder:
    return ESM2Embedder("synthetic:esm2-8m", **{"backend": "numpy", "threads": 1} | options)


def letters(X: Any) -> list[str]:
    return ["".join(SCAN_LETTERS[int(abs(value) * 7) % 20] for value in row) for row in check_array(X, input_name="X")]


class FromNumbers(ESM2Embedder):
    """The same estimator behind a translation of number matrices into sequences, so that all checks have an input."""

    def fit(self, X: Any, y: object = None) -> FromNumbers:
        return super().fit(letters(X))

    def transform(self, X: Any) -> Any:
        return super().transform(letters(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = False, True
        return tags


# They ask for 1e-7. On AVX2, OpenBLAS sums a row in an order that depends on its place in the batch.
ROUNDED = {f"check_methods_{name}_invariance": "batch mates may change rounding" for name in ("sample_order", "subset")}


@pytest.mark.slow
@parametrize_with_checks(
    [embedder(), FromNumbers("synthetic:esm2-8m", backend="numpy", threads=1)],
    expected_failed_checks=lambda _: ROUNDED,
)
def test_check_estimator(estimator: Any, check: Any) -> None:
    """As it is, and behind numbers: scikit-learn runs few checks on what takes text only."""
    check(estimator)


def test_rows_are_the_models_embeddings() -> None:
    eight_m = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
    for layer, pooling in ((-1, "mean"), (3, "mean"), (0, "bos"), (-2, "bos")):
        found = embedder(layer=layer, pooling=pooling, batch_size=5).fit_transform(SEQUENCES)
        results = eight_m.encode(SEQUENCES, [layer], [pooling])
        expected = [next(iter((r.embeddings or r.bos_embeddings).values())) for r in results]  # type: ignore[union-attr]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    "options",
    [{"pooling": "max"}, {"layer": 7}, {"layer": "last"}, {"layer": None}, {"batch_size": 0}, {"backend": "gpu"}],
)
def test_what_is_no_option(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        embedder(**options).fit(["MKT"]).transform(["MKT"])


def test_copies_carry_no_weights_and_share_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those in other processes are pickled; nothing is loaded before it is needed."""
    embedder(threads=2).transform(["MKT"])  # one model is held at a time
    monkeypatch.setattr(ESM2, "from_pretrained", loads := Mock(wraps=ESM2.from_pretrained))
    estimator = embedder(layer=2, pooling="bos").fit(SEQUENCES)
    data = pickle.dumps(estimator)
    assert (loads.call_count, len(data) < 2000) == (0, True)
    expected = estimator.transform(SEQUENCES[:2])
    for copy in (clone(estimator), pickle.loads(data)):  # noqa: S301
        assert copy.get_params() == estimator.get_params()
        np.testing.assert_array_equal(copy.transform(SEQUENCES[:2]), expected)
        copy.set_params(layer=1).transform(["MKT"])
    assert loads.call_count == 1


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path) -> None:
    for seed in (1, 2):
        (model := ESM2(random_checkpoint(SMALL, seed))).save(tmp_path / "a.safetensors")
        found = ESM2Embedder(tmp_path / "a.safetensors", backend="numpy").transform(["MKT"])
        assert_close(found[0], model.encode(["MKT"])[0].embeddings[3])


def test_warnings_come_once_a_call_and_at_every_call() -> None:
    """That the weights are synthetic, and a note for all batches together."""
    for _ in range(2):
        with pytest.warns(numpyesm.SyntheticWeightsWarning) as told:
            embedder(batch_size=1).transform(["MK-T", "MKT", "M-KT"])
        assert [str(one.message)[:11] for one in told if one.category is InputWarning] == ["2 sequences"]


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "numpyesm.sklearn")
    with pytest.raises(numpyesm.MissingExtra, match=r"pip install 'numpyesm\[sklearn\]'"):
        importlib.import_module("numpyesm.sklearn")
