"""Lambda's runtime API on loopback, and Amazon's own runtime client as a process that asks it for work."""

from __future__ import annotations

import base64
import contextlib
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
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


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
        with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
            yield api
            process.kill()
        api.shutdown()
