"""What an operator can set, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from ..memory import memory_limit

_GIBIBYTE = 1 << 30
# Settings that `numpyesm serve` has as options of the same names, and what they limit.
OPTIONS = {
    "queue_size": "requests that may wait",
    "max_connections": "open connections",
    "deadline": "seconds for a request",
    "head_timeout": "seconds for the headers",
    "body_timeout": "seconds for the body",
    "write_timeout": "seconds for a client to take a piece of an answer",
    "grace": "seconds to finish after SIGTERM",
}


@dataclass(frozen=True)
class Settings:
    """Limits of the service.

    Attributes
    ----------
    queue_size : int
        Requests that may wait for the engine; more are refused with 503.
    client_share : float
        Share of the queue that one client (API key, or address) may fill; more is refused with 429.
    deadline : float
        Seconds from a request's arrival to its results.
    max_memory : int
        Bytes that the whole process may take.
    max_body, max_decompressed : int
        Bytes of a body as sent, and once unpacked.
    head_timeout, body_timeout, write_timeout, idle_timeout : float
        Seconds for the headers, for the body, for the client to take a piece of the answer, and between requests.
    max_connections : int
        Open connections; more are refused.
    grace : float
        Seconds after SIGTERM for accepted requests to finish.
    local_only : bool
        No keys and a loopback address: only Host headers that name this machine are answered.
    allowed_hosts : tuple of str
        Further Host names for `local_only`.
    """

    queue_size: int = 512
    client_share: float = 0.75
    deadline: float = 300.0
    max_memory: int = 8 * _GIBIBYTE
    max_body: int = 1 << 20
    max_decompressed: int = 2 << 20
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    idle_timeout: float = 75.0
    max_connections: int = 1000
    grace: float = 30.0
    local_only: bool = True
    allowed_hosts: tuple[str, ...] = ()

    @property
    def client_limit(self) -> int:
        """Requests that one client may have waiting."""
        return max(1, int(self.queue_size * self.client_share))


def default_max_memory() -> int:
    """80 % of what the process can have, at most 8 GiB."""
    return min(8 * _GIBIBYTE, int(0.8 * (memory_limit() or 10 * _GIBIBYTE)))
