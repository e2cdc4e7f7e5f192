"""Bodies: what headers say of a request's, how it is unpacked and decoded, and the form of the answer."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..formats import Result, gzip_pieces, json_results, npz_results
from .errors import ApiError

JSON_TYPE = "application/json"
NPZ_TYPE = "application/x-npz"

# A request has hundreds of values. Two kilobytes of gzip can hold a million, and decoding those would keep
# everyone else waiting for seconds. (Eight sequences with a comma between letters still get their own message.)
MAX_VALUES = 20_000
# Python's gzip module writes one member; a few more are legal, thousands of empty ones are an attack.
_MAX_MEMBERS = 16


def check_media(content_type: str | None, content_encoding: str | None) -> bool:
    """Return whether a body is gzipped; ApiError 415 unless it is JSON in UTF-8, plain or gzipped."""
    media, parameters = _split(content_type or "")
    if media != JSON_TYPE:
        got = f"not {content_type[:80]!r}" if content_type else "and none was sent"
        raise ApiError(415, f"the Content-Type must be {JSON_TYPE}, {got}", headers={"Accept": JSON_TYPE})
    if (charset := parameters.get("charset", "utf-8")) not in ("utf-8", "utf8"):
        raise ApiError(415, f"the charset must be UTF-8, not {charset[:40]!r}")
    coding = (content_encoding or "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip"):
        message = f"Content-Encoding {coding[:80]!r} is not known; use gzip or none"
        raise ApiError(415, message, headers={"Accept-Encoding": "gzip"})
    return coding in ("gzip", "x-gzip")


def gunzip(data: bytes, limit: int) -> bytes:
    """Unpack a body of at most `limit` bytes; ApiError 413 beyond, 422 if it is damaged."""
    out = bytearray()
    for _ in range(_MAX_MEMBERS):
        member = zlib.decompressobj(31)
        try:
            out += member.decompress(data, limit - len(out) + 1)
        except zlib.error as error:
            raise ApiError(422, f"the body is not gzip, as Content-Encoding says: {error}") from None
        if len(out) > limit:
            raise too_large(limit, "the unpacked body")
        if not member.eof:
            raise ApiError(422, "the gzip body ends in the middle")
        data = member.unused_data
        if not data:
            return bytes(out)
    raise ApiError(422, f"the gzip body has more than {_MAX_MEMBERS} members")


def too_large(limit: int, what: str = "the body") -> ApiError:
    """Make the 413 for a body beyond its limit."""
    return ApiError(413, f"{what} is larger than {limit} bytes")


def parse_json(body: bytes) -> Any:
    """Decode a body; ApiError 422 says where it is not JSON.

    A repeated key is refused: there is no telling which of the two values is meant.
    """
    if not body.strip():
        raise ApiError(422, 'the body is empty; expected a JSON object such as {"items": [{"sequence": "MKT"}]}')
    # Every value but those left open at the end is followed by a comma or a bracket.
    if max(body.count(mark) for mark in (b",", b"]", b"}")) > MAX_VALUES:
        raise ApiError(422, f"the JSON has more than {MAX_VALUES} values")
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ApiError(422, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        reason = "the body begins with a byte order mark" if body.startswith(b"\xef\xbb\xbf") else error.msg
        raise ApiError(422, f"not JSON: {reason} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ApiError(422, "the JSON is nested too deeply") from None
    except ValueError as error:  # from the hooks below, and from int() for a number of thousands of digits
        raise ApiError(422, f"not JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice in one object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)


# -- answers ---------------------------------------------------------------------------------------------------------


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


def _weights(header: str | None) -> dict[str, float]:
    """Read quality values: `gzip, *;q=0.5` is `{"gzip": 1.0, "*": 0.5}`."""
    weights: dict[str, float] = {}
    for part in (header or "").split(","):
        name, parameters = _split(part)
        try:
            weights[name] = float(parameters.get("q", 1.0))
        except ValueError:
            weights[name] = 0.0
    return weights


def _split(value: str) -> tuple[str, dict[str, str]]:
    """Read a value and its parameters: `Text/HTML; q="0.5"` is `("text/html", {"q": "0.5"})`."""
    name, *parameters = value.lower().split(";")
    pairs = (parameter.partition("=") for parameter in parameters)
    return name.strip(), {key.strip(): text.strip().strip('"') for key, _, text in pairs}
