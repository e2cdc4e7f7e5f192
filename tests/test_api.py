"""The API through both doors, the HTTP service and the Lambda function: one table of requests, equal answers."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import ALL, SMALL, random_sequence
from jsonschema import Draft202012Validator
from running_service import Answer, answer_of, check_error, items, same, url_event
from starlette.testclient import TestClient

from numpyesm import ESM2
from numpyesm.api.bodies import gunzip
from numpyesm.api.catalog import Catalog
from numpyesm.api.errors import ApiError
from numpyesm.api.keys import KeyRing
from numpyesm.api.schema import request_schema
from numpyesm.errors import NotEnoughMemory
from numpyesm.passes import Passes
from numpyesm.results import stack_results
from numpyesm.serverless.function import Function
from numpyesm.service.app import Service
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning", "ignore::numpyesm.InputWarning")

ACTIONS = ("encode", "predict", "log_prob")
JSON = {"content-type": "application/json"}
GZIP = {**JSON, "content-encoding": "gzip"}
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def catalog(model: ESM2) -> Catalog:
    headless = random_checkpoint(SMALL)
    for name in [name for name in headless.tensors if name.startswith(("lm_head", "contact_head"))]:
        del headless.tensors[name]
    return Catalog({"esm2-35m": model, "headless": ESM2(headless, backend="numpy")})


@contextmanager
def both_doors(catalog: Catalog, keys: Sequence[str] = ()) -> Iterator[Ask]:
    """Ask both doors the same; their answers must be equal, and one of them is returned."""
    service, function = Service(catalog, KeyRing(keys)), Function(catalog)

    def ask(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        with client.stream(method, path, content=body, headers=headers, follow_redirects=False) as response:
            answer = Answer(response.status_code, dict(response.headers), b"".join(response.iter_raw()))
        other = answer_of(function.handle(url_event(path, body, method, **(headers or {}))))
        assert (answer.status_code, answer.content) == (other.status_code, other.content)
        for name in ("content-type", "content-encoding", "vary", "www-authenticate", "retry-after"):
            assert answer.headers.get(name) == other.headers.get(name)
        assert ("allow" in answer.headers) == ("Allow" in other.headers or "allow" in other.headers)
        return answer

    headers = {"accept-encoding": "identity"}
    with TestClient(service.gate, base_url="http://localhost", headers=headers) as client:
        yield ask


@pytest.fixture(scope="module")
def ask(catalog: Catalog) -> Iterator[Ask]:
    with both_doors(catalog) as ask:
        yield ask


def post(ask: Ask, action: str, document: Any, slug: str = "esm2-35m", **headers: str) -> Answer:
    return ask("POST", f"/api/v3/{slug}/{action}", json.dumps(document).encode(), JSON | headers)


def schema_of(catalog: Catalog, action: str) -> Draft202012Validator:
    return Draft202012Validator(request_schema(catalog.get("esm2-35m"), action))


# -- what is answered --------------------------------------------------------------------------------------------------

SEQUENCES = ["MKTFFVLVLLLSGALAAPVA", "M", random_sequence(60), "MKBXZUO-A"]
WITH_MASKS = ["MKTFFV<mask>LVLLLSG<mask>", "<mask>", "BXZUO<mask><mask>"]

# (action, sequences, params)
ANSWERED: list[Any] = [
    *(("encode", SEQUENCES, params) for params in (None, {}, {"repr_layers": [0]}, {"repr_layers": [-4, 3, -1, 1]})),
    *(("encode", SEQUENCES, {"include": [name]}) for name in [*ALL, "per_residue"]),
    ("encode", SEQUENCES, {"include": ALL, "repr_layers": [0, -1]}),
    ("encode", SEQUENCES, {"include": ["logits", "logits"], "repr_layers": []}),
    *(("predict", WITH_MASKS, params) for params in (None, {}, {"positions": "all"}, {"positions": "masked"})),
    ("log_prob", ["XXXX", *SEQUENCES, "----"], {}),
    pytest.param("encode", [random_sequence(2048)], None, marks=pytest.mark.slow),
    pytest.param("predict", ["<mask>" * 2048], None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("action", "sequences", "params"), ANSWERED)
def test_answers_are_the_librarys(
    ask: Ask, model: ESM2, action: str, sequences: list[str], params: dict[str, Any] | None
) -> None:
    document = {"items": items(*sequences)} | ({} if params is None else {"params": params})
    expected = getattr(model, action)(sequences, **(params or {}))
    if action == "log_prob":
        documents = [{"log_prob": None if np.isnan(one) else one} for one in expected]
    else:
        documents = [one.to_dict() for one in expected]
    same(post(ask, action, document).json(), {"results": documents})


def test_nothing_may_be_asked_for(ask: Ask, catalog: Catalog) -> None:
    """As in the hosted API."""
    no_layers = {"include": ["mean", "bos", "per_token", "contacts"], "repr_layers": []}
    for params, keys in (({"include": []}, set()), (no_layers, {"contacts"})):
        document = {"params": params, "items": items("MKT", "MK")}
        assert schema_of(catalog, "encode").is_valid(document)
        results = post(ask, "encode", document).json()["results"]
        assert [set(result) - {"sequence_index"} for result in results] == [keys, keys]


def test_npz(ask: Ask, model: ESM2) -> None:
    document = {"params": {"include": ALL, "repr_layers": [1, -1]}, "items": items(*SEQUENCES)}
    answer = post(ask, "encode", document, accept="application/x-npz")
    assert answer.headers["content-type"] == "application/x-npz"
    expected = stack_results(model.encode(SEQUENCES, [1, -1], ALL))
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert set(arrays) == {*expected, "vocab_tokens"}
        for name, array in expected.items():
            np.testing.assert_allclose(arrays[name], array, atol=1e-6)
    answer = post(ask, "predict", {"items": items("MK<mask>")}, accept="application/json;q=0.1, application/npz")
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert arrays["mask_positions_0"].tolist() == [2]
    httr = "application/json, text/xml, application/xml, */*"  # what R sends
    for accept in ("*/*", httr, "application/json, application/x-npz;q=0.5", "text/html"):
        assert post(ask, "log_prob", {"items": items("M")}, accept=accept).headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("coding", "gzipped"),
    [("gzip", True), ("deflate, gzip;q=0.5", True), ("*", True), ("identity", False), ("gzip;q=0", False)],
)
def test_gzip(ask: Ask, coding: str, gzipped: bool) -> None:
    """Of bodies, in one or more members, and of answers."""
    packed = gzip.compress(GOOD[:10]) + gzip.compress(GOOD[10:]) if gzipped else gzip.compress(GOOD)
    answer = ask("POST", "/api/v3/esm2-35m/encode", packed, GZIP | {"accept-encoding": coding})
    assert answer.headers.get("content-encoding") == ("gzip" if gzipped else None)
    content = gzip.decompress(answer.content) if gzipped else answer.content
    assert len(json.loads(content)["results"]) == 1


@pytest.mark.parametrize("path", ["/api/v3/{}", "/api/v1/{}/"])
def test_what_there_is_to_read(ask: Ask, path: str) -> None:
    first, second = ask("GET", path.format("models")).json()["models"]
    assert (first["slug"], first["actions"]) == ("esm2-35m", list(ACTIONS))
    assert (second["slug"], second["actions"]) == ("headless", ["encode"])
    assert first["source"].startswith("synthetic")
    assert [first[name] for name in ("layers", "width", "max_items", "max_length")] == [3, 80, 8, 2048]
    for action in ACTIONS:
        schema = ask("GET", path.format(f"schema/esm2-35m/{action}")).json()
        Draft202012Validator.check_schema(schema)
        assert schema["properties"]["items"]["maxItems"] == 8
        assert schema["throttle_rate"].partition("/")[2] in ("second", "minute")  # all that the SDK can read


@pytest.mark.parametrize("prefix", ["/api/ui", "/ui"])
def test_where_the_sdk_looks_for_models(ask: Ask, prefix: str) -> None:
    models = ask("GET", f"{prefix}/community-api-models/").json()["models"]
    assert [model["model_slug"] for model in models] == ["esm2-35m", "headless"]
    assert (models[1]["encoder"], models[1]["predictor"]) == (True, False)
    assert ask("GET", f"{prefix}/community-api-models/headless/").json() == models[1]
    check_error(ask("GET", f"{prefix}/community-api-models/other/"), 404)


def test_keys(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["first-key", "second-key"]
    monkeypatch.setenv("NUMPYESM_API_KEYS", ",".join(keys))
    with both_doors(catalog, keys) as ask:
        for value in ("Token first-key", "token second-key", "TOKEN  second-key "):
            assert post(ask, "encode", {"items": ONE}, authorization=value).status_code == 200
        words = "Token", "Token ", "Token first", "Token first-key-and-more", "Bearer first-key", "first-key"
        for value in (None, *words, "Token first-key second-key", "Basic Zmlyc3Q6a2V5"):
            headers = {} if value is None else {"authorization": value}
            for slug in ("esm2-35m", "nothing"):  # says nothing of what there is
                answer = post(ask, "encode", {"items": ONE}, slug, **headers)
                assert check_error(answer, 401)["code"] == "user.authentication"
                assert answer.headers["www-authenticate"].startswith("Token")
        assert ask("GET", "/healthz").json() == {"status": "ok"}


# -- what is refused ---------------------------------------------------------------------------------------------------

ONE, MASKED = items("MKT"), items("MK<mask>T")


def at(name: str, *indices: int) -> list[str]:
    """`items__0__sequence`, or `params__include__0`."""
    return [f"items__{i}__sequence" if name == "items" else f"params__{name}__{i}" for i in indices]


def with_params(given: Any = ONE, **params: Any) -> Any:
    return {"items": given, "params": params}


# (action, document, every field that is named)
REFUSED: list[tuple[str, Any, list[str]]] = [
    *(("encode", document, ["__all__"]) for document in ([], "x", None, 7)),
    ("encode", {}, ["items"]),
    *(("encode", {"items": value}, ["items"]) for value in (None, {}, [], "MKT", ONE * 9)),
    ("encode", {"items": [None, 1, "MKT", []]}, [f"items__{i}" for i in range(4)]),
    ("encode", {"items": [{}, *items(None, 5, ["M"])]}, at("items", 0, 1, 2, 3)),
    ("encode", {"items": [{"sequence": "MKT", "id": "x"}], "extra": 1}, ["items__0__id", "extra"]),
    ("encode", {"items": items("MKT", "mkt", "MK T", "M<mask>", "M*", "M.", "É", "")}, at("items", *range(1, 8))),
    ("encode", {"items": items("A" * 2049, "A" * 100_000, "M\n", "\ud800")}, at("items", 0, 1, 2, 3)),
    *(("encode", {"items": ONE, "params": params}, ["params"]) for params in (None, [])),
    ("encode", with_params(positions="all"), ["params__positions"]),
    *(("encode", with_params(repr_layers=layers), ["params__repr_layers"]) for layers in (-1, None, [0] * 257)),
    ("encode", with_params(repr_layers=[True, 1.0, "1", None, [], 10**60, -5, 4, 3, -4]), at("repr_layers", *range(8))),
    ("encode", with_params(include="mean"), ["params__include"]),
    ("encode", with_params(include=["mean", "sum", 1, None, [], {}]), at("include", 1, 2, 3, 4, 5)),
    ("encode", {"items": items("M1", 2), "params": {"include": ["x"]}}, [*at("items", 0, 1), *at("include", 0)]),
    ("predict", {"items": [*ONE, *MASKED, *items("-<mask>", "<mask", "<MASK>")]}, at("items", 0, 2, 3, 4)),
    ("predict", {"items": items("<mask>" * 2049)}, at("items", 0)),
    *(("predict", with_params(MASKED, positions=value), ["params__positions"]) for value in ("ALL", [], {})),
    ("predict", with_params(MASKED, positions=None, include=[]), ["params__positions", "params__include"]),
    ("log_prob", with_params(x=1), ["params__x"]),
    ("log_prob", {"items": MASKED}, at("items", 0)),
]


@pytest.mark.parametrize(("action", "document", "fields"), REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSED)])
def test_every_fault_is_named(ask: Ask, catalog: Catalog, action: str, document: Any, fields: list[str]) -> None:
    """And the schema refuses it too, but for too many masks, which a pattern cannot count."""
    check_error(post(ask, action, document), 422, *fields)
    assert "<mask>" * 2049 in str(document) or not schema_of(catalog, action).is_valid(document)


def test_messages_say_which_position_and_what_is_meant(ask: Ask) -> None:
    document = check_error(post(ask, "encode", {"items": items("MKTJ", "MK<mask>")}), 422)
    assert "'J' at position 4" in document["error"]["items__0__sequence"][0]
    assert document["detail"].startswith("items__0__sequence: ")
    assert document["detail"].endswith("(and 1 more)")
    assert "predict" in document["error"]["items__1__sequence"][0]
    # Every head that the weights lack is named.
    document = {"items": ONE, "params": {"include": ["logits", "mean", "contacts"]}}
    error = check_error(post(ask, "encode", document, "headless"), 422, "params__include")
    assert len(error["error"]["params__include"]) == 2


GOOD = json.dumps({"items": ONE}).encode()
PACKED = gzip.compress(GOOD)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        *((body, "empty") for body in (b"", b"  \n")),
        *((body * 100_000, "nested too deeply") for body in (b"[", b'{"items":')),
        *((b'{"items": [' + values * 30_000 + b"1]}", "more than 20000 values") for values in (b"[],", b"1,")),
        *((body, "not JSON") for body in (b"{", GOOD + b" x", b'{"items": [{"sequence": "M\nK"}]}')),
        (GOOD[:-1] + b', "params": {"repr_layers": [-Infinity]}}', "-Infinity is"),
        (GOOD[:-1] + b', "params": {"repr_layers": [' + b"9" * 100_000 + b"]}}", "digits"),
        (b'{"items": [{"sequence": "MKT", "sequence": "MKT"}]}', "'sequence' occurs twice"),
        *((body, "UTF-8") for body in (b'{"items": [{"sequence": "M\xff"}]}', GOOD.decode().encode("utf-16"))),
        (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_not_quite_json(ask: Ask, body: bytes, reason: str) -> None:
    assert reason in check_error(ask("POST", "/api/v3/esm2-35m/encode", body, JSON), 422, "__all__")["detail"]


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        *((200, GOOD, {"content-type": media}) for media in ("Application/JSON", 'application/json; charset="utf-8"')),
        *((415, GOOD, {"content-type": media}) for media in ("text/plain", "multipart/form-data; boundary=x")),
        *((415, GOOD, {"content-type": f"application/json{end}"}) for end in ("; charset=latin-1", "p")),
        (415, GOOD, {}),
        *((415, GOOD, {**JSON, "content-encoding": coding}) for coding in ("br", "gzip, gzip")),
        *((422, body, GZIP) for body in (b"not gzip", PACKED[:-4], PACKED[:10], PACKED + b"rubbish")),
        (422, PACKED[:-5] + b"\0\0\0\0\0", GZIP),
        *((422, body, GZIP) for body in (zlib.compress(GOOD), gzip.compress(PACKED), gzip.compress(b"") * 5000)),
        (413, gzip.compress(b" " * (3 << 20)), GZIP),
    ],
)
def test_media_types_and_damaged_gzip(ask: Ask, status: int, body: bytes, headers: dict[str, str]) -> None:
    answer = ask("POST", "/api/v3/esm2-35m/encode", body, headers)
    assert answer.status_code == status
    if status != 200:
        check_error(answer, status, "__all__")


def test_a_gzip_bomb_costs_nothing() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    tracemalloc.start()
    with pytest.raises(ApiError, match="larger than 2097152 bytes"):
        gunzip(bomb, 2 << 20)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", f"/api/{path}", 404) for path in ("v3/esm2-3b/encode/", "v3/esm2-35m/fold/", "v2/esm2-35m/encode/")),
        ("POST", "/api/v3/esm2-35m/encode//", 404),
        *(("GET", f"/api/v3/schema/{path}/", 404) for path in ("esm2-35m/fold", "headless/predict")),
        *(("GET", path, 404) for path in ("/nowhere", "/api/v3/esm2-35m/encode/x")),
        *((method, "/api/v3/esm2-35m/encode", 405) for method in ("GET", "DELETE", "OPTIONS")),
        *(("POST", path, 405) for path in ("/healthz", "/api/v3/models")),
    ],
)
def test_wrong_addresses_and_methods(ask: Ask, method: str, path: str, status: int) -> None:
    answer = ask(method, path, GOOD if method == "POST" else b"", JSON)
    check_error(answer, status)
    assert "access-control-allow-origin" not in answer.headers
    assert (status == 405) == ("allow" in answer.headers)


def test_every_item_is_named_however_many_problems_another_has(ask: Ask) -> None:
    """And hostile text comes back tame."""
    unknown = {"\ud800" + "k" * 100_000: 1} | {f"x{i}": 1 for i in range(2_000)}
    several = [{"sequence": "M", **unknown}, *items(*"123456", "\udfff")]
    answer = post(ask, "encode", {"items": several, "params": {"repr_layers": [9] * 256}, **unknown})
    document = check_error(answer, 422)
    assert len(document["errors"]) == 64
    assert {*at("items", *range(1, 8)), "params__repr_layers__0"} <= set(document["error"])
    assert any(name.startswith("items__0__") for name in document["error"])
    assert len(answer.content) < 50_000


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (ValueError("a secret of the inside"), 500, "server.internal"),
        (MemoryError(), 503, "server.memory"),
        (NotEnoughMemory("max_memory is 1 MiB"), 413, "user.memory"),
        (None, 500, "server.not_finite"),  # a number that is not finite
    ],
)
def test_a_failure_inside(
    ask: Ask, model: ESM2, monkeypatch: pytest.MonkeyPatch, failure: Any, status: int, code: str
) -> None:
    results = model.encode(["MKT"])
    results[0].embeddings[3][7] = np.nan  # type: ignore[index]

    def fail(*_: Any) -> Any:
        if failure is None:
            return iter(results)
        raise failure

    monkeypatch.setattr(Passes, "encode", fail)
    document = check_error(post(ask, "encode", {"items": ONE}), status)
    assert document["code"] == code
    assert "secret" not in str(document)
    assert ("max_memory" in document["detail"]) == (status == 413)
