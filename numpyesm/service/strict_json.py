"""JSON as the standard has it and no more: no duplicate keys, no NaN, no bottomless nesting."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from .errors import ApiError, invalid

# No number in a request has more than a few digits; Python itself takes quadratic time to read long ones.
_MAX_DIGITS = 64

# A request has hundreds of values. Two kilobytes of gzip can hold a million, and reading them takes seconds, in which
# nobody else is served. (Eight sequences with a comma between letters still get their own message.)
_MAX_VALUES = 20_000


def parse_json(body: bytes) -> Any:
    """The document in `body`.

    Raises
    ------
    ApiError
        422, with the place of the fault.
    """
    if not body.strip():
        raise _refusal('the body is empty; expected a JSON object such as {"items": [{"sequence": "MKT"}]}')
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal(f"the body is not UTF-8 (byte {error.start})") from None
    # Every value but those left open at the end has a comma or a bracket behind it.
    if max(body.count(mark) for mark in (b",", b"]", b"}")) > _MAX_VALUES:
        raise _refusal(f"the JSON has more than {_MAX_VALUES} values")
    if text.startswith("\ufeff"):
        raise _refusal("not JSON: the body begins with a byte order mark; send it without")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _refusal(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _refusal("the JSON is nested too deeply") from None
    except ValueError as error:
        raise _refusal(str(error)) from None


def _refusal(message: str) -> ApiError:
    return invalid([((), message)])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:100]!r} stands twice in one object")
        made[key] = value
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is too long")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits[: _MAX_DIGITS * 16])
    if len(digits) > _MAX_DIGITS * 16 or not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_float
)
