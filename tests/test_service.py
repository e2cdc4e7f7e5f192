"""The HTTP service over a socket: what people and monitors read, its log, who is let in, hostile or odd connections."""

from __future__ import annotations

import contextlib
import json
import re
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from running_service import ENCODE, GOOD, HEAD, ServiceHere, check_error, items, receive_all

from numpyesm import ESM2

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(loaded: ESM2) -> Iterator[ServiceHere]:
    limits = {"head_timeout": 0.5, "body_timeout": 0.5, "write_timeout": 0.5}
    with ServiceHere({"esm2-35m": loaded}, allowed_hosts=("proteins.example",), **limits) as running:
        yield running


@pytest.fixture(autouse=True)
def _it_lives_on(service: ServiceHere) -> Iterator[None]:
    yield
    assert service.post(ENCODE, GOOD).status_code == 200


def test_pages(service: ServiceHere) -> None:
    page = service.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert not re.search("unsafe|http", policy)
    assert service.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    docs = service.get("/docs")
    assert docs.headers["content-security-policy"] == policy
    assert "https://" not in docs.text
    for path in service.get("/openapi.json").json()["paths"]:
        assert path.rstrip("/") in docs.text
    assert service.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    head = requests.head(f"{service.url}/healthz", timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/nothing.js", "/nowhere"):
        prepared = requests.Request("GET", service.url).prepare()
        prepared.url = service.url + path  # `..` and all
        check_error(requests.Session().send(prepared, timeout=60), 404)


def test_log_line_and_metrics(service: ServiceHere) -> None:
    response = service.post(ENCODE, GOOD, headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["cache-control"] == "no-store"
    bad = service.post(ENCODE, GOOD, headers={"X-Request-ID": "no blanks\tplease"})
    assert bad.headers["x-request-id"] != "no blanks\tplease"
    service.post("made-up-slug/encode", GOOD)
    service.get("/healthz?token=secret", headers={"X-Request-ID": "mine-2"})
    service.wait_until(lambda: any(entry["id"] == "mine-2" for entry in service.entries()))
    entry = next(entry for entry in service.entries() if entry["id"] == "mine-1")
    assert (entry["status"], entry["slug"], entry["action"], entry["items"]) == (200, "esm2-35m", "encode", 1)
    assert (entry["residues"], entry["client"]) == (3, "127.0.0.1")
    assert {"ms", "bytes", "queue_ms", "compute_ms"} <= set(entry)
    assert "secret" not in service.log()
    text = service.get("/metrics").text
    assert 'numpyesm_requests_total{route="encode",slug="esm2-35m",status="200"}' in text
    assert "numpyesm_queue_length 0.0" in text
    assert "made-up-slug" not in text


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["examples,fuzzing", "coverage --include-operation-id predict"])
def test_schemathesis(service: ServiceHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: str) -> None:
    """All its checks: status codes, answers' schemas, refusal of bad data, acceptance of good, wrong methods."""
    from click.testing import CliRunner
    from schemathesis.cli import schemathesis

    monkeypatch.chdir(tmp_path)
    command = ["run", f"{service.url}/openapi.json", "--checks", "all", "--max-examples", "4", "--seed", "1"]
    command += ["--suppress-health-check", "all", "--no-color", "--phases", *phases.split()]
    done = CliRunner().invoke(schemathesis, command)
    assert done.exit_code == 0, done.output[-5000:]


@pytest.mark.slow
def test_dns_rebinding(service: ServiceHere) -> None:
    ours = ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.9.9.9:80", "[::1]:8000", "proteins.example"]
    others = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "@localhost"]
    for host in ours:
        assert service.post(ENCODE, GOOD, headers={"Host": host}).status_code == 200, host
    for host in others:
        check_error(service.post(ENCODE, GOOD, headers={"Host": host}), 403)


def test_too_many_connections_are_refused(loaded: ESM2) -> None:
    with ServiceHere({"esm2-35m": loaded}, max_connections=2) as service, contextlib.ExitStack() as stack:
        *_, third = [stack.enter_context(service.connect()) for _ in range(3)]
        assert receive_all(third).startswith(b"HTTP/1.1 503")


def test_large_bodies(service: ServiceHere) -> None:
    large = json.dumps(GOOD).encode() + b" " * 2**20
    check_error(service.post(ENCODE, data=large, headers=JSON), 413)
    check_error(service.post(ENCODE, data=iter([large[:1000], large[1000:]]), headers=JSON), 413)  # chunked
    assert service.post(ENCODE, data=large[: 2**20], headers=JSON).status_code == 200
    assert service.post(ENCODE, data=iter([large[:1000], large[1000 : 2**20]]), headers=JSON).status_code == 200


@pytest.mark.parametrize("first_line", [HEAD.splitlines()[0], "GET /healthz HTTP/1.1"])
def test_endless_rest_of_a_body_that_nobody_reads(service: ServiceHere, first_line: str) -> None:
    """The client is told, and cut off when it goes on."""
    with service.connect() as connection:
        connection.sendall(f"{first_line}\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                sent += connection.send(b"x" * 65536)
        assert sent < 10**8


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refusal_reaches_a_client_that_closes_after_it(service: ServiceHere, version: str) -> None:
    """urllib and proxies send everything and only then read: a connection closed meanwhile is an error to them."""
    large = b"x" * 5_000_000
    first_line = f"POST /api/v3/esm2-35m/encode HTTP/{version}\r\nHost: localhost\r\nConnection: TE, Close\r\n"
    with service.connect() as connection:
        head = f"{first_line}Content-Type: application/json\r\nContent-Length: {len(large)}\r\n\r\n"
        connection.sendall(head.encode() + large)
        assert receive_all(connection).startswith(b"HTTP/1.1 413")
    with service.connect() as connection:  # refused before the body begins
        connection.sendall(f"{first_line}Content-Length: 2000\r\n\r\n".encode())
        answer = connection.recv(65536)
        for _ in range(20):
            connection.sendall(b"x" * 100)
        assert (answer + receive_all(connection)).startswith(b"HTTP/1.1 415")


def test_a_head_that_trickles(service: ServiceHere) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        while not select.select([connection], [], [], 0.05)[0]:
            connection.sendall(b"X: 1\r\n")
        assert connection.recv(1024).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_client_that_does_not_read(service: ServiceHere) -> None:
    """It is cut off, and its memory is free again."""
    params = {"include": ["per_token"], "repr_layers": [0, 1, 2, 3]}
    body = json.dumps({"params": params, "items": items("A" * 2000, "A" * 2000)})
    with service.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        service.wait_until(lambda: any(e.get("reason") == "the client does not read" for e in service.entries()))
        whole = 2 * 4 * 2000 * 80 * 6  # bytes at least
        assert len(receive_all(connection)) < whole
    assert service.metric("numpyesm_result_bytes") == 0
    service.wait_until(lambda: service.service.gate.active == 0)


BODY = json.dumps(GOOD)
CHUNKED = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"
LENGTHS = [f"Content-Length: {len(CHUNKED)}", "Transfer-Encoding: chunked"]
HEALTH = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
NOWHERE = "POST /nowhere HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        # No HTTP.
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50),
        (400, b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, f"{HEALTH}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        (400, f"{HEALTH}X: " + "x" * 200_000),
        (400, f"{HEALTH}Content-Length: -1\r\n\r\n"),
        # Two lengths close the connection: a proxy that believes the other one takes the rest for another's request.
        *((400, f"{HEAD}{a}\r\n{b}\r\n\r\n{CHUNKED}{HEALTH}\r\n") for a, b in (LENGTHS, LENGTHS[::-1])),
        # Who says that a body is too large, or asks before sending it, is answered at once.
        *((413, f"{HEAD}Content-Length: {length}\r\n\r\n") for length in ("999999999999", "1048577")),
        (404, f"{NOWHERE}Connection: close\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n"),
        # What does not come in time: a head, half a head, a body, a second head on the same connection.
        (408, ""),
        (408, HEAD[:60]),
        (408, f"{HEAD}Content-Length: 100\r\n\r\n{{"),
        (408, f"{HEALTH}\r\n{HEALTH}"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_is_said_and_logged(service: ServiceHere, status: int, sent: str | bytes) -> None:
    with service.connect() as connection:
        connection.sendall(sent if isinstance(sent, bytes) else sent.encode())
        answer = receive_all(connection)
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(body)["status_code"] == status
    request_id = re.search(r"x-request-id: (\w+)", head.decode())
    assert request_id is not None
    told = (request_id[1], status)
    service.wait_until(lambda: any((entry["id"], entry["status"]) == told for entry in service.entries()))
