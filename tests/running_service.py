"""The doors that tests speak to: Lambda's events; the HTTP service in a thread, or `numpyesm serve` in a process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests

from numpyesm import ESM2
from numpyesm.api.catalog import Catalog
from numpyesm.api.keys import KeyRing


def items(*sequences: Any) -> list[dict[str, Any]]:
    """Sequences as a request has them."""
    return [{"sequence": sequence} for sequence in sequences]


# A request that is answered, its path, and how it begins on a bare connection.
GOOD = {"items": items("MKT")}
ENCODE = "esm2-35m/encode"
HEAD = f"POST /api/v3/{ENCODE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def check_error(answer: Any, status: int, *fields: str) -> dict[str, Any]:
    """The one shape of an error (schemathesis holds it against its schema); `fields` are all that `error` names."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    document: dict[str, Any] = answer.json()
    assert document["status_code"] == status
    assert document["code"].startswith("user." if status < 500 else "server.")
    assert {problem["field"] for problem in document["errors"]} == set(document["error"])
    if fields:
        assert set(document["error"]) == set(fields)
    return document


def same(got: Any, expected: Any) -> None:
    """Equal in keys, strings and order, and in numbers as float32."""
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        for key in expected:
            same(got[key], expected[key])
    elif isinstance(expected, list) and expected and isinstance(expected[0], float | list):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            same(one, other)
    else:
        assert got == (pytest.approx(expected) if isinstance(expected, float) else expected)


def receive_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            got += piece
    return got


def url_event(path: str, body: Any, method: str = "POST", stage: str = "$default", **headers: str) -> dict[str, Any]:
    """What a function URL sends; bytes are in base64, and what is no text is JSON."""
    binary = isinstance(body, bytes)
    text = base64.b64encode(body).decode() if binary else body if isinstance(body, str | None) else json.dumps(body)
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": headers,
        "requestContext": {"stage": stage, "http": {"method": method, "path": path, "protocol": "HTTP/1.1"}},
        "body": text,
        "isBase64Encoded": binary,
    }


class Answer(NamedTuple):
    """What a client gets, whichever door it came through."""

    status_code: int
    headers: dict[str, str]
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


def answer_of(document: Any) -> Answer:
    """What AWS makes of the function's answer, which must be JSON."""
    document = json.loads(json.dumps(document))
    content = base64.b64decode(document["body"]) if document["isBase64Encoded"] else document["body"].encode()
    return Answer(document["statusCode"], document["headers"], content)


class Running:
    """A service on a free loopback port, as its clients see it."""

    port = 0
    log: Callable[[], str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, document: Any = None, **options: Any) -> requests.Response:
        """POST JSON."""
        return requests.post(f"{self.url}/api/v3/{path}", json=document, timeout=120, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=60, **options)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def entries(self) -> list[dict[str, Any]]:
        """The access log so far."""
        return [json.loads(line) for line in self.log().splitlines()]

    def metric(self, name: str) -> float:
        """Sum of a counter over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def wait_until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait for something that will happen; an assertion fails if it does not."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain"
            time.sleep(0.01)


class ServiceHere(Running):
    """In a thread of this process; `service` holds its parts."""

    def __init__(self, models: Mapping[str, ESM2], keys: Sequence[str] = (), **settings: Any) -> None:
        from numpyesm.service.app import Service
        from numpyesm.service.server import Server, bind
        from numpyesm.service.settings import Settings

        log = io.StringIO()
        self.log = log.getvalue
        self.service = Service(Catalog(models), KeyRing(keys), Settings(**settings), log)
        sockets = bind("127.0.0.1", 0)
        self.port = sockets[0].getsockname()[1]
        self.server = Server(self.service)

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets)

        self.thread = threading.Thread(target=lambda: asyncio.run(serve()))
        self.thread.start()
        self.wait_until(lambda: self.server.started)

    def signal(self) -> None:
        """What the process does when a signal comes."""
        self.server.handle_exit(signal.SIGTERM, None)

    def __enter__(self) -> ServiceHere:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal()
        self.signal()
        self.thread.join(60)


class RunningService(Running):
    """`numpyesm serve` in a process of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.log, self.talk = ((folder / name).read_text for name in ("log", "talk"))
        with (folder / "log").open("wb") as log, (folder / "talk").open("wb") as talk:
            self.process = subprocess.Popen(command, stdout=log, stderr=talk, env=environment)
        pattern = r"on http://\S+?:(\d+)/"
        self.wait_until(lambda: re.search(pattern, self.talk()) or self.process.poll() is not None, 300)
        found = re.search(pattern, self.talk())
        assert found, f"the service did not start: {self.talk()}"
        self.port = int(found[1])
        assert self.get("/readyz").status_code == 200

    def status(self, field: str) -> int:
        """A number of /proc/PID/status, such as VmRSS (kB) or Threads."""
        if sys.platform != "linux":
            pytest.skip("reads /proc")
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def serving(*options: str, before: Sequence[str] = (), **variables: str) -> Iterator[RunningService]:
    """A service in a process of its own that is killed at the end; `before` stands before its command."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NUMPYESM_")}
    command = [*before, sys.executable, "-m", "numpyesm", "serve", "--port", "0", *options]
    with tempfile.TemporaryDirectory() as folder:
        service = RunningService(command, clean | variables, Path(folder))
        try:
            yield service
        finally:
            service.process.kill()
            service.process.wait()
