"""Checks of request bodies without pydantic: the same faults, places and words as `service/schemas.py`.

`tests/test_serverless_service.py` holds both to one table of good and bad requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..alphabet import ENCODE_LETTERS, MASK_TOKEN, PREDICT_LETTERS, tokenize
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..options import INCLUDES, POSITIONS, check_includes, check_layers
from ..service.errors import invalid

ACTIONS = ("encode", "predict", "log_prob")
MAX_ITEMS = 8
_MAX_LIST = 256
_INCLUDE_NAMES = ("mean", "per_token", "per_residue", "bos", "contacts", "logits", "attentions")
assert {*_INCLUDE_NAMES} == {*INCLUDES, "per_residue"}

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Work:
    """A checked request."""

    action: str
    sequences: list[str]
    layers: tuple[int, ...] = ()
    include: frozenset[str] = frozenset()
    positions: str = "all"

    @property
    def lengths(self) -> list[int]:
        """Residues of each sequence; a mask is one."""
        return [len(sequence) - (len(MASK_TOKEN) - 1) * sequence.count(MASK_TOKEN) for sequence in self.sequences]


class _Faults:
    """All that is wrong with a document, in its order."""

    def __init__(self) -> None:
        self.found: list[tuple[Place, str]] = []

    def add(self, place: Place, message: str) -> None:
        self.found.append((place, message))

    def fields(
        self, value: Any, place: Place, known: Mapping[str, Callable[[Any, Place], None]], required: str | None = None
    ) -> None:
        """Check an object field by field; unknown ones are refused."""
        if not isinstance(value, dict):
            self.add(place, "expected an object")
            return
        for name, check in known.items():
            if name in value:
                check(value[name], (*place, name))
            elif name == required:
                self.add((*place, name), "this field is required")
        for name in value:
            if name not in known:
                self.add((*place, name), "unknown field")

    def list_of(self, value: Any, place: Place, check: Callable[[Any, Place], None], most: int, least: int = 0) -> None:
        """Check a list item by item."""
        if not isinstance(value, list):
            self.add(place, "expected a list")
        elif len(value) > most:
            self.add(place, f"at most {most} are allowed")
        elif len(value) < least:
            self.add(place, f"at least {least} is needed")
        else:
            for index, item in enumerate(value):
                check(item, (*place, index))

    def one_of(self, value: Any, place: Place, names: tuple[str, ...]) -> None:
        if not isinstance(value, str) or value not in names:
            *first, last = (f"'{name}'" for name in names)
            self.add(place, f"expected one of {', '.join(first)} or {last}")


def check_request(action: str, document: Any, num_layers: int) -> Work:
    """The request in `document`.

    Raises
    ------
    ApiError
        422, naming everything that is wrong with it.
    """
    faults = _Faults()

    def layer(value: Any, place: Place) -> None:
        if type(value) is not int:
            faults.add(place, "expected a whole number")
            return
        try:
            check_layers([value], num_layers)
        except InvalidOption as error:
            faults.add(place, str(error))

    def sequence(value: Any, place: Place) -> None:
        if not isinstance(value, str):
            faults.add(place, "expected a string")
            return
        try:
            tokenize([value], masks=action == "predict")
        except InvalidSequence as error:
            faults.add(place, error.reason)

    known: dict[str, dict[str, Callable[[Any, Place], None]]] = {
        "encode": {
            "repr_layers": lambda value, place: faults.list_of(value, place, layer, _MAX_LIST),
            "include": lambda value, place: faults.list_of(
                value, place, lambda v, p: faults.one_of(v, p, _INCLUDE_NAMES), _MAX_LIST, 1
            ),
        },
        "predict": {"positions": lambda value, place: faults.one_of(value, place, POSITIONS)},
        "log_prob": {},
    }
    faults.fields(
        document,
        (),
        {
            "params": lambda value, place: faults.fields(value, place, known[action]),
            "items": lambda value, place: faults.list_of(
                value, place, lambda v, p: faults.fields(v, p, {"sequence": sequence}, "sequence"), MAX_ITEMS, 1
            ),
        },
        required="items",
    )
    if faults.found:
        raise invalid(faults.found)
    params = document.get("params", {})
    sequences = [item["sequence"] for item in document["items"]]
    if action == "encode":
        layers = tuple(check_layers(params.get("repr_layers", [-1]), num_layers))
        return Work(action, sequences, layers, check_includes(params.get("include", ["mean"])))
    return Work(action, sequences, positions=params.get("positions", "all"))


def request_schema(slug: str, action: str, num_layers: int) -> dict[str, Any]:
    """JSON Schema of a request's body; clients read `properties.items.maxItems`."""
    token = f"(?:[{PREDICT_LETTERS}]|{MASK_TOKEN})"
    sequence = (
        {
            "minLength": len(MASK_TOKEN),
            "maxLength": MAX_RESIDUES * len(MASK_TOKEN),
            "pattern": f"^{token}*{MASK_TOKEN}{token}*$",
        }
        if action == "predict"
        else {"minLength": 1, "maxLength": MAX_RESIDUES, "pattern": f"^[{ENCODE_LETTERS}]+$"}
    )
    item = {
        "type": "object",
        "additionalProperties": False,
        "required": ["sequence"],
        "properties": {"sequence": {"type": "string", **sequence}},
    }
    layers = {"type": "integer", "minimum": -(num_layers + 1), "maximum": num_layers}
    params: dict[str, dict[str, Any]] = {
        "encode": {
            "repr_layers": {"type": "array", "items": layers, "default": [-1], "maxItems": _MAX_LIST},
            "include": {
                "type": "array",
                "items": {"type": "string", "enum": list(_INCLUDE_NAMES)},
                "default": ["mean"],
                "minItems": 1,
                "maxItems": _MAX_LIST,
            },
        },
        "predict": {"positions": {"type": "string", "enum": list(POSITIONS), "default": "all"}},
        "log_prob": {},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{slug} {action}",
        "type": "object",
        "additionalProperties": False,
        "required": ["items"],
        "properties": {
            "params": {"type": "object", "additionalProperties": False, "properties": params[action]},
            "items": {"type": "array", "items": item, "minItems": 1, "maxItems": MAX_ITEMS},
        },
    }
