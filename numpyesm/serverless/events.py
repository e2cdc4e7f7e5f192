"""AWS's events as requests, and answers as AWS wants them: function URLs, API Gateway version 1 (REST) and 2 (HTTP).

Version 2 (function URLs too): `rawPath` with the stage in front, headers in lower case, several of one name joined by
commas. Version 1: `path`, with or without the stage or a base path in front; headers as sent, perhaps as lists too.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from ..service.errors import ApiError, invalid

# At most one segment in front: the stage, or the base path of a custom domain.
_ROUTES = re.compile(
    r"(?:/[^/]+)??/(?:api/v[13]/(?:schema/(?P<schema_slug>[^/]+)/(?P<schema_action>[^/]+)"
    r"|(?P<models>models)"
    r"|(?P<slug>[^/]+)/(?P<action>[^/]+))"
    r"|(?P<health>healthz|readyz))/?"
)
_MAX_BODY = 6 << 20  # what Lambda lets through
_MAX_UNPACKED = 2 << 20
_MAX_MEMBERS = 16


class NotARequest(Exception):
    """An event that is no HTTP request."""


@dataclass(frozen=True)
class Request:
    """An HTTP request, whatever it came through.

    Attributes
    ----------
    method, path : str
    headers : dict of str to list of str
        Names in lower case.
    version : str
        `1.0` or `2.0`.
    """

    method: str
    path: str
    headers: Mapping[str, Sequence[str]]
    version: str = "2.0"
    _body: str = field(default="", repr=False)
    _is_base64: bool = False

    def header(self, name: str) -> str | None:
        """All values of a header, joined."""
        values = self.headers.get(name)
        return ", ".join(values) if values else None

    def route(self) -> dict[str, str]:
        """The named parts of the path; ApiError 404 if there is nothing at it."""
        match = _ROUTES.fullmatch(self.path)
        if match is None:
            raise ApiError(404, "there is nothing at this address")
        return {name: value for name, value in match.groupdict().items() if value is not None}

    def body(self, gzipped: bool) -> bytes:
        """The body, unpacked.

        Raises
        ------
        ApiError
            413 if it is too large, 422 if base64 or gzip are damaged.
        """
        if len(self._body) > _MAX_BODY * 4 // 3 + 4:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes")
        if self._is_base64:
            try:
                data = base64.b64decode(self._body, validate=True)
            except (binascii.Error, ValueError):
                raise invalid([((), "the body is not base64, as the event says")]) from None
        else:
            data = self._body.encode("utf-8", "surrogatepass")
        if gzipped:
            return _gunzip(data)
        if len(data) > _MAX_UNPACKED:
            raise ApiError(413, f"the body is larger than {_MAX_UNPACKED} bytes")
        return data


def read_event(event: Any) -> Request:
    """The HTTP request in an event.

    Raises
    ------
    NotARequest
    """
    if not isinstance(event, Mapping):
        raise NotARequest(f"the event is {type(event).__name__}, not an object")
    context = event.get("requestContext")
    context = context if isinstance(context, Mapping) else {}
    http = context.get("http")
    if isinstance(http, Mapping) or event.get("version") == "2.0":
        http = http if isinstance(http, Mapping) else {}
        method, path, version = http.get("method"), event.get("rawPath") or http.get("path"), "2.0"
    else:
        method, path, version = event.get("httpMethod"), event.get("path"), "1.0"
    if not isinstance(method, str) or not isinstance(path, str):
        raise NotARequest("the event is not of a function URL or of API Gateway (no method or path in it)")
    body = event.get("body")
    if body is not None and not isinstance(body, str):
        raise NotARequest("the body in the event is not text")
    path = unquote(path)
    stage = context.get("stage")
    in_front = f"/{stage}/" if isinstance(stage, str) and stage not in ("", "$default") else None
    # A stage may be called "api": what is a route already has no stage in front that must go.
    if in_front and path.startswith(in_front) and _ROUTES.fullmatch(path) is None:
        path = path[len(in_front) - 1 :]
    return Request(method.upper(), path, _headers(event), version, body or "", event.get("isBase64Encoded") is True)


def _headers(event: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    several = event.get("multiValueHeaders")
    single = event.get("headers")
    for name, values in several.items() if isinstance(several, Mapping) else ():
        if isinstance(values, list):
            found[str(name).lower()] = [str(value) for value in values]
    for name, value in single.items() if isinstance(single, Mapping) else ():
        if value is not None:
            found.setdefault(str(name).lower(), [str(value)])
    return found


def _gunzip(data: bytes) -> bytes:
    out = bytearray()
    for _ in range(_MAX_MEMBERS):
        member = zlib.decompressobj(31)
        try:
            out += member.decompress(data, _MAX_UNPACKED - len(out) + 1)
        except zlib.error as error:
            raise invalid(
                [
                    (
                        (),
                        f"the body is not gzip, as Content-Encoding says: {error} (API Gateway's REST interface passes "
                        "binary bodies on only if its binaryMediaTypes list them)",
                    )
                ]
            ) from None
        if len(out) > _MAX_UNPACKED:
            raise ApiError(413, f"the unpacked body is larger than {_MAX_UNPACKED} bytes")
        if not member.eof:
            raise invalid([((), "the gzip body ends in the middle")])
        data = member.unused_data
        if not data:
            return bytes(out)
    raise invalid([((), f"the gzip body has more than {_MAX_MEMBERS} members")])


def as_answer(status: int, content: bytes, headers: Mapping[str, str], binary: bool) -> dict[str, Any]:
    """An answer in the form that all three kinds of events take."""
    body = base64.b64encode(content).decode("ascii") if binary else content.decode("utf-8")
    return {"statusCode": status, "headers": dict(headers), "body": body, "isBase64Encoded": binary}
