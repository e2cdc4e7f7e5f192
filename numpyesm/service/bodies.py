"""Reading a body: so many bytes, in so much time, unpacked no further than allowed."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import ApiError, ClientGone, invalid
from .settings import Settings

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Python's gzip module writes one member; a few more are legal, thousands of empty ones are an attack.
_MAX_MEMBERS = 16


async def read_body(receive: Receive, content_length: str | None, gzipped: bool, settings: Settings) -> bytes:
    """The body of a request, unpacked.

    Raises
    ------
    ApiError
        413 as soon as it is known to be too large, 408 if it does not come in time, 422 if the gzip is damaged.
    ClientGone
    """
    # Digits first: a number of a thousand digits need not be read.
    length = (content_length or "").lstrip("0")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > settings.max_body):
        raise _too_large(settings.max_body)
    unpack = _Gunzip(settings.max_decompressed) if gzipped else None
    deadline = time.monotonic() + settings.body_timeout
    body = bytearray()
    received = 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(
                408,
                f"the body did not arrive within {settings.body_timeout:g} seconds",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        received += len(piece)
        if received > settings.max_body:
            raise _too_large(settings.max_body)
        body += unpack.feed(piece) if unpack else piece
        if not message.get("more_body", False):
            break
    if unpack is not None:
        unpack.check_end()
    return bytes(body)


def _too_large(limit: int, what: str = "the body") -> ApiError:
    return ApiError(413, f"{what} is larger than {limit} bytes")


class _Gunzip:
    """Gunzip as it comes, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._left = limit
        self._members = 0
        self._member = zlib.decompressobj(31)
        self._started = False

    def feed(self, data: bytes) -> bytes:
        """What `data` unpacks to."""
        out = bytearray()
        while data:
            if self._member.eof:
                if self._members == _MAX_MEMBERS:
                    raise invalid([((), f"the gzip body has more than {_MAX_MEMBERS} members")])
                self._member = zlib.decompressobj(31)
            self._started = True
            try:
                out += self._member.decompress(data, self._left - len(out) + 1)
            except zlib.error as error:
                raise invalid([((), f"the body is not gzip, as Content-Encoding says: {error}")]) from None
            if len(out) > self._left:
                raise _too_large(self._limit, "the unpacked body")
            data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            self._members += self._member.eof
        self._left -= len(out)
        return bytes(out)

    def check_end(self) -> None:
        """ApiError 422 if the last member is not whole."""
        if self._started and not self._member.eof:
            raise invalid([((), "the gzip body ends in the middle")])
