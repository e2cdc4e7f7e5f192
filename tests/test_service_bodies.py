"""Hostile and odd bodies: each is refused with a reason, cheaply, and the service goes on."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_service import RunningService, receive_all, serving, small_weights
from test_service_contract import check_error, items

from numpyesm.service.bodies import _Gunzip
from numpyesm.service.errors import ApiError
from numpyesm.service.strict_json import parse_json

JSON = {"Content-Type": "application/json"}
GZIP = {**JSON, "Content-Encoding": "gzip"}
GOOD = {"items": [{"sequence": "MKT"}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    weights = small_weights(tmp_path_factory.mktemp("weights"))
    with serving(
        *("--model", f"esm2-35m={weights}", "--backend", "numpy", "--threads", "1"),
        *("--head-timeout", "1.5", "--body-timeout", "1.5", "--write-timeout", "2"),
    ) as running:
        yield running


def send(service: RunningService, data: Any, headers: dict[str, str] | None = None) -> requests.Response:
    return service.post("esm2-35m/encode/", data=data, headers=JSON if headers is None else headers)


def alive(service: RunningService) -> None:
    assert service.post("esm2-35m/encode/", GOOD).status_code == 200


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not JSON"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"items":' * 100_000, "nested too deeply"),
        (b'{"items": [{"sequence": "MKT"}], "params": {"repr_layers": [NaN]}}', "NaN"),
        (b'{"items": [{"sequence": "MKT"}], "params": {"repr_layers": [-Infinity]}}', "Infinity"),
        (b'{"items": [{"sequence": "MKT"}], "params": {"repr_layers": [1e999]}}', "out of range"),
        (b'{"items": [{"sequence": "MKT"}], "items": [{"sequence": "MKT"}]}', "stands twice"),
        (b'{"items": [{"sequence": "MKT", "sequence": "MKT"}]}', "stands twice"),
        (b'{"items": [{"sequence": "MKT"}], "params": {"repr_layers": [' + b"9" * 100_000 + b"]}}", "digits"),
        (b'{"items": [{"sequence": "MKT"}]} x', "not JSON"),
        (b'{"items": [{"sequence": "MKT"}],}', "not JSON"),
        (b"{'items': []}", "not JSON"),
        (b'{"items": [{"sequence": "M\xff"}]}', "UTF-8"),
        (json.dumps(GOOD).encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON: the body begins with a byte order mark"),
        (b'{"items": [{"sequence": "M\nK"}]}', "not JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_not_quite_json(service: RunningService, data: bytes, reason: str) -> None:
    document = check_error(send(service, data), 422, "__all__")
    assert reason in document["detail"]
    alive(service)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/jsonp"},
        {},
        {**JSON, "Content-Encoding": "br"},
        {**JSON, "Content-Encoding": "gzip, gzip"},
    ],
)
def test_wrong_media_types(service: RunningService, headers: dict[str, str]) -> None:
    check_error(send(service, json.dumps(GOOD).encode(), headers), 415)


@pytest.mark.parametrize(
    "value", ["application/json; charset=UTF-8", "Application/JSON", 'application/json;charset="utf-8"']
)
def test_right_media_types(service: RunningService, value: str) -> None:
    assert send(service, json.dumps(GOOD).encode(), {"Content-Type": value}).status_code == 200


def test_large_bodies(service: RunningService) -> None:
    large = json.dumps(GOOD).encode() + b" " * 2**20
    check_error(send(service, large), 413)
    check_error(send(service, iter([large[:1000], large[1000:]])), 413)  # chunked, no Content-Length
    assert send(service, large[: 2**20]).status_code == 200
    assert send(service, iter([large[:1000], large[1000 : 2**20]])).status_code == 200
    alive(service)


def test_said_to_be_huge_is_refused_before_it_is_sent(service: RunningService) -> None:
    for length in ("999999999999", "9" * 5000, "1048577"):
        with service.connect() as connection:
            head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 4")


def test_endless_rest_of_a_refused_body(service: RunningService) -> None:
    """The client is told, and cut off when it goes on."""
    with service.connect() as connection:
        head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 999999999999\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                sent += connection.send(b"x" * 65536)
        assert sent < 10**8
    alive(service)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refusal_reaches_a_client_that_closes_after_it(service: RunningService, version: str) -> None:
    """urllib and proxies send everything and only then read: a connection closed meanwhile is an error to them."""
    large = b"x" * 5_000_000
    with service.connect() as connection:
        head = f"POST /api/v3/esm2-35m/encode HTTP/{version}\r\nHost: localhost\r\nConnection: TE, Close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(large)}\r\n\r\n"
        connection.sendall(head.encode() + large)
        assert receive_all(connection).startswith(b"HTTP/1.1 413")
    with service.connect() as connection:  # refused before the body begins
        head = f"POST /nothing HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2000\r\n\r\n"
        connection.sendall(head.encode())
        answer = connection.recv(65536)
        for _ in range(20):
            connection.sendall(b"x" * 100)
            time.sleep(0.01)
        assert (answer + receive_all(connection)).startswith(b"HTTP/1.1 404")
    with service.connect() as connection:  # who asks whether to send the body does not send it now: nothing to wait for
        head = "POST /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nExpect: 100-continue\r\n"
        connection.sendall(f"{head}Content-Length: 2000\r\n\r\n".encode())
        connection.settimeout(1)
        assert receive_all(connection).startswith(b"HTTP/1.1 404")


def test_gzip_bomb_costs_nothing(service: RunningService) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(compressor.compress(b" " * 2**20) for _ in range(900)) + compressor.flush()
    assert len(bomb) < 2**20
    before = service.status("VmHWM")
    start = time.process_time()
    check_error(send(service, bomb, GZIP), 413)
    assert service.status("VmHWM") - before < 30_000  # kB
    assert time.process_time() - start < 60
    # Few bytes that unpack to a million values: those are not even read.
    for values in (b"[]," * 600_000, b"[" * 900 + b"]" * 600_000, b"{}," * 600_000, b"1," * 900_000):
        document = check_error(send(service, gzip.compress(b'{"items": [' + values + b"1]}"), GZIP), 422)
        assert document["detail"] == "the JSON has more than 20000 values"
    assert "',' at position 2" in send(service, json.dumps({"items": items(*["M,K" * 682] * 8)})).json()["detail"]
    # A member that bursts, many that are empty, and layers of gzip.
    check_error(send(service, gzip.compress(b"") * 5000, GZIP), 422)
    check_error(send(service, gzip.compress(gzip.compress(json.dumps(GOOD).encode())), GZIP), 422)
    alive(service)


@pytest.mark.parametrize(
    "data",
    [
        b"not gzip",
        gzip.compress(json.dumps(GOOD).encode())[:-4],
        gzip.compress(json.dumps(GOOD).encode())[:10],
        gzip.compress(json.dumps(GOOD).encode()) + b"rubbish",
        gzip.compress(json.dumps(GOOD).encode())[:-5] + b"\0\0\0\0\0",
        zlib.compress(json.dumps(GOOD).encode()),
    ],
)
def test_damaged_gzip(service: RunningService, data: bytes) -> None:
    check_error(send(service, data, GZIP), 422, "__all__")


def test_gunzip_gives_back_what_was_packed() -> None:
    packed = gzip.compress(b"one") + gzip.compress(b"two")
    for size in (1, 7, 100):
        unpack = _Gunzip(6)
        pieces = [packed[i : i + size] for i in range(0, len(packed), size)]
        assert b"".join(map(unpack.feed, pieces)) == b"onetwo"
        unpack.check_end()
    with pytest.raises(ApiError) as failure:
        _Gunzip(5).feed(packed)
    assert failure.value.status == 413


# -- time ------------------------------------------------------------------------------------------------------------


def test_slow_body(service: RunningService) -> None:
    with service.connect() as connection:
        head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = receive_all(connection)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"status_code":408' in answer
    alive(service)


@pytest.mark.parametrize("sent", [b"", b"POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: lo"])
def test_slow_head(service: RunningService, sent: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(sent)
        assert receive_all(connection).startswith(b"HTTP/1.1 408")


def test_a_head_that_trickles(service: RunningService) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for sent in range(300):
                connection.sendall(f"X-{sent}: 1\r\n".encode())
                time.sleep(0.1)
        assert sent < 200


def test_slow_head_after_a_request(service: RunningService) -> None:
    """On a connection that is kept open the clock starts with the first byte."""
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while b'"ok"' not in got:
            got += connection.recv(65536)
        time.sleep(2)  # idle for longer than a head may take: that is allowed
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        answer = receive_all(connection)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read(service: RunningService) -> None:
    """It is cut off, and its memory is free again."""
    params = {"include": ["per_token"], "repr_layers": [0, 1, 2, 3]}
    body = json.dumps({"params": params, "items": items(*["A" * 2000] * 8)})
    head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    before = service.open_files()
    with service.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        service.wait_until(lambda: any(e.get("reason") == "the client does not read" for e in service.entries()))
        service.wait_until(lambda: service.open_files() <= before + 1)
    assert "numpyesm_result_bytes 0.0" in requests.get(f"{service.url}/metrics", timeout=60).text


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
)  # fmt: skip
def test_not_http(service: RunningService, sent: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(sent)
        answer = receive_all(connection)
        assert answer.startswith(b"HTTP/1.1 400")
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["status_code"] == 400
    request_id = re.search(rb"x-request-id: (\w+)", head)
    assert request_id is not None
    told = request_id[1].decode()
    service.wait_until(lambda: any(e["id"] == told and e["status"] == 400 for e in service.entries()))
    alive(service)


def test_requests_one_behind_the_other_on_one_connection(service: RunningService) -> None:
    body = json.dumps(GOOD).encode()
    head = b"POST /api/v3/esm2-35m/log_prob HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with service.connect() as connection:
        connection.sendall((head + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 5)
        got = b""
        while got.count(b'"log_prob"') < 5:
            got += connection.recv(65536)
        assert got.count(b"HTTP/1.1 200") == 5


# -- whatever comes --------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
NEARLY = st.fixed_dictionaries(
    {
        "items": st.lists(
            st.fixed_dictionaries({"sequence": st.text("ACDEFGHIKLMNPQRSTVWYBXZUO-acgt1 <>", max_size=12) | SCALARS}),
            max_size=10,
        )
        | DOCUMENTS
    },
    optional={
        "params": st.fixed_dictionaries(
            {},
            optional={
                "repr_layers": st.lists(st.integers(-6, 6) | SCALARS, max_size=4) | DOCUMENTS,
                "include": st.lists(st.sampled_from(["mean", "bos", "per_residue", "x"]), max_size=3) | DOCUMENTS,
            },
        )
        | DOCUMENTS,
        "other": DOCUMENTS,
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=NEARLY | DOCUMENTS, action=st.sampled_from(["encode", "predict", "log_prob"]))
def test_any_document(service: RunningService, document: Any, action: str) -> None:
    response = service.post(f"esm2-35m/{action}", data=json.dumps(document), headers=JSON)
    if response.status_code == 200:
        assert len(response.json()["results"]) == len(document["items"])
    else:
        check_error(response, 422)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), gzipped=st.booleans())
def test_any_bytes(service: RunningService, data: bytes, gzipped: bool) -> None:
    response = service.post("esm2-35m/encode", data=data, headers=GZIP if gzipped else JSON)
    assert response.status_code == 422
    check_error(response, 422)


@settings(max_examples=200)
@given(document=DOCUMENTS)
def test_strict_json_reads_what_json_writes(document: Any) -> None:
    with contextlib.suppress(ValueError):  # not finite
        text = json.dumps(document, allow_nan=False)
        if not re.search(r"\d{64}", text):  # more digits than anyone sends
            assert parse_json(text.encode()) == document
