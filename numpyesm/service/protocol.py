"""uvicorn's HTTP/1.1 plus what it lacks: a deadline for request heads, a connection limit, errors in our own format."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..api.errors import ApiError
from .settings import Settings
from .telemetry import Record, Telemetry


def make_protocol(settings: Settings, telemetry: Telemetry) -> type[asyncio.Protocol]:
    """Make the protocol class for a server with these settings; `telemetry` counts what it refuses itself."""
    return type("Protocol", (_LimitedProtocol,), {"limits": settings, "telemetry": telemetry})


class _LimitedProtocol(H11Protocol):
    """A connection with a deadline for the head of each request."""

    limits: Settings
    telemetry: Telemetry

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        served = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            # A connection to a client that does not read cannot be closed normally: that would wait for it to read.
            await served({**scope, "extensions": {"numpyesm.abort": self.transport.abort}}, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(ApiError(503, "too many connections", code="server.connections", headers={"Retry-After": "5"}))
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # part of the next head came with this request
            self._watch_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        """Start the timer while waiting for a head, stop it while a request is being handled."""
        if not self._between_requests:
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._between_requests and not self.transport.is_closing():
            self._refuse(ApiError(408, f"no request within {self.limits.head_timeout:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._abort_later()
        if self.conn.our_state is not h11.IDLE:  # an answer is being sent: nothing can be put into it
            self.transport.close()
            return
        body, request_id = error.body(), uuid.uuid4().hex
        head = [
            f"HTTP/1.1 {error.status} Refused",
            "content-type: application/json",
            f"content-length: {len(body)}",
            f"x-request-id: {request_id}",
            "connection: close",
            *(f"{name.lower()}: {value}" for name, value in error.headers.items()),
        ]
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        self.transport.close()
        client, facts = self.client[0] if self.client else "unknown", {"reason": error.detail}
        self.telemetry.request(Record(request_id, client, status=error.status, sent=len(body), facts=facts))

    def _abort_later(self) -> None:
        """Break the connection after a while: closing waits for the client to read, which it may never do."""
        self.loop.call_later(self.limits.write_timeout, self.transport.abort)
