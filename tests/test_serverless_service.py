"""The Lambda handler and the HTTP service give the same answers, good and bad, though one has no pydantic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from numpyesm import ESM2, SyntheticWeightsWarning
from numpyesm.serverless.function import Function

pytest.importorskip("fastapi")
testclient = pytest.importorskip("starlette.testclient")

ONE = [{"sequence": "MKT"}]
MASKED = [{"sequence": "MK<mask>T"}]

# (action, body) that both must take or refuse in the same words.
REQUESTS = [
    ("encode", {"items": ONE}),
    ("encode", {"items": ONE * 8, "params": {}}),
    ("encode", {"items": ONE, "params": {"repr_layers": [0, -1, 6, 2], "include": ["mean", "bos", "per_residue"]}}),
    (
        "encode",
        {"items": [{"sequence": "MKTFFVLV-BXZUO"}], "params": {"include": ["contacts", "logits", "attentions"]}},
    ),
    ("encode", {"items": ONE, "params": {"repr_layers": [], "include": ["logits"]}}),
    ("predict", {"items": MASKED}),
    ("predict", {"items": MASKED, "params": {"positions": "masked"}}),
    ("log_prob", {"items": ONE, "params": {}}),
    # -- bad
    ("encode", {}),
    ("encode", []),
    ("encode", "x"),
    ("encode", None),
    ("encode", 7),
    ("encode", {"items": None}),
    ("encode", {"items": {}}),
    ("encode", {"items": []}),
    ("encode", {"items": ONE * 9}),
    ("encode", {"items": [None, 1, "MKT", [], {}, {"sequence": None}, {"sequence": 5}, {"sequence": ["M"]}]}),
    ("encode", {"items": [{"sequence": "MKT", "id": "x"}], "extra": 1, "more": 2}),
    ("encode", {"items": [{"sequence": s} for s in ("", "mkt", "MK T", "M<mask>", "M*", "M.", "É", "M\n")]}),
    ("encode", {"items": [{"sequence": "A" * 2049}, {"sequence": "A" * 100_000}]}),
    ("encode", {"items": [{"sequence": "\ud800"}]}),
    ("encode", {"items": ONE, "params": None}),
    ("encode", {"items": ONE, "params": []}),
    ("encode", {"items": ONE, "params": {"repr_layers": -1}}),
    ("encode", {"items": ONE, "params": {"repr_layers": None}}),
    ("encode", {"items": ONE, "params": {"repr_layers": [True, 1.0, 1.5, "1", None, [], 10**60, -8, 7]}}),
    ("encode", {"items": ONE, "params": {"repr_layers": [0] * 257}}),
    ("encode", {"items": ONE, "params": {"repr_layers": []}}),
    ("encode", {"items": ONE, "params": {"include": []}}),
    ("encode", {"items": ONE, "params": {"include": "mean"}}),
    ("encode", {"items": ONE, "params": {"include": ["mean", "sum", 1, None]}}),
    ("encode", {"items": ONE, "params": {"positions": "all"}}),
    ("predict", {"items": ONE}),
    ("predict", {"items": [{"sequence": "M-<mask>"}, {"sequence": "<mask"}, {"sequence": "<MASK>"}]}),
    ("predict", {"items": MASKED, "params": {"positions": "some"}}),
    ("predict", {"items": MASKED, "params": {"positions": None, "include": []}}),
    ("log_prob", {"items": ONE, "params": {"x": 1}}),
    ("log_prob", {"items": MASKED}),
    ("generate", {"items": ONE}),
]
RAW = [
    "",
    " ",
    "{",
    "[" * 5000,
    '{"items": NaN}',
    '{"items": 1e999}',
    '{"a":1,"a":2}',
    '{"items": [' + "9" * 5000 + "]}",
]


@pytest.fixture(scope="module")
def both():
    from numpyesm.service.app import Service
    from numpyesm.service.catalog import Catalog

    with pytest.warns(SyntheticWeightsWarning):
        model = ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy", threads=2)
    function = Function()
    function._loaded = "esm2-8m", model
    service = Service(Catalog({"esm2-8m": model}))
    with testclient.TestClient(service.gate, base_url="http://localhost") as client:

        def ask(action: str, body: str, **headers: str):
            path = f"/api/v3/esm2-8m/{action}/"
            headers = {"content-type": "application/json"} | headers
            event = {
                "version": "2.0",
                "rawPath": path,
                "headers": headers,
                "requestContext": {"http": {"method": "POST", "path": path}},
                "body": body,
            }
            served = client.post(path, content=body.encode("utf-8", "surrogatepass"), headers=headers)
            ours = function.handle(event)
            return (ours["statusCode"], json.loads(ours["body"])), (served.status_code, served.json())

        yield ask


def as_float32(value):
    if isinstance(value, dict):
        return {key: as_float32(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_float32(inner) for inner in value]
    return float(np.float32(value)) if isinstance(value, float | int) else value


@pytest.mark.parametrize(("action", "document"), REQUESTS, ids=[f"{i}-{a}" for i, (a, _) in enumerate(REQUESTS)])
def test_same_answers(both, action, document) -> None:
    (status, ours), (expected_status, expected) = both(action, json.dumps(document))
    assert (status, as_float32(ours)) == (expected_status, as_float32(expected))


@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
def test_same_refusals_of_what_is_no_json(both, body) -> None:
    ours, expected = both("encode", body)
    assert ours == expected
    assert ours[0] == 422


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "br"}])
def test_same_refusals_of_headers(both, headers) -> None:
    ours, expected = both("encode", json.dumps({"items": ONE}), **headers)
    assert ours == expected
    assert ours[0] == 415
