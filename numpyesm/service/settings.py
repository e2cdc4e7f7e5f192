"""What an operator can set, with its defaults."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvalidOption

MEBIBYTE = 2**20
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Settings:
    """Limits of the service.

    Attributes
    ----------
    queue_size : int
        Requests that may wait for the engine; more are refused with 503.
    client_share : float
        Share of the queue that one client (API key, else address) may fill; more are refused with 429.
    deadline : float
        Seconds from a request's arrival to its results.
    max_memory : int
        Bytes that the whole process may take.
    max_body, max_decompressed : int
        Bytes of a body as sent, and after gzip.
    head_timeout, body_timeout, write_timeout, idle_timeout : float
        Seconds for the headers; for the body; for the client to take a piece of the answer; between requests.
    max_connections : int
        Open connections; more are refused.
    grace : float
        Seconds after SIGTERM in which accepted requests may finish.
    local_only : bool
        No keys and a loopback address: only Host headers that name this machine are answered.
    allowed_hosts : tuple of str
        Further Host names for `local_only`.
    """

    queue_size: int = 512
    client_share: float = 0.75
    deadline: float = 300.0
    max_memory: int = 8 * GIBIBYTE
    max_body: int = MEBIBYTE
    max_decompressed: int = 2 * MEBIBYTE
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


def parse_size(text: str) -> int:
    """Bytes of `512M`, `8G`, `1048576`; InvalidOption for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not size:
        raise InvalidOption(f"{text!r} is no size: write it as 512M, 8G or in bytes")
    return size


def default_max_memory() -> int:
    """80 % of what the machine or the container has, at most 8 GB."""
    limits = [8 * GIBIBYTE]
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        limits.append(int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(0.8 * int(Path(path).read_text())))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits)
