"""The page: files of the folder `page`, read once, each with its content type."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import NamedTuple

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
    ".fasta": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}

# Nothing from elsewhere; pictures that the page draws itself come as blob: or data:.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageFile(NamedTuple):
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, PageFile]:
    """All files of the page by name, folders below it included."""
    found: dict[str, PageFile] = {}
    waiting = [("", files(__package__).joinpath("page"))]
    while waiting:
        prefix, folder = waiting.pop()
        for entry in folder.iterdir() if folder.is_dir() else ():
            name = prefix + entry.name
            suffix = "." + entry.name.rpartition(".")[2].lower()
            if entry.is_dir():
                waiting.append((name + "/", entry))
            elif suffix in _TYPES and not entry.name.startswith("."):
                content = entry.read_bytes()
                found[name] = PageFile(content, _TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found
