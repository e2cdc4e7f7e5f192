"""What an operator can set, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..memory import memory_limit

_GIBIBYTE = 1 << 30


def _option(default: Any, text: str) -> Any:
    """Make a setting that `numpyesm serve` has as an option of the same name."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """Limits of the service; what waits or connects beyond `queue_size` and `max_connections` is refused with 503.

    Attributes
    ----------
    max_memory : int
        Bytes that the whole process may take.
    max_body, max_decompressed : int
        Bytes of a body as sent, and once unpacked.
    local_only : bool
        No keys and a loopback address: only Host headers that name this machine are answered.
    allowed_hosts : tuple of str
        Further Host names for `local_only`.
    """

    queue_size: int = _option(512, "requests that may wait")
    max_connections: int = _option(1000, "open connections")
    deadline: float = _option(300.0, "seconds for a request")
    head_timeout: float = _option(10.0, "seconds for the headers")
    body_timeout: float = _option(30.0, "seconds for the body")
    write_timeout: float = _option(60.0, "seconds for a client to take a piece of an answer")
    grace: float = _option(30.0, "seconds to finish after SIGTERM")
    max_memory: int = 8 * _GIBIBYTE
    max_body: int = 1 << 20
    max_decompressed: int = 2 << 20
    local_only: bool = True
    allowed_hosts: tuple[str, ...] = ()


# Settings that `numpyesm serve` has as options, and what they limit.
OPTIONS = {setting.name: setting.metadata["help"] for setting in fields(Settings) if setting.metadata}


def default_max_memory() -> int:
    """80 % of what the process can have, at most 8 GiB."""
    return min(8 * _GIBIBYTE, int(0.8 * (memory_limit() or 10 * _GIBIBYTE)))
