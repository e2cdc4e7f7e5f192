"""What a client's headers say: how its body is encoded, and in which form it wants the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..formats import Result, gzip_pieces, json_results, npz_results
from .errors import ApiError

JSON_TYPE = "application/json"
NPZ_TYPE = "application/x-npz"


@dataclass(frozen=True)
class AnswerForm:
    """The form in which a client wants its results: JSON, gzipped if asked, or npz, which does not shrink."""

    npz: bool
    gzipped: bool

    @classmethod
    def chosen(cls, accept: str | None, accept_encoding: str | None) -> AnswerForm:
        """Read what the client prefers; npz must be preferred by name."""
        weights = _weights(accept)
        npz = max(weights.get(NPZ_TYPE, 0.0), weights.get("application/npz", 0.0))
        if npz > 0 and npz >= weights.get(JSON_TYPE, 0.0):
            return cls(npz=True, gzipped=False)
        weights = _weights(accept_encoding)
        named = [weights[name] for name in ("gzip", "x-gzip") if name in weights]
        return cls(npz=False, gzipped=max(named or [weights.get("*", 0.0)]) > 0)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that describe the form."""
        headers = {"content-type": NPZ_TYPE if self.npz else JSON_TYPE, "vary": "Accept, Accept-Encoding"}
        return headers | ({"content-encoding": "gzip"} if self.gzipped else {})

    def write(self, results: Sequence[Result]) -> Iterator[bytes]:
        """Write results piece by piece."""
        pieces = npz_results(results) if self.npz else json_results(results)
        return gzip_pieces(pieces) if self.gzipped else pieces


def is_gzipped(content_encoding: str | None) -> bool:
    """Whether the body is gzipped; ApiError 415 for any other encoding."""
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
