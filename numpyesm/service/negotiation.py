"""What a client's headers ask for: the form of the answer, and its coding."""

from __future__ import annotations

from .answers import JSON_TYPE, NPZ_TYPE
from .errors import ApiError


def answer_form(accept: str | None) -> str:
    """`application/x-npz` for who prefers it by name, else JSON."""
    weights = _weights(accept or "")
    npz = max(weights.get(NPZ_TYPE, 0.0), weights.get("application/npz", 0.0))
    return NPZ_TYPE if npz > 0 and npz >= weights.get(JSON_TYPE, 0.0) else JSON_TYPE


def wants_gzip(accept_encoding: str | None) -> bool:
    """Whether the answer may come gzipped."""
    weights = _weights(accept_encoding or "")
    return max(weights.get("gzip", -1.0), weights.get("x-gzip", -1.0), 0.0) > 0 or (
        "gzip" not in weights and weights.get("*", 0.0) > 0
    )


def is_gzipped(content_encoding: str | None) -> bool:
    """Whether the body comes gzipped; ApiError 415 for another coding."""
    coding = (content_encoding or "").strip().lower()
    if coding in ("", "identity"):
        return False
    if coding in ("gzip", "x-gzip"):
        return True
    raise ApiError(
        415, f"Content-Encoding {coding[:80]!r} is not known; use gzip or none", headers={"Accept-Encoding": "gzip"}
    )


def check_json_type(content_type: str | None) -> None:
    """ApiError 415 unless the body says that it is JSON."""
    media, _, parameters = (content_type or "").partition(";")
    if media.strip().lower() != JSON_TYPE:
        got = f"not {content_type[:80]!r}" if content_type else "and none was sent"
        raise ApiError(415, f"the Content-Type must be {JSON_TYPE}, {got}", headers={"Accept": JSON_TYPE})
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise ApiError(415, f"the charset must be UTF-8, not {value.strip()[:40]!r}")


def _weights(header: str) -> dict[str, float]:
    """`{"gzip": 1.0, "*": 0.5}` for `gzip, *;q=0.5`."""
    weights: dict[str, float] = {}
    for part in header.split(","):
        name, *parameters = part.split(";")
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                try:
                    weight = float(value)
                except ValueError:
                    weight = 0.0
        if name.strip():
            weights[name.strip().lower()] = weight
    return weights
