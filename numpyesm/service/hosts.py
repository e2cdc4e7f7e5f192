"""Who may use a service without keys: only this machine, and no web page that pretends to be on it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from ..api.errors import ApiError


def is_loopback(address: str) -> bool:
    """Tell whether an IP address belongs to the loopback interface."""
    try:
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    except ValueError:
        return False


def check_host(hosts: Sequence[str], allowed: Sequence[str]) -> None:
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
