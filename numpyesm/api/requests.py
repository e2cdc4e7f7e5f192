"""Checks a request's document; everything that is wrong with it is named at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..alphabet import AMINO_ACID_COLUMNS, tokenize
from ..errors import InvalidOption, InvalidSequence
from ..formats import Result
from ..options import INCLUDES, POSITIONS, Outputs, check_layers
from .catalog import MAX_ITEMS, ServedModel
from .errors import ApiError, Place, Problem, invalid

TokenArray: TypeAlias = npt.NDArray[np.uint8]
_Check: TypeAlias = Callable[[Any, Place], None]

# Entries of `repr_layers` and of `include`.
MAX_LIST = 256
_NOTHING = Outputs(())
INCLUDE_NAMES = (*INCLUDES, "per_residue")


@dataclass(frozen=True)
class Work:
    """A checked request: what is to be computed.

    Attributes
    ----------
    served : ServedModel
    action : str
        `encode`, `predict` or `log_prob`.
    tokens : tuple of ndarray of uint8, each (residues + 2,)
    outputs : Outputs
        Of `encode`; there may be none.
    positions : str
        `all` or `masked`, of `predict`.
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

    def compute(self) -> Iterator[Result]:
        """Yield the result of each sequence, in order.

        Raises
        ------
        ApiError
            500 if a number is not finite: such weights are no good.
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
        return iter(passes.log_prob(self.tokens).tolist())


def _is_finite(tokens: TokenArray, result: Result) -> bool:
    """Whether every number is finite; a sequence without any of the 20 amino acids has no log-probability."""
    if not isinstance(result, float):
        return all(np.isfinite(array).all() for array in result.to_arrays().values())
    canonical = (tokens >= AMINO_ACID_COLUMNS.start) & (tokens < AMINO_ACID_COLUMNS.stop)
    return bool(np.isfinite(result) or not canonical.any())


def check_request(served: ServedModel, action: str, document: Any) -> Work:
    """Check a decoded body.

    As in the hosted API, `include` may be empty, and so may `repr_layers`: items then have no outputs, or none of a
    layer.

    Raises
    ------
    ApiError
        422; it names every item and parameter that is wrong.
    """
    checker = _Checker(served, action)
    checker.check(document)
    if checker.problems:
        raise invalid(checker.problems)
    params = document.get("params", {})
    tokens = tuple(checker.tokens)
    if action != "encode":
        return Work(served, action, tokens, positions=params.get("positions", "all"))
    layers, include = params.get("repr_layers", [-1]), params.get("include", ["mean"])
    return Work(served, action, tokens, Outputs.check(served.checkpoint, layers, include, allow_nothing=True))


class _Checker:
    """Collects what is wrong with a document, in its order, and the tokens of its sequences."""

    def __init__(self, served: ServedModel, action: str) -> None:
        self._served = served
        self._action = action
        self.problems: list[Problem] = []
        self.tokens: list[TokenArray] = []

    def check(self, document: Any) -> None:
        params: dict[str, dict[str, _Check]] = {
            "encode": {
                "repr_layers": lambda value, place: self._list(value, place, self._layer, MAX_LIST),
                "include": lambda value, place: self._list(value, place, self._include, MAX_LIST),
            },
            "predict": {"positions": lambda value, place: self._one_of(value, place, POSITIONS)},
            "log_prob": {},
        }
        item: dict[str, _Check] = {"sequence": self._sequence}
        fields: dict[str, _Check] = {
            "params": lambda value, place: self._fields(value, place, params[self._action]),
            "items": lambda value, place: self._list(
                value, place, lambda inner, at: self._fields(inner, at, item, "sequence"), MAX_ITEMS, least=1
            ),
        }
        self._fields(document, (), fields, "items")

    def _add(self, place: Place, message: str) -> None:
        self.problems.append((place, message))

    def _fields(self, value: Any, place: Place, known: Mapping[str, _Check], required: str | None = None) -> None:
        """Check an object field by field; unknown fields are refused."""
        if not isinstance(value, dict):
            self._add(place, "expected an object")
            return
        for name, check in known.items():
            if name in value:
                check(value[name], (*place, name))
            elif name == required:
                self._add((*place, name), "this field is required")
        for name in value:
            if name not in known:
                self._add((*place, name), "unknown field")

    def _list(self, value: Any, place: Place, check: _Check, most: int, least: int = 0) -> None:
        """Check a list entry by entry."""
        if not isinstance(value, list):
            self._add(place, "expected a list")
        elif not least <= len(value) <= most:
            self._add(place, f"at most {most} are allowed" if value else f"at least {least} is needed")
        else:
            for index, entry in enumerate(value):
                check(entry, (*place, index))

    def _one_of(self, value: Any, place: Place, names: tuple[str, ...]) -> None:
        if not isinstance(value, str) or value not in names:
            *first, last = map(repr, names)
            self._add(place, f"expected one of {', '.join(first)} or {last}")

    def _include(self, value: Any, place: Place) -> None:
        self._one_of(value, place, INCLUDE_NAMES)
        checkpoint, slug = self._served.checkpoint, self._served.slug
        if value == "logits" and not checkpoint.has_lm_head:
            self._add(place[:-1], f"logits: the weights of {slug} have no LM head")
        if value == "contacts" and not checkpoint.has_contact_head:
            self._add(place[:-1], f"contacts: the weights of {slug} have no contact head")

    def _layer(self, value: Any, place: Place) -> None:
        if type(value) is not int:  # True is an int, and 1.0 is no layer
            self._add(place, "expected a whole number")
            return
        try:
            check_layers([value], self._served.model.config.num_layers)
        except InvalidOption as error:
            self._add(place, str(error))

    def _sequence(self, value: Any, place: Place) -> None:
        if not isinstance(value, str):
            self._add(place, "expected a string")
            return
        try:
            self.tokens += tokenize([value], masks=self._action == "predict")
        except InvalidSequence as error:
            self._add(place, error.reason)
