"""Listen and shut down: sockets, signals, and the time for accepted requests to finish."""

from __future__ import annotations

import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from ..errors import InvalidOption
from .app import Service
from .protocol import make_protocol

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


def addresses(host: str) -> list[str]:
    """Return the IP addresses that a host name resolves to."""
    return sorted({str(address[0]) for _, address in _resolve(host, 0)})


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
                http=make_protocol(settings, service.telemetry),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=trusted_proxies or "127.0.0.1",
                timeout_keep_alive=int(settings.idle_timeout),
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
        engine = self._service.engine
        if self._signals and not engine.draining:
            log.warning("shutting down: new requests are refused, %d accepted ones finish", self._service.gate.active)
            engine.draining = True
            self._leave_by = time.monotonic() + self._service.settings.grace
        if self._signals > 1:
            self._leave_by = 0.0
            self.config.timeout_graceful_shutdown = 1
        if engine.draining and not self.should_exit:
            late = time.monotonic() > self._leave_by
            if late:
                engine.abandon()
            self.should_exit = late or self._service.gate.active == 0
        return await super().on_tick(counter)
