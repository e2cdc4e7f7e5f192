"""Lambda's runtime API on loopback, and Amazon's own runtime client as a process that asks it for work."""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
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


@dataclass
class RuntimeApi:
    """`GET .../invocation/next` waits for an event; answers and errors are kept by request id."""

    waiting: queue.Queue[tuple[str, Any, float]] = field(default_factory=queue.Queue)
    answers: queue.Queue[tuple[str, str, bytes]] = field(default_factory=queue.Queue)
    asked: threading.Event = field(default_factory=threading.Event)  # the client is through with its init phase
    _count: int = 0

    def __enter__(self) -> RuntimeApi:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                assert self.path.endswith("/runtime/invocation/next"), self.path
                api.asked.set()
                identity, event, seconds = api.waiting.get()
                content = json.dumps(event).encode()
                self.send_response(200)
                self.send_header("Lambda-Runtime-Aws-Request-Id", identity)
                self.send_header("Lambda-Runtime-Deadline-Ms", str(int((time.time() + seconds) * 1000)))
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:eu-west-1:1:function:esm2")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                length = self.headers.get("Content-Length")
                content = self.rfile.read(int(length)) if length else self.chunks()
                *_, identity, kind = self.path.split("/")
                # The real one refuses what is larger, and the function has then failed.
                status = 413 if kind == "response" and len(content) > 6 * 1024 * 1024 + 100 else 202
                api.answers.put((identity, kind if status == 202 else "too large", content))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def chunks(self) -> bytes:
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def invoke(self, event: Any, seconds: float = 60.0) -> Answer:
        """Hand out one event and wait for the function's answer to it."""
        self._count += 1
        identity = f"request-{self._count}"
        self.waiting.put((identity, event, seconds))
        answered, kind, content = self.answers.get(timeout=seconds + 60)
        assert (answered, kind) == (identity, "response"), (answered, kind, content[:2000])
        return answer_of(json.loads(content))


def start_client(api: RuntimeApi, python_path: str, **variables: str) -> subprocess.Popen[bytes]:
    """`python -m awslambdaric numpyesm.serverless.handler`, with the environment that Lambda gives."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/tmp",
        "PYTHONPATH": python_path,
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{api.server.server_port}",
        "AWS_LAMBDA_FUNCTION_NAME": "esm2",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1024",
        "LAMBDA_TASK_ROOT": str(ROOT),
        "NUMPYESM_BACKEND": "numpy",
        "NUMPYESM_THREADS": "2",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "awslambdaric", "numpyesm.serverless.handler"],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
