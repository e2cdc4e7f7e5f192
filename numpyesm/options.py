"""What a caller may ask of `encode`: layers and includes, checked once for every door."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from .errors import InvalidOption

INCLUDES = ("mean", "per_token", "bos", "contacts", "logits", "attentions")
BY_LAYER = frozenset({"mean", "per_token", "bos"})
POSITIONS = ("all", "masked")
SCORING_METHODS = ("masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl")
SCAN_METHODS = SCORING_METHODS[:2]


def check_includes(include: Iterable[str]) -> frozenset[str]:
    """The outputs asked for, `per_residue` read as `per_token`."""
    if isinstance(include, str):
        raise InvalidOption(f"include={include!r}: expected a list, such as [{include!r}]")
    try:
        names = list(include)
    except TypeError:
        raise InvalidOption(f"include={include!r}: expected a list of {', '.join(INCLUDES)}") from None
    if not names:
        raise InvalidOption(f"include is empty: ask for at least one of {', '.join(INCLUDES)}")
    for name in names:
        if not isinstance(name, str) or name not in (*INCLUDES, "per_residue"):
            raise InvalidOption(f"include has {name!r}: allowed are {', '.join(INCLUDES)} (per_residue is per_token)")
    return frozenset("per_token" if name == "per_residue" else name for name in names)


def check_layers(repr_layers: Iterable[int], num_layers: int) -> list[int]:
    """Layers as 0 to num_layers, ascending, once each; negative ones count from the end (-1 is the last)."""
    try:
        layers = list(repr_layers)
    except TypeError:
        raise InvalidOption(f"repr_layers={repr_layers!r}: expected a list of layers, such as [-1]") from None
    resolved = set()
    for layer in layers:
        try:
            number = operator.index(layer)
        except TypeError:
            number = None
        if number is None or isinstance(layer, bool):
            raise InvalidOption(f"repr_layers has {layer!r}: layers are whole numbers")
        if not -(num_layers + 1) <= number <= num_layers:
            raise InvalidOption(
                f"repr_layers has {number}: this model has {num_layers} layers, "
                f"allowed are {-(num_layers + 1)} to {num_layers} (0 is the embedding, -1 the last layer)"
            )
        resolved.add(number % (num_layers + 1))
    return sorted(resolved)


def check_positions(positions: str) -> str:
    """`all` or `masked`."""
    if positions not in POSITIONS:
        raise InvalidOption(f"positions={positions!r}: allowed are all, masked")
    return positions
