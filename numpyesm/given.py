"""Batches of texts in the forms that callers pass: lists, generators, mappings from ids, Series, one-column frames.

Objects of pandas, polars, pyarrow and NumPy are recognised by their attributes; nothing is imported for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import InvalidMutation, InvalidSequence
from .printable import listed

# Frames of one column belong here too; they have no common type.
Sequences = Iterable[str] | Mapping[Any, str]
# What batches may hold, and the error of one that cannot be read.
_ERRORS: dict[str, type[InvalidSequence | InvalidMutation]] = {
    "sequence": InvalidSequence,
    "mutation": InvalidMutation,
}


def labelled(given: Any, what: str = "sequence") -> Iterator[tuple[str | None, Any]]:
    """Pair each item with its id, or with None where the container has no ids.

    `given` is a mapping from ids to texts; a Series, whose labels are ids if they are strings; an array or a frame of
    one column; or any iterable that has an order. `what` is "sequence" or "mutation". Nothing is read ahead: a
    generator may be endless, and items are not looked at. InvalidSequence or InvalidMutation: at once, if `given` is a
    single text, has no order, has several columns, or cannot be iterated over.
    """
    kind, error = type(given).__name__, _ERRORS[what]
    if isinstance(given, str | bytes | bytearray):
        raise error(f"expected a list of {what}s, got one {kind}; put it into a list: [{what}]")
    if isinstance(given, set | frozenset):
        raise error(f"expected a list of {what}s, got a {kind}, which has no order: results could not be matched to it")
    if hasattr(given, "toarray"):
        raise error(f"sparse data are not supported: expected {what}s as text")
    if isinstance(given, Mapping):
        return ((str(key), value) for key, value in given.items())
    column = _column(given, what)
    index = getattr(column, "index", None)
    try:
        if index is None or callable(index):  # lists and tuples have a method of this name
            return ((None, item) for item in column)
        return ((label if isinstance(label, str) else None, item) for label, item in zip(index, column, strict=True))
    except TypeError:
        raise error(f"expected a list of {what}s, got {kind}") from None


def texts(given: Any, what: str = "sequence") -> list[Any]:
    """Return all items of `given`, see `labelled`; an item that has an id must be text."""
    items: list[Any] = []
    for label, item in labelled(given, what):
        if label is not None and not isinstance(item, str):
            raise _ERRORS[what](f"{label[:80]!r}: expected a string, got {type(item).__name__}", item=len(items))
        items.append(item)
    return items


def _column(given: Any, what: str) -> Any:
    """Reduce a frame or an array to its one column; return anything else unchanged."""
    shape, error = getattr(given, "shape", None), _ERRORS[what]
    if hasattr(given, "columns") and isinstance(shape, tuple) and len(shape) == 2:
        names = list(getattr(given, "column_names", given.columns))
        if len(names) != 1:
            found = f"a frame of {len(names)} ({listed(map(repr, names))})"
            raise error(f"expected one column of {what}s, got {found}: choose one of them")
        given = given[names[0]]
    elif isinstance(shape, tuple) and len(shape) != 1:
        if len(shape) != 2:
            raise error(f"expected a list of {what}s, got an array of {len(shape)} dimensions")
        if shape[1] != 1:
            raise error(f"expected one column of {what}s, got {shape[1]}")
        given = given[:, 0]
    return given.to_pylist() if hasattr(given, "to_pylist") else given  # pyarrow's own scalars are not strings
