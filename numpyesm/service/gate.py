"""The outermost layer of every request: id, Host check, safety headers, unread bodies, log and metrics."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..api.bodies import JSON_TYPE
from ..api.errors import ADDRESS_ERRORS, ApiError, as_api_error
from .settings import Settings
from .telemetry import HUNG_UP, Record, Telemetry

log = logging.getLogger("numpyesm.service")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_SAFETY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'",
}
# How much of an unread body is still received before the connection is cut.
_MAX_DISCARDED = 16 << 20


class Gate:
    """Wraps the application: whatever happens inside, there is an answer, a log line and a count."""

    def __init__(self, app: ASGIApp, settings: Settings, telemetry: Telemetry) -> None:
        self._app = app
        self._settings = settings
        self._telemetry = telemetry
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        client = scope["client"][0] if scope.get("client") else "unknown"
        # The client's own id, if it is harmless.
        request_id = Headers(scope=scope).get("x-request-id", "")
        request_id = request_id if _REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        record = Record(request_id, client, scope["method"], scope["path"][:300])
        exchange = _Exchange(scope, receive, send, record, self._settings)
        # Every address works with and without a slash at its end.
        inner = {**scope, "app": self, "path": scope["path"].removesuffix("/") or "/", "numpyesm.record": record}
        self.active += 1
        try:
            await self._answer(inner, exchange)
        except ClientDisconnect:
            record.status = HUNG_UP
        except asyncio.CancelledError:  # the server shuts down, and this client does not read
            exchange.break_connection()
        finally:
            self.active -= 1
            record.status = record.status or HUNG_UP
            self._telemetry.request(record, time.perf_counter() - start)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        """Run the application, and answer with the error that it raises."""
        try:
            headers = Headers(scope=scope)
            if "content-length" in headers and "transfer-encoding" in headers:
                # The body has two lengths: a proxy in front may have used the other one.
                message = "the request has both Content-Length and Transfer-Encoding"
                raise ApiError(400, message, headers={"Connection": "close"})
            if self._settings.local_only:
                _check_host(headers.getlist("host"), self._settings.allowed_hosts)
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            raise
        except Exception as error:
            if isinstance(error, HTTPException):  # from the router
                detail = ADDRESS_ERRORS.get(error.status_code, error.detail)
                error = ApiError(error.status_code, detail, headers=error.headers)
            refusal = as_api_error(error)
            if refusal.status == 500 and refusal is not error:
                log.error("request %s failed", exchange.record.id, exc_info=error)
            if exchange.record.status:  # in the middle of an answer: only breaking the connection tells the client
                exchange.break_connection()
            else:
                response = Response(refusal.body(), refusal.status, refusal.headers, JSON_TYPE)
                await response(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer, as they pass through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, record: Record, settings: Settings) -> None:
        self._receive = receive
        self._send = send
        self._settings = settings
        self.record = record
        # Closing would wait for the client to read. (A test client has nothing to break.)
        self.break_connection = scope.get("extensions", {}).get("numpyesm.abort", lambda: None)
        headers = Headers(scope=scope)
        self._body_left = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._asks_first = "expect" in headers  # whether to send the body

    async def receive(self) -> Message:
        """Pass on a piece of the body."""
        self._asks_first = False
        message = await self._receive()
        self._body_left &= message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a piece of the answer; ClientDisconnect if the client does not take it."""
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SAFETY.items():
                headers.setdefault(name, value)
            headers["x-request-id"] = self.record.id
        else:
            self.record.sent += len(message.get("body", b""))
            if self._body_left and not self._asks_first and not message.get("more_body", False):
                # A client that is still sending would be reset, and never see the answer.
                await self._write({**message, "more_body": True})
                await self._discard_body()
                message = {"type": "http.response.body", "body": b""}
        await self._write(message)

    async def _write(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self._send(message), self._settings.write_timeout)
        except asyncio.TimeoutError:
            self.record.facts["reason"] = "the client does not read"
            self.break_connection()
            await asyncio.sleep(0)  # for uvicorn to see that the connection is lost
            raise ClientDisconnect from None

    async def _discard_body(self) -> None:
        """Receive the rest of the body, within limits of size and time; then break the connection."""
        end = time.monotonic() + self._settings.head_timeout
        left = _MAX_DISCARDED
        with suppress(asyncio.TimeoutError):
            while self._body_left and left > 0:
                message = await asyncio.wait_for(self.receive(), max(0.0, end - time.monotonic()))
                left -= len(message.get("body", b""))
        if self._body_left:
            self.break_connection()


def is_loopback(address: str) -> bool:
    """Tell whether an IP address belongs to the loopback interface."""
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return False


def _check_host(hosts: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise ApiError 403 if a Host header names another machine.

    A web page can make a browser send requests to 127.0.0.1 under a name of its own (DNS rebinding); its Host header
    gives it away. Programs that send no Host header are not browsers.
    """
    if not hosts:
        return
    # `LocalHost:8000` is `localhost`, `[::1]:8000` is `::1`.
    name = hosts[0].strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].removesuffix(".")
    if len(hosts) == 1 and (name in ("localhost", *allowed) or is_loopback(name)):
        return
    raise ApiError(
        403,
        f"this service has no API keys and answers only to the names of this machine, not to {name[:80]!r}",
        code="user.host",
    )
