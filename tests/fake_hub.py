"""A small Hugging Face Hub on loopback: the part of its HTTP interface that huggingface-hub needs to fetch a model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories as {name: {commit: folder}}; `main` is the last commit.

    `drop_once` names files whose first transfer breaks off in the middle; `slow` those that trickle; `corrupt` those
    that are served with a changed byte under the right checksum.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    drop_once: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range

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

    def transfers(self, file: str) -> list[str | None]:
        """The Range header of each GET of a file, in order."""
        return [header for method, path, header in self.requests if method == "GET" and path.endswith(file)]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
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
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = {"X-Repo-Commit": commit, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(content[start:], 206 if wanted else 200, file.name, headers)

    def reply(self, content: bytes, status: int = 200, name: str = "", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped = name in self.hub.drop_once
        self.hub.drop_once.discard(name)
        body = content[: len(content) // 2] if dropped else content
        step = len(content) // 64 + 1
        try:
            for begin in range(0, len(body), step):
                self.wfile.write(body[begin : begin + step])
                time.sleep(0.02 if name in self.hub.slow else 0)
        except OSError:  # the client was killed
            dropped = True
        if dropped:
            self.close_connection = True
            self.connection.close()

    def fail(self, code: str) -> None:
        self.reply(b"{}", 404, headers={"X-Error-Code": code})
