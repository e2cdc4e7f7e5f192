"""Results as JSON and npz: digits, pieces, ids, and numbers that JSON cannot express."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import numpy as np
import pytest

from numpyesm import formats
from numpyesm.results import EncodeResult, PredictResult

ODD = np.array([0, -0.0, 1e-5, 1 / 3, 1e-45, 1.1754944e-38, -3.4028235e38, 123456789, 1e16], np.float32)
RESULTS = [
    EncodeResult(
        i, {3: values}, contacts=np.outer(values, values[:size] / 1e30), attentions=np.ones((2, 3), np.float32)
    )
    for i, (values, size) in enumerate([(ODD, 4), (ODD[::-1], 0)])
]
# A header of a whole megabyte, one that is no UTF-8, one with everything that JSON escapes.
IDS = ["x" * 2**20, 'é\udc80 "\\\n\x00;']


@pytest.fixture(params=["orjson", "numpy alone"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both ways of writing numbers."""
    if request.param == "orjson":
        pytest.importorskip("orjson")
    else:
        monkeypatch.setattr(formats, "orjson", None)
    return request.param


def whole(pieces: Any) -> bytes:
    """All pieces, none of which may be large."""
    listed = list(pieces)
    assert max(map(len, listed)) < 2**20 + 2**19
    return b"".join(listed)


@pytest.mark.parametrize("ids", [None, IDS])
def test_json_is_to_dict_in_the_fewest_digits(writer: str, ids: list[str] | None) -> None:
    text = whole(formats.json_results(RESULTS, ids))
    got = json.loads(text)["results"]
    for i, (document, result) in enumerate(zip(got, RESULTS, strict=True)):
        if ids is not None:
            assert next(iter(document)) == "id"
            assert document.pop("id") == ids[i]
        expected = result.to_dict()
        assert document.keys() == expected.keys()
        assert document["contacts"] == _digits(result.contacts)
        assert document["embeddings"] == [{"layer": 3, "embedding": _digits(result.embeddings[3])}]
    assert b"0.33333334" in text
    assert b"0.333333343" not in text


def _digits(array: Any) -> Any:
    """What the shortest digits of float32 numbers are as Python numbers."""
    return [_digits(inner) if array.ndim > 1 else float(str(inner)) for inner in array]


def test_what_json_cannot_express_is_null(writer: str) -> None:
    values = np.array([np.nan, 1.5, np.inf, -np.inf], np.float32)
    document = {"one": values, "two": np.stack([values, values]), "three": [float("nan"), {"x": float("inf")}], "n": 3}
    assert json.loads(whole(formats.json_pieces(document)), parse_constant=pytest.fail) == {
        "one": [None, 1.5, None, None],
        "two": [[None, 1.5, None, None]] * 2,
        "three": [None, {"x": None}],
        "n": 3,
    }
    assert whole(formats.json_results([float("nan"), -1.5])) == b'{"results":[{"log_prob":null},{"log_prob":-1.5}]}'


def test_npz(writer: str) -> None:
    with np.load(io.BytesIO(whole(formats.npz_results(RESULTS, IDS)))) as arrays:
        assert arrays["ids"].tolist() == IDS
        np.testing.assert_array_equal(arrays["mean_3"], [ODD, ODD[::-1]])
        for i, result in enumerate(RESULTS):
            np.testing.assert_array_equal(arrays[f"contacts_{i}"], result.contacts, strict=True)
    predicted = PredictResult(0, np.ones((3, 20), np.float32), ["M", "<mask>", "K"], [1])
    with np.load(io.BytesIO(whole(formats.npz_results([predicted])))) as arrays:
        assert set(arrays) == {"logits_0", "mask_positions_0", "vocab_tokens"}
        assert arrays["mask_positions_0"].tolist() == [1]
    with np.load(io.BytesIO(whole(formats.npz_results([-1.5, float("nan")], ["a", ""])))) as arrays:
        np.testing.assert_array_equal(arrays["log_prob"], [-1.5, np.nan])
        assert arrays["ids"].tolist() == ["a", ""]


@pytest.mark.slow
def test_long_headers_take_little_room() -> None:
    ids = ["short"] * 60 + ["x" * 2**20]
    size = sum(map(len, formats.npz_pieces({}, ids)))
    assert size < 3 * 2**20  # uncompressed: 256 MB


@pytest.mark.slow
def test_large_arrays_leave_in_small_pieces(writer: str) -> None:
    """A client that reads slowly holds a piece or two, however large the array; and the pieces are the whole."""
    contacts = np.random.default_rng(1).random((700, 700), dtype=np.float32)
    results = [EncodeResult(0, contacts=contacts)]
    text = whole(formats.json_results(results))
    np.testing.assert_array_equal(np.float32(json.loads(text)["results"][0]["contacts"]), contacts)
    np.testing.assert_array_equal(np.load(io.BytesIO(whole(formats.npz_results(results))))["contacts_0"], contacts)
    packed = whole(formats.gzip_pieces(formats.json_results(results)))
    assert gzip.decompress(packed) == text
    assert len(packed) < 0.6 * len(text)
