"""The function under Amazon's own runtime client, against a runtime API on loopback."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import random_sequence
from running_service import Answer, answer_of, check_error, items, same, url_event

from numpyesm import ESM2

pytest.importorskip("awslambdaric")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Lambda is Linux")]


class RuntimeApi(ThreadingHTTPServer):
    """`GET .../invocation/next` waits for an event; what is posted is kept."""

    daemon_threads = True

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[Any, float]] = queue.Queue()
        self.posted: queue.Queue[tuple[str, bytes]] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def invoke(self, event: Any, seconds: float = 60.0) -> Answer:
        """Hand out one event and wait for the function's answer to it."""
        self.events.put((event, seconds))
        path, content = self.posted.get(timeout=120)
        assert path.endswith("/invocation/request-1/response"), (path, content[:2000])
        assert len(content) <= 6 * 1024 * 1024 + 100  # Lambda refuses what is larger: the function has then failed
        return answer_of(json.loads(content))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RuntimeApi

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        event, seconds = self.server.events.get()
        headers = {
            "Content-Type": "application/json",
            "Lambda-Runtime-Aws-Request-Id": "request-1",
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + seconds) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-west-1:1:function:esm2",
        }
        self.answer(200, json.dumps(event).encode(), headers)

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        content = self.rfile.read(int(length)) if length else b"".join(iter(self.chunk, b""))
        self.server.posted.put((self.path, content))
        self.answer(202, b"{}", {})

    def chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return content

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running_function(**variables: str) -> Iterator[RuntimeApi]:
    """`python -m awslambdaric numpyesm.serverless.handler`, with the environment that Lambda gives."""
    with RuntimeApi() as api:
        environment = {
            "PATH": os.environ["PATH"],
            "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server_port}",
            "AWS_LAMBDA_FUNCTION_NAME": "esm2",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1024",
            "NUMPYESM_BACKEND": "numpy",
            "NUMPYESM_THREADS": "2",
            **variables,
        }
        command = [sys.executable, "-m", "awslambdaric", "numpyesm.serverless.handler"]
        with subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1]) as process:
            yield api
            process.kill()
        api.shutdown()


@pytest.fixture(scope="module")
def function(small_file: str) -> Iterator[RuntimeApi]:
    with running_function(NUMPYESM_MODEL=f"small={small_file}") as api:
        yield api


def ask(function: RuntimeApi, action: str, document: object, seconds: float = 60.0, **headers: str) -> Answer:
    """Ask through a function URL."""
    event = url_event(f"/api/v3/small/{action}/", document, **{"content-type": "application/json", **headers})
    return function.invoke(event, seconds)


def test_cold_and_warm_and_whatever_comes_between(function: RuntimeApi, loaded: ESM2) -> None:
    sequences = [random_sequence(n) for n in (12, 100)]
    expected = [result.to_dict() for result in loaded.encode(sequences)]
    for odd, field in (("text", "__all__"), ({"items": items("MKT", "MK1")}, "items__1__sequence"), ("{", "__all__")):
        same(ask(function, "encode", {"items": items(*sequences)}).json(), {"results": expected})
        check_error(ask(function, "encode", odd), 422, field)
    for odd in (None, [], "text", {}, {"Records": []}, 7):
        check_error(function.invoke(odd), 400)


def test_too_large_an_answer_is_refused_and_as_gzip_it_goes_through(function: RuntimeApi, loaded: ESM2) -> None:
    sequences = [random_sequence(1000, i) for i in range(8)]
    document = {"params": {"include": ["per_token"]}, "items": items(*sequences)}
    refusal = check_error(ask(function, "encode", document), 413)
    assert refusal["code"] == "user.answer_too_large"
    assert "gzip" in refusal["detail"]
    answer = ask(function, "encode", document, **{"accept-encoding": "gzip"})
    assert answer.status_code == 200, answer.content[:500]
    result = json.loads(gzip.decompress(answer.content))["results"][7] | {"sequence_index": 0}
    same(result, loaded.encode(sequences[7:], include=["per_token"])[0].to_dict())


def test_a_time_out_that_is_near_is_answered(function: RuntimeApi) -> None:
    """Eight long proteins take seconds; with less than that left the answer says so, and comes in time."""
    document = {"params": {"include": ["attentions"]}, "items": items(*[random_sequence(2000)] * 8)}
    refusal = check_error(ask(function, "encode", document, seconds=0.4), 503)
    assert refusal["code"] == "server.deadline"
    assert "fewer or shorter" in refusal["detail"]
    assert ask(function, "log_prob", {"items": items("MKT")}).status_code == 200


def test_a_function_without_weights_says_so_when_it_starts(tmp_path: Path) -> None:
    nowhere = {"NUMPYESM_CACHE": str(tmp_path), "NUMPYESM_WEIGHTS": str(tmp_path / "none")}
    with running_function(LAMBDA_TASK_ROOT=str(tmp_path), **nowhere) as api:
        path, content = api.posted.get(timeout=60)
    assert path.endswith("/init/error")
    assert "WeightsNotFound" in content.decode()
    assert "none" in content.decode()
