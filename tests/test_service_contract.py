"""The service's API: paths, requests, answers and errors, against the library on the same weights."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from conftest import random_sequence
from running_service import RunningService, load_quietly, serving, small_weights

from numpyesm import ESM2
from numpyesm.results import EncodeResult
from numpyesm.service.answers import FORMS

NAMES = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]
FIELDS = {
    "mean": {"embeddings"},
    "per_token": {"per_token_embeddings"},
    "per_residue": {"per_token_embeddings"},
    "bos": {"bos_embeddings"},
    "contacts": {"contacts"},
    "logits": {"logits", "vocab_tokens"},
    "attentions": {"attentions"},
}
SEQUENCES = ["MKTFFVLVLLLSGALAAPVA", "GSSGSSGSSG", "M", random_sequence(150), "MKBXZUO-A"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def service(weights: str) -> Iterator[RunningService]:
    models = ["--model", f"esm2-35m={weights}", "--model", "esm2-8m=synthetic:esm2-8m"]
    with serving(*models, "--backend", "numpy", "--threads", "2") as running:
        yield running


@pytest.fixture(scope="module")
def library(weights: str) -> ESM2:
    return load_quietly(weights, backend="numpy", threads=2)


def items(*sequences: str) -> list[dict[str, str]]:
    return [{"sequence": sequence} for sequence in sequences]


def sequences(first: int, end: int) -> list[str]:
    return [f"items__{i}__sequence" for i in range(first, end)]


def params(name: str, *indices: int) -> list[str]:
    return [f"params__{name}__{i}" for i in indices]


def same(got: Any, expected: Any) -> None:
    """Equal in every key and string, and in numbers up to float32's last digit."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key in expected:
            same(got[key], expected[key])
    elif isinstance(expected, list) and expected and isinstance(expected[0], float | list):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-9)
    else:
        assert got == expected


# -- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("action", ["encode", "predict", "log_prob"])
def test_every_path_answers_without_redirect(service: RunningService, version: str, slash: str, action: str) -> None:
    response = requests.post(
        f"{service.url}/api/{version}/esm2-35m/{action}{slash}",
        json={"items": items("MK<mask>F" if action == "predict" else "MKF")},
        allow_redirects=False,
        timeout=60,
    )
    assert response.status_code == 200
    assert list(response.json()) == ["results"]


def test_each_slug_has_its_own_model(service: RunningService) -> None:
    for slug, width, last in (("esm2-35m", 80, 3), ("esm2-8m", 320, 6)):
        (embedding,) = service.post(f"{slug}/encode", {"items": items("MKT")}).json()["results"][0]["embeddings"]
        assert (len(embedding["embedding"]), embedding["layer"]) == (width, last)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/api/v3/esm2-3b/encode/", 404),
        ("POST", "/api/v3/esm2-35m/fold/", 404),
        ("POST", "/api/v2/esm2-35m/encode/", 404),
        ("POST", "/api/v3/esm2-35m/encode//", 404),
        ("GET", "/nowhere", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
        ("GET", "/api/v3/schema/esm2-35m/fold/", 404),
        ("GET", "/api/v3/esm2-35m/encode/", 405),
        ("DELETE", "/api/v3/esm2-35m/encode", 405),
        ("OPTIONS", "/api/v3/esm2-35m/encode", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_wrong_paths_and_methods(service: RunningService, method: str, path: str, status: int) -> None:
    with requests.Session() as session:
        prepared = requests.Request(method, service.url, json={"items": items("MKT")}).prepare()
        prepared.url = service.url + path
        response = session.send(prepared, timeout=60)
    check_error(response, status)
    assert "access-control-allow-origin" not in response.headers
    if status == 405:
        assert response.headers["allow"]


# -- encode ----------------------------------------------------------------------------------------------------------


def test_defaults(service: RunningService, library: ESM2) -> None:
    answer = service.post("esm2-35m/encode/", {"items": items(*SEQUENCES)}).json()
    same(answer, {"results": [result.to_dict() for result in library.encode(SEQUENCES)]})
    assert [result["sequence_index"] for result in answer["results"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("params", [{}, {"repr_layers": [0]}, {"include": ["mean"]}])
def test_each_parameter_is_optional(service: RunningService, library: ESM2, params: dict[str, Any]) -> None:
    answer = service.post("esm2-35m/encode/", {"params": params, "items": items("MKT")}).json()
    same(answer, {"results": [result.to_dict() for result in library.encode(["MKT"], **params)]})


@pytest.mark.parametrize("include", [[name] for name in FIELDS] + [NAMES, ["bos", "mean"], ["logits", "logits"]])
def test_what_was_not_asked_for_is_absent(service: RunningService, library: ESM2, include: list[str]) -> None:
    body = {"params": {"include": include}, "items": items(*SEQUENCES)}
    answer = service.post("esm2-35m/encode/", body).json()
    expected = {"sequence_index"}.union(*(FIELDS[name] for name in include))
    assert all(set(result) == expected for result in answer["results"])
    same(answer, {"results": [result.to_dict() for result in library.encode(SEQUENCES, include=include)]})


@pytest.mark.parametrize(
    ("layers", "resolved"), [([-1], [3]), ([2, 0, 1], [0, 1, 2]), ([-4, 3, -1, 3], [0, 3]), ([-2, 1], [1, 2])]
)
def test_layers_are_resolved_and_ascend(service: RunningService, layers: list[int], resolved: list[int]) -> None:
    body = {"params": {"repr_layers": layers, "include": ["mean", "bos", "per_token"]}, "items": items("MKT")}
    (result,) = service.post("esm2-35m/encode/", body).json()["results"]
    for name in ("embeddings", "bos_embeddings", "per_token_embeddings"):
        assert [entry["layer"] for entry in result[name]] == resolved


def test_shapes(service: RunningService) -> None:
    body = {"params": {"include": NAMES, "repr_layers": [0, -1]}, "items": items("MKTFF")}
    (result,) = service.post("esm2-35m/encode/", body).json()["results"]
    assert np.shape(result["contacts"]) == (5, 5)
    assert np.shape(result["logits"]) == (5, 20)
    assert np.shape(result["attentions"]) == (3, 5)
    assert "".join(result["vocab_tokens"]) == "LAGVSERTIDPKQNFYMHWC"
    assert np.shape(result["per_token_embeddings"][0]["embeddings"]) == (5, 80)
    assert np.shape(result["embeddings"][0]["embedding"]) == (80,)


def test_numbers_are_written_in_float32s_own_digits(service: RunningService, library: ESM2) -> None:
    body = {"params": {"include": ["per_token"]}, "items": items(SEQUENCES[3])}
    (result,) = service.post("esm2-35m/encode/", body).json()["results"]
    expected = library.encode([SEQUENCES[3]], include=["per_token"])[0].per_token_embeddings
    assert expected is not None
    got = np.array(result["per_token_embeddings"][0]["embeddings"], dtype=np.float32)
    np.testing.assert_array_equal(got, expected[3])


# -- predict, log_prob -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, {}, {"positions": "all"}, {"positions": "masked"}])
def test_predict(service: RunningService, library: ESM2, params: dict[str, str] | None) -> None:
    sequences = ["MKTFFV<mask>LVLLLSG<mask>", "<mask>", "BXZUO<mask><mask>"]
    body: dict[str, Any] = {"items": items(*sequences)} | ({} if params is None else {"params": params})
    answer = service.post("esm2-35m/predict/", body).json()
    same(answer, {"results": [result.to_dict() for result in library.predict(sequences, **(params or {}))]})
    rows = [2, 1, 2] if params == {"positions": "masked"} else [15, 1, 7]
    assert [len(result["logits"]) for result in answer["results"]] == rows
    assert answer["results"][1]["sequence_tokens"] == ["<mask>"]
    assert set(answer["results"][0]) == {"logits", "sequence_tokens", "vocab_tokens"}


def test_log_prob(service: RunningService, library: ESM2) -> None:
    answer = service.post("esm2-35m/log_prob/", {"params": {}, "items": items(*SEQUENCES)}).json()
    same(answer, {"results": [{"log_prob": score} for score in library.log_prob(SEQUENCES).tolist()]})


def test_longest_items(service: RunningService, library: ESM2) -> None:
    longest = random_sequence(2048)
    answer = service.post("esm2-35m/encode/", {"items": items(longest)}).json()
    same(answer, {"results": [library.encode([longest])[0].to_dict()]})
    masks = "<mask>" * 2048
    (result,) = service.post("esm2-35m/predict/", {"items": items(masks)}).json()["results"]
    assert np.shape(result["logits"]) == (2048, 20)


# -- forms -----------------------------------------------------------------------------------------------------------


def test_gzipped_body_and_answer(service: RunningService, library: ESM2) -> None:
    body = {"params": {"include": ["per_token", "contacts"]}, "items": items(SEQUENCES[3])}
    expected = {"results": [library.encode([SEQUENCES[3]], include=["per_token", "contacts"])[0].to_dict()]}
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for data in (
        gzip.compress(json.dumps(body).encode()),
        gzip.compress(json.dumps(body).encode()[:10]) + gzip.compress(json.dumps(body).encode()[10:]),
    ):
        for coding in ("gzip", "identity", "deflate, gzip;q=0.5", "br", "gzip;q=0", "*"):
            response = service.post("esm2-35m/encode", data=data, headers=headers | {"Accept-Encoding": coding})
            wanted = coding in ("gzip", "deflate, gzip;q=0.5", "*")
            assert response.headers.get("content-encoding") == ("gzip" if wanted else None)
            same(response.json(), expected)
    small = service.post("esm2-35m/encode", {"items": items("MKT")}, headers={"Accept-Encoding": "gzip"})
    assert small.headers["content-encoding"] == "gzip"
    assert int(small.headers["content-length"]) < len(small.content)


def test_npz(service: RunningService, library: ESM2) -> None:
    headers = {"Accept": "application/x-npz"}
    body = {"params": {"include": NAMES, "repr_layers": [1, -1]}, "items": items(*SEQUENCES)}
    response = service.post("esm2-35m/encode", body, headers=headers)
    assert response.headers["content-type"] == "application/x-npz"
    with np.load(io.BytesIO(response.content)) as arrays:
        results = library.encode(SEQUENCES, [1, -1], NAMES)
        assert arrays["mean_3"].shape == (5, 80)
        for i, result in enumerate(results):
            np.testing.assert_allclose(arrays["mean_1"][i], result.embeddings[1], atol=1e-6)  # type: ignore[index]
            np.testing.assert_allclose(arrays[f"contacts_{i}"], result.contacts, atol=1e-6)
            np.testing.assert_allclose(
                arrays[f"per_token_3_{i}"],
                result.per_token_embeddings[3],  # type: ignore[index]
                atol=1e-6,
            )
            assert arrays[f"attentions_{i}"].shape == (3, len(SEQUENCES[i]))
        assert "".join(arrays["vocab_tokens"]) == "LAGVSERTIDPKQNFYMHWC"
    response = service.post("esm2-35m/predict", {"items": items("MK<mask>")}, headers=headers)
    with np.load(io.BytesIO(response.content)) as arrays:
        assert arrays["logits_0"].shape == (3, 20)
        assert arrays["mask_positions_0"].tolist() == [2]
    response = service.post("esm2-35m/log_prob", {"items": items("MKT", "M")}, headers=headers)
    with np.load(io.BytesIO(response.content)) as arrays:
        np.testing.assert_allclose(arrays["log_prob"], library.log_prob(["MKT", "M"]))


@pytest.mark.parametrize("form", sorted(FORMS))
def test_large_answers_leave_in_small_pieces(form: str) -> None:
    """A client that reads slowly holds a piece or two, however large the array; and the pieces are the whole."""
    contacts = np.random.default_rng(1).random((1500, 1500), dtype=np.float32)
    pieces = list(FORMS[form]([EncodeResult(0, contacts=contacts)]))
    assert max(map(len, pieces)) < 2**20
    if form == "application/json":
        got = np.array(json.loads(b"".join(pieces))["results"][0]["contacts"], dtype=np.float32)
    else:
        got = np.load(io.BytesIO(b"".join(pieces)))["contacts_0"]
    np.testing.assert_array_equal(got, contacts)


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "application/json, application/x-npz;q=0.5", "text/html"]
)
def test_json_is_the_default(service: RunningService, accept: str) -> None:
    response = service.post("esm2-35m/encode", {"items": items("MKT")}, headers={"Accept": accept})
    assert response.headers["content-type"] == "application/json"


# -- errors ----------------------------------------------------------------------------------------------------------


def check_error(response: requests.Response, status: int, *fields: str) -> dict[str, Any]:
    """The one shape; `fields` are all that `error` names."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    document: dict[str, Any] = response.json()
    assert set(document) == {"detail", "errors", "status_code", "code", "error"}
    assert document["status_code"] == status
    assert isinstance(document["detail"], str)
    assert document["detail"]
    assert isinstance(document["errors"], list)
    assert document["errors"]
    assert document["code"].startswith("user." if status < 500 else "server.")
    assert all(isinstance(text, str) for messages in document["error"].values() for text in messages)
    if fields:
        assert set(document["error"]) == set(fields)
    assert "Traceback" not in response.text
    assert "pydantic" not in response.text
    assert response.headers["x-request-id"]
    return document


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["items"]),
        ({"items": []}, ["items"]),
        ({"items": items(*["MKT"] * 9)}, ["items"]),
        ({"items": {"sequence": "MKT"}}, ["items"]),
        ({"items": "MKT"}, ["items"]),
        ({"items": None}, ["items"]),
        ({"items": ["MKT"]}, ["items__0"]),
        ({"items": [{}]}, ["items__0__sequence"]),
        ({"items": [{"sequence": None}]}, ["items__0__sequence"]),
        ({"items": [{"sequence": 5}]}, ["items__0__sequence"]),
        ({"items": [{"sequence": ["M"]}]}, ["items__0__sequence"]),
        ({"items": items("")}, ["items__0__sequence"]),
        ({"items": items("A" * 2049)}, ["items__0__sequence"]),
        ({"items": items("MKT", "mkt", "MK T", "M<mask>", "M*", "M.", "M\n", "É")}, sequences(1, 8)),
        ({"items": [{"sequence": "MKT", "name": "x"}]}, ["items__0__name"]),
        ({"items": items("MKT"), "extra": 1}, ["extra"]),
        ({"items": items("MKT"), "params": {"positions": "all"}}, ["params__positions"]),
        ({"items": items("MKT"), "params": []}, ["params"]),
        ({"items": items("MKT"), "params": {"include": []}}, ["params__include"]),
        ({"items": items("MKT"), "params": {"include": "mean"}}, ["params__include"]),
        ({"items": items("MKT"), "params": {"include": ["mean", "sum", 1]}}, params("include", 1, 2)),
        ({"items": items("MKT"), "params": {"repr_layers": []}}, ["params__repr_layers"]),
        ({"items": items("MKT"), "params": {"repr_layers": -1}}, ["params__repr_layers"]),
        ({"items": items("MKT"), "params": {"repr_layers": [4, -5, 3, -4]}}, params("repr_layers", 0, 1)),
        (
            {"items": items("MKT"), "params": {"repr_layers": [True, 1.0, "1", None, 10**60]}},
            params("repr_layers", *range(5)),
        ),
        (
            {"items": [*items("M1"), {"sequence": 2}], "params": {"include": ["x"]}},
            [*sequences(0, 2), "params__include__0"],
        ),
        ([], ["__all__"]),
        ("x", ["__all__"]),
        (7, ["__all__"]),
    ],
)
def test_every_fault_is_named(service: RunningService, body: Any, fields: list[str]) -> None:
    check_error(service.post("esm2-35m/encode/", body), 422, *fields)


@pytest.mark.parametrize(
    ("action", "body", "fields"),
    [
        ("predict", {"items": items("MKT", "MK<mask>", "-<mask>")}, ["items__0__sequence", "items__2__sequence"]),
        ("predict", {"items": items("<mask>" * 2049)}, ["items__0__sequence"]),
        ("predict", {"items": items("<mask>"), "params": {"positions": "ALL"}}, ["params__positions"]),
        ("predict", {"items": items("<mask>"), "params": {"include": ["mean"]}}, ["params__include"]),
        ("log_prob", {"items": items("MKT"), "params": {"positions": "all"}}, ["params__positions"]),
        ("log_prob", {"items": items("MK<mask>")}, ["items__0__sequence"]),
    ],
)
def test_faults_of_the_other_actions(service: RunningService, action: str, body: Any, fields: list[str]) -> None:
    check_error(service.post(f"esm2-35m/{action}/", body), 422, *fields)


def test_messages_say_which_position(service: RunningService) -> None:
    document = check_error(service.post("esm2-35m/encode", {"items": items("MKTJ")}), 422)
    (message,) = document["error"]["items__0__sequence"]
    assert "'J' at position 4" in message
    assert document["code"] == "user.validation"
    assert document["detail"].startswith("items__0__sequence: ")


def test_hostile_text_comes_back_tame(service: RunningService) -> None:
    key = "\ud800" + "k" * 5000
    response = service.post("esm2-35m/encode", data=json.dumps({key: 1, "items": [{"sequence": "\udfff"}]}),
                            headers={"Content-Type": "application/json"})  # fmt: skip
    check_error(response, 422)
    assert len(response.content) < 5000
    response = service.post("esm2-35m/encode", {"items": items("M"), **{f"x{i}": 1 for i in range(20_000)}})
    check_error(response, 422)
    assert len(response.content) < 50_000


# -- the rest --------------------------------------------------------------------------------------------------------


def test_models(service: RunningService) -> None:
    models = requests.get(f"{service.url}/api/v3/models/", timeout=60).json()["models"]
    assert [entry["slug"] for entry in models] == ["esm2-35m", "esm2-8m"]
    assert models[1] | {"version": ""} == {
        "slug": "esm2-8m",
        "name": "esm2-8m",
        "layers": 6,
        "width": 320,
        "heads": 20,
        "max_length": 2048,
        "max_items": 8,
        "actions": ["encode", "predict", "log_prob"],
        "contacts": True,
        "synthetic": True,
        "source": "synthetic:esm2-8m:0",
        "precision": "fp32",
        "backend": "numpy",
        "version": "",
    }


@pytest.mark.parametrize("action", ["encode", "predict", "log_prob"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_schema_tells_the_batch_size(service: RunningService, action: str, slash: str) -> None:
    schema = requests.get(f"{service.url}/api/v3/schema/esm2-35m/{action}{slash}", timeout=60).json()
    assert schema["properties"]["items"]["maxItems"] == 8
    assert schema["additionalProperties"] is False


def test_pages(service: RunningService) -> None:
    page = requests.get(f"{service.url}/", timeout=60)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    again = requests.get(f"{service.url}/", headers={"If-None-Match": page.headers["etag"]}, timeout=60)
    assert again.status_code == 304
    docs = requests.get(f"{service.url}/docs", timeout=60).text
    assert "/api/v3/{slug}/encode/" in docs
    assert "https://" not in docs.replace("https://json-schema.org", "")
    assert "<script" not in docs
    assert f"curl {service.url}/api/v3/esm2-35m/encode/ " in docs  # not a port where nobody listens
    hostile = requests.get(f"{service.url}/docs", headers={"Host": "localhost:<script>"}, timeout=60).text
    assert "curl http://localhost:&lt;script&gt;/api/v3/" in hostile
    head = requests.head(f"{service.url}/healthz", timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    assert requests.get(f"{service.url}/openapi.json", timeout=60).json()["openapi"].startswith("3.1")


def test_request_id_and_log_line(service: RunningService) -> None:
    response = service.post("esm2-35m/encode", {"items": items("MKT")}, headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    bad = service.post("esm2-35m/encode", {"items": items("MKT")}, headers={"X-Request-ID": "no blanks\tplease"})
    assert bad.headers["x-request-id"] != "no blanks\tplease"
    requests.get(f"{service.url}/healthz?token=secret", timeout=60)
    service.wait_until(lambda: any(entry["path"] == "/healthz" and "ms" in entry for entry in service.entries()[-3:]))
    entry = next(entry for entry in service.entries() if entry["id"] == "mine-1")
    assert entry["status"] == 200
    assert (entry["slug"], entry["action"], entry["items"], entry["residues"]) == ("esm2-35m", "encode", 1, 3)
    assert "secret" not in "".join(service.log)


def test_metrics(service: RunningService) -> None:
    service.post("esm2-35m/encode", {"items": items("MKT")})
    service.post("made-up-slug/encode", {"items": items("MKT")})
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    assert 'numpyesm_requests_total{route="encode",slug="esm2-35m",status="200"}' in text
    assert "numpyesm_queue_length 0.0" in text
    assert "made-up-slug" not in text
