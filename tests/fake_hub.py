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
    that are served with a changed byte though the listing states the right checksum.
    """

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    drop_once: set[str] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    corrupt: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    sent: int = 0

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
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

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
        else:
            self.fail("EntryNotFound")

    def folder(self, repository: str, revision: str) -> tuple[str, Path] | None:
        commits = self.hub.repositories.get(repository)
        if commits is None:
            self.fail("RepoNotFound")
            return None
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            self.fail("RevisionNotFound")
            return None
        return commit, commits[commit]

    def listing(self, repository: str, revision: str) -> None:
        found = self.folder(repository, revision)
        if found is None:
            return
        commit, folder = found
        siblings = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry: dict[str, object] = {"rfilename": path.name, "size": len(content), "blobId": git}
            if path.suffix in (".safetensors", ".bin"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        self.reply(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode())

    def file(self, repository: str, revision: str, name: str, body: bool) -> None:
        found = self.folder(repository, revision)
        if found is None:
            return
        commit, folder = found
        if not (folder / name).is_file():
            self.fail("EntryNotFound")
            return
        content = bytearray((folder / name).read_bytes())
        etag = hashlib.sha256(content).hexdigest()
        if name in self.hub.corrupt:
            content[-1] ^= 0xFF
        start = 0
        if header := self.headers.get("Range"):
            start = int(header.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if header else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        if header:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        rest = memoryview(content)[start:]
        if name in self.hub.drop_once:
            self.hub.drop_once.discard(name)
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        step = max(1, len(content) // 64)
        try:
            for begin in range(0, len(rest), step):
                self.wfile.write(rest[begin : begin + step])
                self.hub.sent += len(rest[begin : begin + step])
                if name in self.hub.slow:
                    time.sleep(0.02)
        except OSError:  # the client was killed
            self.close_connection = True

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, code: str) -> None:
        self.reply(404, json.dumps({"error": code}).encode(), X_Error_Code=code)
