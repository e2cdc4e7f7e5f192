"""Unpack request bodies, up to a limit, and decode them."""

from __future__ import annotations

import json
import zlib
from typing import Any, NoReturn

from .errors import ApiError, invalid

# A request has hundreds of values. Two kilobytes of gzip can hold a million, and decoding those would keep
# everyone else waiting for seconds. (Eight sequences with a comma between letters still get their own message.)
MAX_VALUES = 20_000
# Python's gzip module writes one member; a few more are legal, thousands of empty ones are an attack.
_MAX_MEMBERS = 16


def gunzip(data: bytes, limit: int) -> bytes:
    """Unpack a body of at most `limit` bytes; ApiError 413 beyond, 422 if it is damaged."""
    out = bytearray()
    for _ in range(_MAX_MEMBERS):
        member = zlib.decompressobj(31)
        try:
            out += member.decompress(data, limit - len(out) + 1)
        except zlib.error as error:
            raise _refusal(f"the body is not gzip, as Content-Encoding says: {error}") from None
        if len(out) > limit:
            raise too_large(limit, "the unpacked body")
        if not member.eof:
            raise _refusal("the gzip body ends in the middle")
        data = member.unused_data
        if not data:
            return bytes(out)
    raise _refusal(f"the gzip body has more than {_MAX_MEMBERS} members")


def too_large(limit: int, what: str = "the body") -> ApiError:
    """Make the 413 for a body beyond its limit."""
    return ApiError(413, f"{what} is larger than {limit} bytes")


def parse_json(body: bytes) -> Any:
    """Decode a body; ApiError 422 says where it is not JSON.

    A repeated key is refused: there is no telling which of the two values is meant.
    """
    if not body.strip():
        raise _refusal('the body is empty; expected a JSON object such as {"items": [{"sequence": "MKT"}]}')
    # Every value but those left open at the end is followed by a comma or a bracket.
    if max(body.count(mark) for mark in (b",", b"]", b"}")) > MAX_VALUES:
        raise _refusal(f"the JSON has more than {MAX_VALUES} values")
    try:
        return _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        reason = "the body begins with a byte order mark" if body.startswith(b"\xef\xbb\xbf") else error.msg
        raise _refusal(f"not JSON: {reason} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _refusal("the JSON is nested too deeply") from None
    except ValueError as error:  # from the hooks below, and from int() for a number of thousands of digits
        raise _refusal(f"not JSON: {error}") from None


def _refusal(message: str) -> ApiError:
    return invalid([((), message)])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in document if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice in one object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
