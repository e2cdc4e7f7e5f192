"""What a request may contain, and its validation: all problems are reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..alphabet import AMINO_ACIDS, ENCODE_LETTERS, MASK, MASK_TOKEN, PREDICT_LETTERS, has_amino_acid, tokenize
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..formats import Result
from ..options import INCLUDES, POSITIONS, Outputs, check_layers, missing_head
from ..results import count_numbers
from .catalog import MAX_ITEMS, ServedModel
from .errors import ApiError, Place, Problem, invalid

TokenArray: TypeAlias = npt.NDArray[np.uint8]
Schema: TypeAlias = dict[str, Any]

# Entries of `repr_layers` and of `include`.
MAX_LIST = 256
_NOTHING = Outputs(())


@dataclass(frozen=True)
class Work:
    """A checked request: what to compute.

    Attributes
    ----------
    served : ServedModel
    action : str
        One of `catalog.ACTIONS`.
    tokens : tuple of ndarray of uint8, each (residues + 2,)
    outputs : Outputs
        For `encode` (there may be none) and `classify`.
    positions : str
        `all` or `masked`, for `predict`.
    """

    served: ServedModel
    action: str
    tokens: tuple[TokenArray, ...]
    outputs: Outputs = _NOTHING
    positions: str = "all"

    @property
    def lengths(self) -> list[int]:
        """Residues of each sequence; a mask is one."""
        return [len(tokens) - 2 for tokens in self.tokens]

    def count_numbers(self) -> int:
        """How many numbers the results hold, beside one for each sequence."""
        if self.action == "predict":
            masked = self.positions == "masked"
            rows = [int((tokens == MASK).sum()) if masked else len(tokens) - 2 for tokens in self.tokens]
            return len(AMINO_ACIDS) * sum(rows)
        arrays = 2 if self.action == "classify" else 1  # logits and probabilities
        return arrays * sum(count_numbers(self.outputs, self.served.model.config, length) for length in self.lengths)

    def compute(self) -> Iterator[Result]:
        """Yield the result of each sequence, in order.

        Raises
        ------
        ApiError
            500 if a number is not finite: the weights are unusable.
        """
        for tokens, result in zip(self.tokens, self._results(), strict=True):
            if not _is_finite(tokens, result):
                raise ApiError(500, "the model gave a number that is not finite", code="server.not_finite")
            yield result

    def _results(self) -> Iterator[Result]:
        passes = self.served.model.passes
        if self.action == "encode":
            return passes.encode(self.tokens, self.outputs)
        if self.action == "predict":
            return passes.predict(self.tokens, self.positions)
        if self.action == "classify":
            return passes.classify(self.tokens)
        return iter(passes.log_prob(self.tokens).tolist())


def _is_finite(tokens: TokenArray, result: Result) -> bool:
    """Whether every number is finite; a sequence without any of the 20 amino acids has no log-probability."""
    if not isinstance(result, float):
        return all(np.isfinite(array).all() for array in result.to_arrays().values())
    return bool(np.isfinite(result)) or not has_amino_acid(tokens)


def body_schema(action: str, num_layers: int, classifies: bool) -> Schema:
    """Describe in JSON Schema what a request of `action` may contain, for clients and for `check_request`."""
    item = object_schema({"sequence": _sequence_schema(masks=action == "predict")})
    fields = {
        "params": object_schema(_params_schema(action, num_layers, classifies), required=[]),
        "items": list_schema(item, minItems=1, maxItems=MAX_ITEMS),
    }
    return object_schema(fields, required=["items"])


def object_schema(fields: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """Describe an object of these fields, all of them required by default."""
    needed = list(fields) if required is None else required
    schema = {"type": "object", "additionalProperties": False, "properties": fields, **more}
    return schema | ({"required": needed} if needed else {})


def list_schema(items: Schema, **more: Any) -> Schema:
    """Describe a list."""
    return {"type": "array", "items": items, **more}


def _params_schema(action: str, num_layers: int, classifies: bool) -> Schema:
    if action == "predict":
        text = "Logits of all residues, or of the masks only."
        return {"positions": {"enum": list(POSITIONS), "default": "all", "description": text}}
    if action != "encode":
        return {}
    names = [*(name for name in INCLUDES if classifies or name != "classes"), "per_residue"]
    # Listed one by one: JSON Schema accepts 1.0 as an integer, but a layer may not be written so.
    layers = list(range(-(num_layers + 1), num_layers + 1))
    of_layers = "Layers of the embeddings: 0 is the embedding, -1 the last layer."
    of_include = "Outputs; per_residue means per_token."
    size = {"minItems": 0, "maxItems": MAX_LIST}
    return {
        "repr_layers": list_schema({"enum": layers}, **size, default=[-1], description=of_layers),
        "include": list_schema({"enum": names}, **size, default=["mean"], description=of_include),
    }


def _sequence_schema(masks: bool) -> Schema:
    if masks:
        residue, unit = f"(?:[{PREDICT_LETTERS}]|{MASK_TOKEN})", len(MASK_TOKEN)
        pattern = f"^{residue}*{MASK_TOKEN}{residue}*$"
        letters = f"with at least one {MASK_TOKEN}, which counts as one"
    else:
        pattern, unit = f"^[{ENCODE_LETTERS}]+$", 1  # the hyphen is the last of the letters
        letters = "the 20 amino acids, B X Z U O and -, upper case"
    limits = {"minLength": unit, "maxLength": unit * MAX_RESIDUES, "pattern": pattern}
    return {"type": "string", "description": f"1 to {MAX_RESIDUES} residues, {letters}."} | limits


def check_request(served: ServedModel, action: str, document: Any) -> Work:
    """Check a decoded body.

    As in the hosted API, `include` and `repr_layers` may be empty: results then have no outputs, or no embeddings.

    Raises
    ------
    ApiError
        422; it names every item and parameter that is wrong.
    """
    reader = _Reader(served, action)
    reader.check(document, (), body_schema(action, served.model.config.num_layers, served.model.head is not None))
    if reader.problems:
        raise invalid(reader.problems)
    params, tokens = document.get("params", {}), tuple(reader.tokens)
    if action == "classify":
        return Work(served, action, tokens, Outputs(("classes",)))
    if action != "encode":
        return Work(served, action, tokens, positions=params.get("positions", "all"))
    layers, include = params.get("repr_layers", [-1]), params.get("include", ["mean"])
    return Work(served, action, tokens, Outputs.check(served.checkpoint, layers, include, allow_nothing=True))


_CALLED = {"object": "an object", "array": "a list", "string": "a string"}


class _Reader:
    """Validates a document against its schema; collects the problems, and the tokens of the sequences."""

    def __init__(self, served: ServedModel, action: str) -> None:
        self._served = served
        self._masks = action == "predict"
        self.problems: list[Problem] = []
        self.tokens: list[TokenArray] = []

    def check(self, value: Any, place: Place, schema: Schema) -> None:
        """Check a value; requests contain only these four kinds."""
        try:
            match schema.get("type"), value:
                case "object", dict():
                    self._object(value, place, schema)
                case "array", list():
                    self._list(value, place, schema)
                case "string", str():
                    self.tokens += tokenize([value], masks=self._masks)
                case None, _:
                    self._one_of(value, place, schema["enum"])
                case kind, _:
                    self._add(place, f"expected {_CALLED[kind]}")
        except InvalidSequence as error:
            self._add(place, error.reason)
        except InvalidOption as error:
            self._add(place, str(error))

    def _add(self, place: Place, message: str) -> None:
        self.problems.append((place, message))

    def _object(self, value: dict[str, Any], place: Place, schema: Schema) -> None:
        known = schema["properties"]
        for name, inner in known.items():
            if name in value:
                self.check(value[name], (*place, name), inner)
            elif name in schema.get("required", ()):
                self._add((*place, name), "this field is required")
        for name in value:
            if name not in known:
                self._add((*place, name), "unknown field")

    def _list(self, value: list[Any], place: Place, schema: Schema) -> None:
        least, most = schema["minItems"], schema["maxItems"]
        if not least <= len(value) <= most:
            self._add(place, f"at most {most} are allowed" if value else f"at least {least} is needed")
        else:
            for index, entry in enumerate(value):
                self.check(entry, (*place, index), schema["items"])

    def _one_of(self, value: Any, place: Place, allowed: list[Any]) -> None:
        if isinstance(allowed[0], int):
            if type(value) is not int:  # True is an int, and 1.0 is not a layer
                raise InvalidOption("expected a whole number")
            check_layers([value], self._served.model.config.num_layers)
        elif place[-2] == "include" and value in INCLUDES and (head := missing_head(self._served.checkpoint, value)):
            self._add(place[:-1], f"{value}: the weights of {self._served.slug} have no {head}")
        elif value not in allowed:
            *first, last = map(repr, allowed)
            self._add(place, f"expected one of {', '.join(first)} or {last}")
