"""The one shape of every error that a client gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ..errors import NotEnoughMemory, NumpyesmError
from ..formats import json_bytes

# Where a problem is, such as ("items", 0, "sequence"), and what it is.
Place: TypeAlias = tuple[str | int, ...]
Problem: TypeAlias = tuple[Place, str]

# More would help no one, and a hostile body could cause a hundred thousand.
_MAX_PROBLEMS = 64
_MAX_TEXT = 1000
_MAX_NAME = 100

# The kind of failure for programs (`user.*` is for the client to fix; `server.*` is for the operator, or temporary),
# and for people who read the API's description.
STATUSES = {
    400: ("user.bad_request", "Not HTTP, or a body of two lengths"),
    401: ("user.authentication", "No API key, or an unknown one"),
    403: ("user.forbidden", "The Host header names another machine (services without keys only)"),
    404: ("user.not_found", "No such model or action"),
    405: ("user.method_not_allowed", "Wrong method"),
    408: ("user.timeout", "The body did not arrive in time"),
    413: ("user.too_large", "The body is too large, or the request would take too much memory"),
    415: ("user.media_type", "Not JSON, or an unknown Content-Encoding"),
    422: ("user.validation", "The request is not valid; every bad item is named"),
    429: ("user.rate", "Too many requests from this client are waiting; see Retry-After"),
    500: ("server.internal", "The service failed"),
    503: (
        "server.unavailable",
        "The queue is full, the deadline passed, or the service is shutting down; see Retry-After",
    ),
}
# What a client is told about a wrong address or method.
ADDRESS_ERRORS = {404: "there is nothing at this address", 405: "this address does not accept this method"}


class ApiError(Exception):
    """An error to answer a request with.

    Parameters
    ----------
    status : int
        HTTP status code.
    detail : str
        One sentence for people.
    problems : sequence of (place, message), optional
        What is wrong where; a place is a path such as `("items", 0, "sequence")`.
    code : str, optional
        For programs; chosen by the status if absent.
    headers : mapping, optional
        Further headers, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        problems: Sequence[Problem] = (),
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.problems = list(problems)
        self.code = code or STATUSES[status][0]
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """Return the JSON document that the client gets."""
        problems = _first_of_each(self.problems)[:_MAX_PROBLEMS] or [((), self.detail)]
        errors: list[dict[str, Any]] = []
        by_field: dict[str, list[str]] = {}
        for place, message in problems:
            field, text = field_name(place), _clean(message)
            loc = [part if isinstance(part, int) else _clean(part, _MAX_NAME) for part in place]
            errors.append({"loc": loc, "field": field, "msg": text})
            by_field.setdefault(field, []).append(text)
        head = {"detail": _clean(self.detail), "errors": errors, "status_code": self.status, "code": self.code}
        return json_bytes(head | {"error": by_field})


def invalid(problems: Sequence[Problem]) -> ApiError:
    """Make the 422 that names every problem."""
    place, message = problems[0]
    where = f"{field_name(place)}: " if place else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return ApiError(422, f"{where}{message}{more}", problems=problems)


def unavailable(kind: str, message: str, retry_after: int = 5) -> ApiError:
    """Make the 503 for a failure that may pass; its code is `server.` and the kind."""
    return ApiError(503, message, code=f"server.{kind}", headers={"Retry-After": str(retry_after)})


def as_api_error(error: Exception) -> ApiError:
    """Turn any exception into what a client may be told about it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotEnoughMemory):
        return ApiError(413, str(error), code="user.memory")
    if isinstance(error, MemoryError):
        return unavailable("memory", "not enough memory at the moment", retry_after=10)
    known = isinstance(error, NumpyesmError)
    return ApiError(500, "the model could not compute this request" if known else "internal error")


def field_name(place: Place) -> str:
    """Write a place as one name: `items__0__sequence`; `__all__` is the request as a whole."""
    return "__".join(_clean(str(part), _MAX_NAME) for part in place) or "__all__"


def _first_of_each(problems: list[Problem]) -> list[Problem]:
    """Move the first problem of each item and parameter to the front, so that each is named even if some are cut."""
    if len(problems) <= _MAX_PROBLEMS:
        return problems
    first: dict[Place, Problem] = {}
    others = [problem for problem in problems if first.setdefault(problem[0][:2], problem) is not problem]
    return [*first.values(), *others]


def _clean(text: str, limit: int = _MAX_TEXT) -> str:
    """Shorten text that came from a client, and replace lone surrogates."""
    return (text if len(text) <= limit else text[:limit] + "…").encode("utf-8", "backslashreplace").decode()
