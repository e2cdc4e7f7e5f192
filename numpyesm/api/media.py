"""What a client's headers say: how its body is coded, and which form of answer it wants."""

from __future__ import annotations

from .errors import ApiError

JSON_TYPE = "application/json"
NPZ_TYPE = "application/x-npz"
# Shorter answers are not worth compressing.
GZIP_FROM = 256


def answer_form(accept: str | None) -> str:
    """Return `application/x-npz` if it is preferred by name, otherwise JSON."""
    weights = _weights(accept)
    npz = max(weights.get(NPZ_TYPE, 0.0), weights.get("application/npz", 0.0))
    return NPZ_TYPE if npz > 0 and npz >= weights.get(JSON_TYPE, 0.0) else JSON_TYPE


def wants_gzip(accept_encoding: str | None) -> bool:
    """Tell whether the answer may be gzipped."""
    weights = _weights(accept_encoding)
    named = [weights[name] for name in ("gzip", "x-gzip") if name in weights]
    return max(named or [weights.get("*", 0.0)]) > 0


def is_gzipped(content_encoding: str | None) -> bool:
    """Tell whether the body is gzipped; ApiError 415 for any other coding."""
    coding = (content_encoding or "").strip().lower()
    if coding in ("", "identity"):
        return False
    if coding in ("gzip", "x-gzip"):
        return True
    raise ApiError(
        415, f"Content-Encoding {coding[:80]!r} is not known; use gzip or none", headers={"Accept-Encoding": "gzip"}
    )


def check_json_type(content_type: str | None) -> None:
    """ApiError 415 unless the body is declared to be JSON in UTF-8."""
    media, _, parameters = (content_type or "").partition(";")
    if media.strip().lower() != JSON_TYPE:
        got = f"not {content_type[:80]!r}" if content_type else "and none was sent"
        raise ApiError(415, f"the Content-Type must be {JSON_TYPE}, {got}", headers={"Accept": JSON_TYPE})
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise ApiError(415, f"the charset must be UTF-8, not {value.strip()[:40]!r}")


def _weights(header: str | None) -> dict[str, float]:
    """Read quality values: `gzip, *;q=0.5` is `{"gzip": 1.0, "*": 0.5}`."""
    weights: dict[str, float] = {}
    for part in (header or "").split(","):
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
