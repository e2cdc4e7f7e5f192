"""What every request passes first and last: its id, its Host, the safety headers, the log, the metrics."""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .access_log import AccessLog
from .errors import ApiError, ClientGone
from .hosts import check_host
from .metrics import HUNG_UP, Metrics
from .settings import Settings

log = logging.getLogger("numpyesm.service")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_API_SAFETY = [(b"cache-control", b"no-store"), (b"content-security-policy", b"default-src 'none'")]


@dataclass
class Record:
    """What is known of a request, for its line in the log."""

    id: str
    client: str
    route: str = "other"
    slug: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    hung_up: bool = False


def record_of(scope: Scope) -> Record:
    """The record of the request in hand."""
    record: Record = scope["numpyesm.record"]
    return record


async def send_bytes(send: Send, status: int, content: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """A whole answer at once."""
    length = (b"content-length", str(len(content)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": content})


async def send_error(send: Send, error: ApiError) -> None:
    """An error in the one shape."""
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send_bytes(send, error.status, error.body(), [(b"content-type", b"application/json"), *headers])


class Gate:
    """Wraps the application; nothing that happens inside leaves without an answer, a log line and a count."""

    def __init__(self, app: Application, settings: Settings, metrics: Metrics, access_log: AccessLog) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._log = access_log
        self.active = 0

    def refused(self, request_id: str, client: str, error: ApiError, size: int) -> None:
        """Count and log what never became a request: too many connections, no HTTP, a head that did not come."""
        self._metrics.request("other", "", error.status, 0.0, size)
        self._log.add(
            {
                "time": _now(),
                "id": request_id,
                "client": client,
                "method": "",
                "path": "",
                "status": error.status,
                "ms": 0.0,
                "bytes": size,
                "reason": error.detail,
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        record = Record(_request_id(headers), scope["client"][0] if scope.get("client") else "unknown")
        status, sent = 0, 0

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_safety(message.get("headers", []), record.id)}
            else:
                sent += len(message.get("body", b""))
            try:
                await asyncio.wait_for(send(message), self._settings.write_timeout)
            except (asyncio.TimeoutError, TimeoutError):
                record.facts["reason"] = "the client does not read"
                _abort(scope)
                raise ClientGone from None

        # HEAD is GET whose body the server leaves out.
        inner = {**scope, "numpyesm.record": record, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        self.active += 1
        try:
            if self._settings.local_only:
                check_host([value for name, value in headers if name == b"host"], self._settings.allowed_hosts)
            await self._app(inner, receive, answer)
        except ApiError as error:
            with suppress(ClientGone):
                await send_error(answer, error)
        except ClientGone:
            record.hung_up = True
        except Exception as error:
            log.error("request %s failed", record.id, exc_info=error)
            if status == 0:
                with suppress(ClientGone):
                    await send_error(answer, ApiError(500, "internal error"))
            elif status < 500:  # in the middle of an answer: only a broken connection tells the client
                _abort(scope)
        finally:
            self.active -= 1
            if record.hung_up or status == 0:
                status = HUNG_UP
            seconds = time.perf_counter() - start
            self._metrics.request(record.route, record.slug, status, seconds, sent)
            self._log.add(
                {
                    "time": _now(),
                    "id": record.id,
                    "client": record.client,
                    "method": scope["method"],
                    "path": _printable(scope["path"]),
                    "status": status,
                    "ms": round(seconds * 1e3, 2),
                    "bytes": sent,
                    **record.facts,
                }
            )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


def _abort(scope: Scope) -> None:
    with suppress(KeyError):
        scope["extensions"]["numpyesm.abort"]()


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id, if it is harmless, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return uuid.uuid4().hex


def _with_safety(headers: list[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    names = {name for name, _ in headers}
    added = [pair for pair in (*_SAFETY, *_API_SAFETY) if pair[0] not in names]
    return [*headers, *added, (b"x-request-id", request_id.encode())]


def _printable(path: str) -> str:
    return path[:300].encode("utf-8", "backslashreplace").decode()
