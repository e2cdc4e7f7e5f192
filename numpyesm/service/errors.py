"""Every error that leaves the service, in one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# More would help nobody, and a hostile body could ask for a hundred thousand.
_MAX_ERRORS = 64
_MAX_TEXT = 1000

# Kind of failure, by status; `user.*` is for the client to mend, `server.*` for the operator or for time.
_CODES = {
    400: "user.bad_request",
    401: "user.authentication",
    403: "user.forbidden",
    404: "user.not_found",
    405: "user.method_not_allowed",
    408: "user.timeout",
    413: "user.too_large",
    415: "user.media_type",
    422: "user.validation",
    429: "user.rate",
    500: "server.internal",
    503: "server.unavailable",
}


class ClientGone(Exception):
    """The client hung up, or does not read; there is nobody to answer."""


class ApiError(Exception):
    """An answer that is not a result.

    Parameters
    ----------
    status : int
    detail : str
        One sentence for people.
    problems : sequence of (location, message), optional
        What is wrong where; a location is a path such as `("items", 0, "sequence")`.
    code : str, optional
        For programs; by status if not given.
    headers : mapping, optional
        Such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        problems: Sequence[tuple[tuple[str | int, ...], str]] = (),
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.problems = list(problems)
        self.code = code or _CODES.get(status, "user.bad_request" if status < 500 else "server.internal")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON that the client gets."""
        problems = _spread(self.problems)[:_MAX_ERRORS] or [((), self.detail)]
        error: dict[str, list[str]] = {}
        for location, message in problems:
            error.setdefault(field_name(location), []).append(_clean(message))
        document: dict[str, Any] = {
            "detail": _clean(self.detail),
            "errors": [
                {"loc": [_clean(part, 100) for part in location], "field": field_name(location), "msg": _clean(message)}
                for location, message in problems
            ],
            "status_code": self.status,
            "code": self.code,
            "error": error,
        }
        # Not orjson: the Lambda handler answers with these errors too, and has none.
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _spread(problems: Sequence[tuple[tuple[str | int, ...], str]]) -> list[tuple[tuple[str | int, ...], str]]:
    """The first problem of every item and every parameter before their others: each is named, if not all can be."""
    seen: set[tuple[str | int, ...]] = set()
    first = [p for p in problems if p[0][:2] not in seen and not seen.add(p[0][:2])]  # type: ignore[func-returns-value]
    taken = set(map(id, first))
    return [*first, *(p for p in problems if id(p) not in taken)] if len(problems) > _MAX_ERRORS else list(problems)


def field_name(location: Sequence[str | int]) -> str:
    """`items__0__sequence` for `("items", 0, "sequence")`; `__all__` for the request as a whole."""
    return "__".join(str(_clean(part, 100)) for part in location) or "__all__"


def invalid(problems: Sequence[tuple[tuple[str | int, ...], str]]) -> ApiError:
    """422 that names every problem."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    where = "" if not first[0] else f"{field_name(first[0])}: "
    return ApiError(422, f"{where}{first[1]}{more}", problems=problems)


def _clean(value: str | int, limit: int = _MAX_TEXT) -> Any:
    """Text that can be sent: no lone surrogates, and no megabyte of it."""
    if isinstance(value, int):
        return value
    if len(value) > limit:
        value = value[:limit] + "…"
    return value.encode("utf-8", "backslashreplace").decode()
