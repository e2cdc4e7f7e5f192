"""The HTTP service as a process: its pages, its log, and hostile or odd connections."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from running_service import RunningService, check_error, items, receive_all, serving

JSON = {"Content-Type": "application/json"}
GOOD = {"items": items("MKT")}
ENCODE = "esm2-35m/encode/"
HEAD = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def service(small_file: str) -> Iterator[RunningService]:
    limits = ("--head-timeout", "1.5", "--body-timeout", "1.5", "--write-timeout", "2")
    with serving("--model", f"esm2-35m={small_file}", "--backend", "numpy", "--threads", "1", *limits) as running:
        yield running


@pytest.fixture(autouse=True)
def _it_lives_on(service: RunningService) -> Iterator[None]:
    yield
    assert service.post(ENCODE, GOOD).status_code == 200


# -- what people and monitors read -------------------------------------------------------------------------------------


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
    docs = requests.get(f"{service.url}/docs", timeout=60)
    assert docs.headers["content-security-policy"] == policy
    assert "https://" not in docs.text
    paths = requests.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    for path in paths:
        assert path.rstrip("/") in docs.text
    script = requests.get(f"{service.url}/page/main.js", timeout=60)
    assert script.headers["content-type"].startswith("text/javascript")
    head = requests.head(f"{service.url}/healthz", timeout=60)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/nothing.js", "/nowhere"])
def test_nothing_else_is_to_be_had(service: RunningService, path: str) -> None:
    with requests.Session() as session:
        prepared = requests.Request("GET", service.url).prepare()
        prepared.url = service.url + path
        check_error(session.send(prepared, timeout=60), 404)


def test_request_id_and_log_line(service: RunningService) -> None:
    response = service.post(ENCODE, GOOD, headers={"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["cache-control"] == "no-store"
    bad = service.post(ENCODE, GOOD, headers={"X-Request-ID": "no blanks\tplease"})
    assert bad.headers["x-request-id"] != "no blanks\tplease"
    requests.get(f"{service.url}/healthz?token=secret", headers={"X-Request-ID": "mine-2"}, timeout=60)
    service.wait_until(lambda: any(entry["id"] == "mine-2" for entry in service.entries()))
    entry = next(entry for entry in service.entries() if entry["id"] == "mine-1")
    assert (entry["status"], entry["slug"], entry["action"], entry["items"]) == (200, "esm2-35m", "encode", 1)
    assert (entry["residues"], entry["client"]) == (3, "127.0.0.1")
    assert {"ms", "bytes", "queue_ms", "compute_ms"} <= set(entry)
    assert "secret" not in "".join(service.log)


def test_metrics(service: RunningService) -> None:
    service.post(ENCODE, GOOD)
    service.post("made-up-slug/encode", GOOD)
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    assert 'numpyesm_requests_total{route="encode",slug="esm2-35m",status="200"}' in text
    assert "numpyesm_queue_length 0.0" in text
    assert "made-up-slug" not in text


@pytest.mark.slow
def test_schemathesis(service: RunningService, tmp_path: Path) -> None:
    """All its checks: status codes, answers' schemas, refusal of bad data, acceptance of good, wrong methods."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", "8", "--seed", "1", "--suppress-health-check", "all", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# -- bodies ------------------------------------------------------------------------------------------------------------


def test_large_bodies(service: RunningService) -> None:
    large = json.dumps(GOOD).encode() + b" " * 2**20
    check_error(service.post(ENCODE, data=large, headers=JSON), 413)
    check_error(service.post(ENCODE, data=iter([large[:1000], large[1000:]]), headers=JSON), 413)  # chunked
    assert service.post(ENCODE, data=large[: 2**20], headers=JSON).status_code == 200
    assert service.post(ENCODE, data=iter([large[:1000], large[1000 : 2**20]]), headers=JSON).status_code == 200


@pytest.mark.parametrize("first_line", [HEAD.splitlines()[0], "GET /healthz HTTP/1.1"])
def test_endless_rest_of_a_body_that_nobody_reads(service: RunningService, first_line: str) -> None:
    """The client is told, and cut off when it goes on."""
    with service.connect() as connection:
        connection.sendall(f"{first_line}\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                sent += connection.send(b"x" * 65536)
        assert sent < 10**8


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refusal_reaches_a_client_that_closes_after_it(service: RunningService, version: str) -> None:
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


@pytest.mark.slow
def test_gzip_bomb_costs_nothing(service: RunningService) -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(compressor.compress(b" " * 2**20) for _ in range(200)) + compressor.flush()
    before = service.status("VmHWM")
    check_error(service.post(ENCODE, data=bomb, headers={**JSON, "Content-Encoding": "gzip"}), 413)
    assert service.status("VmHWM") - before < 30_000  # kB


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_that_trickles(service: RunningService) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        connection.settimeout(0.1)
        for number in range(300):
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1024).startswith(b"HTTP/1.1 408")
                return
            connection.sendall(f"X-{number}: 1\r\n".encode())
    pytest.fail("it may go on for ever")


@pytest.mark.slow
def test_a_client_that_does_not_read(service: RunningService) -> None:
    """It is cut off, and its memory is free again."""
    params = {"include": ["per_token"], "repr_layers": [0, 1, 2, 3]}
    body = json.dumps({"params": params, "items": items(*["A" * 2000] * 8)})
    before = service.open_files()
    with service.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        service.wait_until(lambda: any(e.get("reason") == "the client does not read" for e in service.entries()))
        service.wait_until(lambda: service.open_files() <= before + 1)
    assert "numpyesm_result_bytes 0.0" in requests.get(f"{service.url}/metrics", timeout=60).text


# -- HTTP --------------------------------------------------------------------------------------------------------------

BODY = json.dumps(GOOD).encode()
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
HEALTH = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
NOWHERE = "POST /nowhere HTTP/1.1\r\nHost: localhost\r\n"


def two_lengths(lines: str) -> bytes:
    """A proxy in front may believe the other length: what follows is then another client's request."""
    return f"{HEAD}{lines.format(len(CHUNKED))}\r\n\r\n".encode() + CHUNKED + f"{HEALTH}\r\n".encode()


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        # No HTTP.
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50),
        (400, b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, f"{HEALTH}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        (400, f"{HEALTH}X: " + "x" * 200_000),
        (400, f"{HEALTH}Content-Length: -1\r\n\r\n"),
        # Two lengths close the connection.
        (400, two_lengths("Content-Length: {}\r\nTransfer-Encoding: chunked")),
        (400, two_lengths("Transfer-Encoding: chunked\r\nContent-Length: {}")),
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
def test_what_is_refused_is_said_and_logged(service: RunningService, status: int, sent: str | bytes) -> None:
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


def test_requests_one_behind_the_other_on_one_connection(service: RunningService) -> None:
    with service.connect() as connection:
        connection.sendall((HEAD.encode() + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY) * 5)
        got = b""
        while got.count(b'"results"') < 5:
            got += connection.recv(65536)
        assert got.count(b"HTTP/1.1 200") == 5
