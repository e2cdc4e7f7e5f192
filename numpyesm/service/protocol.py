"""HTTP/1.1 as uvicorn speaks it, with time limits for headers, a limit of connections, and errors in our shape."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .gate import Gate, Message, Receive, Scope, Send
from .settings import Settings

# What a client may still send of a body that was refused, before the connection is cut.
_MAX_DISCARDED = 16 * 2**20


def make_protocol(settings: Settings, gate: Gate) -> type[asyncio.Protocol]:
    """The protocol class for a server with these settings; `gate` is told of what it refuses itself."""

    class Protocol(_LimitedProtocol):
        limits = settings
        refused = staticmethod(gate.refused)

    return Protocol


class _LimitedProtocol(H11Protocol):
    """A connection that waits for a request's headers only so long."""

    limits: Settings
    refused: Callable[[str, str, ApiError, int], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._discarded = 0
        served = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            # A client that does not read cannot be closed politely: that would wait for it to read.
            scope["extensions"] = {"numpyesm.abort": self.transport.abort}
            await served(scope, receive, self._reading_to_the_end(scope, receive, send))

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(ApiError(503, "too many connections", code="server.connections", headers={"Retry-After": "5"}))
            return
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._between_requests and self.conn.their_state is h11.SEND_BODY:
            self._discarded += len(data)
            if self._discarded > _MAX_DISCARDED:
                self.transport.abort()
                return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            self._watch_head()  # the rest of a refused body: it has the time of a head

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def shutdown(self) -> None:
        self._unwatch_head()
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # in the middle of a refused body
            self.transport.close()

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        """Start the clock if a head is awaited, stop it if a request is in hand."""
        if not self._between_requests:
            self._discarded = 0
            self._unwatch_head()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_timeout, self._head_is_late)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._between_requests or self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            self._refuse(ApiError(408, f"no request within {self.limits.head_timeout:g} seconds"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._abort_later()
        if self.conn.our_state is not h11.IDLE:  # an answer is on its way: nothing can be put between
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
        self.refused(request_id, self.client[0] if self.client else "unknown", error, len(body))

    def _reading_to_the_end(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """Before a connection closes, take what is still coming of a refused body.

        Closed at once, a client that is sending gets a reset, and never sees the answer.
        """
        closes = scope["http_version"] == "1.0" or _says_close(scope["headers"])
        comes = True

        async def run(message: Message) -> None:
            nonlocal closes, comes
            if message["type"] == "http.response.start":
                closes = closes or _says_close(message["headers"])
                comes = not self.conn.they_are_waiting_for_100_continue
            elif closes and comes and not message.get("more_body", False) and self.conn.their_state is h11.SEND_BODY:
                await send({**message, "more_body": True})
                await self._discard_body(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        return run

    async def _discard_body(self, receive: Receive) -> None:
        """The rest of a body, as long as its size and its time are within limits."""
        end = self.loop.time() + self.limits.head_timeout
        left = _MAX_DISCARDED
        more = True
        with suppress(asyncio.TimeoutError, TimeoutError):
            while more and left > 0:
                message = await asyncio.wait_for(receive(), max(0.0, end - self.loop.time()))
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.is_closing():
            self._abort_later()

    def _abort_later(self) -> None:
        """Closing waits until the client has read what it was sent; a client may never do."""
        self.loop.call_later(self.limits.write_timeout, self.transport.abort)


def _says_close(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"connection" and b"close" in value.lower() for name, value in headers)
