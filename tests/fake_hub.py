"""A small Hugging Face Hub on loopback: the part of its HTTP interface that huggingface-hub needs to fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories as {name: {commit: folder}}; `main` is the last commit.

    `slow` names files that trickle, `corrupt` those that are served with a changed byte under the right checksum.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    slow: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def transfers(self, file: str) -> int:
        """How often a file was downloaded."""
        return sum(method == "GET" and path.endswith(file) for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        listing, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").strip("/").split("/")
        commits = self.hub.repositories.get("/".join(parts[:2]))
        if commits is None:
            return self.fail("RepoNotFound")
        revision = parts[3] if len(parts) > 3 else "main"  # behind `revision` or `resolve`
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self.fail("RevisionNotFound")
        if listing:
            files = [{"rfilename": file.name} for file in sorted(commits[commit].iterdir())]
            return self.reply(json.dumps({"id": "/".join(parts[:2]), "sha": commit, "siblings": files}).encode())
        file = commits[commit] / parts[-1]
        return self.send_file(file, commit) if file.is_file() else self.fail("EntryNotFound")

    do_HEAD = do_GET

    def send_file(self, file: Path, commit: str) -> None:
        content = bytearray(file.read_bytes())
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if file.name in self.hub.corrupt:
            content[-1] ^= 0xFF
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        self.reply(bytes(content), headers=headers, pause=0.02 if file.name in self.hub.slow else 0)

    def reply(self, content: bytes, status: int = 200, headers: Mapping[str, str] = {}, pause: float = 0) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        step = len(content) // 64 + 1
        with suppress(OSError):  # the client was killed
            for begin in range(0, len(content) if self.command == "GET" else 0, step):
                self.wfile.write(content[begin : begin + step])
                time.sleep(pause)

    def fail(self, code: str) -> None:
        self.reply(b"{}", 404, headers={"X-Error-Code": code})
