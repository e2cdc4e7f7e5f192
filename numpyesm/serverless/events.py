"""Read AWS's events, and write answers for AWS: function URLs, API Gateway version 1 (REST) and 2 (HTTP).

Version 2 (function URLs too): `rawPath` with the stage in front, headers in lower case, several of one name joined by
commas. Version 1: `path`, with or without the stage or a base path in front; headers as sent, perhaps as lists too.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from ..api.bodies import gunzip, too_large
from ..api.errors import ADDRESS_ERRORS, ApiError

# At most one segment in front: the stage, or the base path of a custom domain.
_ROUTES = re.compile(
    r"(?:/[^/]+)??/(?:api/v[13]/(?:schema/(?P<schema_slug>[^/]+)/(?P<schema_action>[^/]+)"
    r"|(?P<models>models)"
    r"|(?P<slug>[^/]+)/(?P<action>[^/]+))"
    r"|(?:api/)?ui/(?P<sdk_models>community-api-models)(?:/(?P<sdk_slug>[^/]+))?"
    r"|(?P<health>healthz|readyz))/?"
)
_MAX_UNPACKED = 2 << 20


@dataclass(frozen=True)
class Request:
    """An HTTP request from any kind of event.

    Attributes
    ----------
    method, path : str
    headers : dict of str to str
        Names in lower case; several values of one name are joined by commas.
    content : str
        The body, perhaps in base64.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    content: str
    is_base64: bool

    def route(self) -> dict[str, str]:
        """Return the named parts of the path; ApiError 404 if there is nothing at this address."""
        match = _ROUTES.fullmatch(self.path)
        if match is None:
            raise ApiError(404, ADDRESS_ERRORS[404])
        return {name: value for name, value in match.groupdict().items() if value is not None}

    def body(self, gzipped: bool) -> bytes:
        """Return the body, unpacked.

        Raises
        ------
        ApiError
            413 if it is too large, 422 if its base64 or gzip is damaged.
        """
        if self.is_base64:
            try:
                data = base64.b64decode(self.content, validate=True)
            except ValueError:
                raise ApiError(422, "the body is not base64, as the event says") from None
        else:
            data = self.content.encode("utf-8", "surrogatepass")
        if gzipped:
            data = gunzip(data, _MAX_UNPACKED)
        if len(data) > _MAX_UNPACKED:
            raise too_large(_MAX_UNPACKED)
        return data


def read_event(event: Any) -> Request:
    """Read the HTTP request in an event.

    Raises
    ------
    ApiError
        400 if the event is not an HTTP request.
    """
    if not isinstance(event, Mapping):
        raise ApiError(400, f"the event is {type(event).__name__}, not an object")
    context = _mapping(event, "requestContext")
    http = _mapping(context, "http")  # of version 2
    method = http.get("method") or event.get("httpMethod")
    path = event.get("rawPath") or http.get("path") or event.get("path")
    if not isinstance(method, str) or not isinstance(path, str):
        raise ApiError(400, "the event is not of a function URL or of API Gateway (no method or path in it)")
    body = event.get("body")
    if body is not None and not isinstance(body, str):
        raise ApiError(400, "the body in the event is not text")
    path = unquote(path)
    stage = f"/{context.get('stage')}"
    # A stage may be called "api": a path that is already a route has no stage to remove.
    if path.startswith(f"{stage}/") and _ROUTES.fullmatch(path) is None:
        path = path.removeprefix(stage)
    return Request(method.upper(), path, _headers(event), body or "", event.get("isBase64Encoded") is True)


def _mapping(owner: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = owner.get(name)
    return value if isinstance(value, Mapping) else {}


def _headers(event: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, values in _mapping(event, "multiValueHeaders").items():
        if isinstance(values, list):
            found[str(name).lower()] = ", ".join(map(str, values))
    for name, value in _mapping(event, "headers").items():
        if value is not None:
            found.setdefault(str(name).lower(), str(value))
    return found


def write_answer(content: bytes, headers: dict[str, str], status: int = 200, binary: bool = False) -> dict[str, Any]:
    """Make the document that AWS takes; its form is the same for all three kinds of events."""
    body = base64.b64encode(content).decode("ascii") if binary else content.decode("utf-8")
    return {"statusCode": status, "headers": headers, "body": body, "isBase64Encoded": binary}
