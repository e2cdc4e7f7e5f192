"""uvicorn with what it lacks: deadlines for heads, a connection limit, errors in our format, shutdown in two steps."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..api.errors import ApiError, unavailable
from ..errors import InvalidOption
from .app import Service
from .gate import is_loopback
from .settings import Settings
from .telemetry import Record, Telemetry

log = logging.getLogger("numpyesm.service")


def bind(host: str, port: int) -> list[socket.socket]:
    """Listen on every address that `host` resolves to; port 0 picks a free one.

    Raises
    ------
    InvalidOption
        The host is unknown, or the address is taken.
    """
    if not 0 <= port <= 65535:
        raise InvalidOption(f"--port {port}: expected 0 to 65535")
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in _resolve(host, port):
        if sockets and port == 0:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sockets.append(socket.create_server(address, family=family, backlog=2048))
        except OSError as error:
            failure = error
    if not sockets:
        raise InvalidOption(f"cannot listen on {host} port {port}: {failure.strerror if failure else 'no address'}")
    return sockets


def is_local(host: str) -> bool:
    """Tell whether a host name stands for this machine only."""
    return all(is_loopback(str(address[0])) for _, address in _resolve(host, 0))


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InvalidOption(f"--host {host}: {error}") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


class Server(uvicorn.Server):
    """Shuts down in two steps: first accepted requests finish and new ones are refused, then connections close.

    A second signal ends the first step at once, and waiting clients are told so.
    """

    def __init__(self, service: Service, trusted_proxies: str = "") -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                service.gate,
                http=partial(_Connection, settings, service.telemetry),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=trusted_proxies or "127.0.0.1",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
            )
        )
        self._service = service
        self._signals = 0
        self._leave_by = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count signals; the event loop acts on them."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Shut down if there was a signal."""
        engine, gate = self._service.engine, self._service.gate
        if self._signals and not self.should_exit:
            if not engine.draining:
                log.warning("shutting down: new requests are refused, %d accepted ones finish", gate.active)
                engine.draining = True
                self._leave_by = time.monotonic() + self._service.settings.grace
            if self._signals > 1:
                self._leave_by = 0.0
                self.config.timeout_graceful_shutdown = 1
            late = time.monotonic() > self._leave_by
            if late:
                engine.abandon()
            self.should_exit = late or gate.active == 0
        return await super().on_tick(counter)


class _Connection(H11Protocol):
    """A connection with a deadline for the head of each request."""

    def __init__(self, limits: Settings, telemetry: Telemetry, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._telemetry = telemetry
        self._head_timer: asyncio.TimerHandle | None = None
        served = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            # A connection to a client that does not read cannot be closed normally: that would wait for it to read.
            await served({**scope, "extensions": {"numpyesm.abort": self.transport.abort}}, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(unavailable("connections", "too many connections"))
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch_head()

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

    def _watch_head(self) -> None:
        """Start the timer while waiting for a head; stop it while a request is being handled, and at the end."""
        waits = (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if waits and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_timeout, self._head_is_late)
        elif not waits and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(ApiError(408, f"no request within {self._limits.head_timeout:g} seconds"))

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
        self._telemetry.request(Record(request_id, client, status=error.status, sent=len(body), facts=facts))

    def _abort_later(self) -> None:
        """Break the connection after a while: closing waits for the client to read, which it may never do."""
        self.loop.call_later(self._limits.write_timeout, self.transport.abort)
