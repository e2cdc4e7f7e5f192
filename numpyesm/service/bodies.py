"""Reads request bodies from the network: so many bytes, in so much time."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Receive

from ..api.bodies import Gunzip, too_large
from ..api.errors import ApiError
from .settings import Settings


class ClientGone(Exception):
    """The client hung up, or does not read: there is nobody to answer."""


async def read_body(receive: Receive, content_length: str | None, gzipped: bool, settings: Settings) -> bytes:
    """Read a request's body and unpack it.

    Raises
    ------
    ApiError
        413 as soon as it is known to be too large, 408 if it does not come in time, 422 if the gzip is damaged.
    ClientGone
    """
    # Digits first: a number of a thousand digits need not be read.
    length = (content_length or "").lstrip("0")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > settings.max_body):
        raise too_large(settings.max_body)
    unpack = Gunzip(settings.max_decompressed) if gzipped else None
    deadline = time.monotonic() + settings.body_timeout
    body = bytearray()
    received = 0
    more = True
    while more:
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
            raise too_large(settings.max_body)
        body += unpack.feed(piece) if unpack else piece
        more = message.get("more_body", False)
    if unpack is not None:
        unpack.finish()
    return bytes(body)
