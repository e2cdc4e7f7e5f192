"""Check what a caller asks of a model, once for every door."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InvalidOption, MissingHead

if TYPE_CHECKING:
    from .config import Classifier
    from .weights.checkpoint import Checkpoint

INCLUDES = ("mean", "per_token", "bos", "contacts", "logits", "attentions", "classes")
BY_LAYER = frozenset({"mean", "per_token", "bos"})
POSITIONS = ("all", "masked")
PRECISIONS = ("fp32", "bf16", "int8")
BACKENDS = ("auto", "numpy", "compiled")
# An old name that stays valid, and what it means.
BACKEND_ALIASES = {"numba": "compiled"}
SCORING_METHODS = ("masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl")
SCAN_METHODS = SCORING_METHODS[:2]
# The head that an output, or a method of the model, needs; those that are not here need none.
_HEADS = {
    **dict.fromkeys(("logits", "predict", "log_prob", "score_mutations", "scan_mutations"), "LM head"),
    "contacts": "contact head",
    **dict.fromkeys(("classes", "classify"), "classification head"),
}


@dataclass(frozen=True)
class Outputs:
    """The outputs that a request wants for each of its sequences."""

    include: tuple[str, ...]  # in the order of `INCLUDES`; empty if nothing is wanted
    layers: tuple[int, ...] = ()  # of the embeddings, ascending, 0 to the number of layers

    @classmethod
    def check(
        cls, checkpoint: Checkpoint, repr_layers: Iterable[int], include: Iterable[str], *, allow_nothing: bool = False
    ) -> Outputs:
        """Check a request, as for `ESM2.encode`, against the model that will answer it.

        With `allow_nothing`, `include` may be empty, and embeddings are left out if `repr_layers` is. InvalidOption for
        a layer out of range, an unknown include, or nothing asked for; MissingHead for logits, contacts or classes of
        weights that have no such head.
        """
        wanted = check_includes(include, allow_nothing=allow_nothing)
        layers = check_layers(repr_layers, checkpoint.config.num_layers)
        if not layers and allow_nothing:
            wanted -= BY_LAYER
        names = tuple(name for name in INCLUDES if name in wanted)
        if not layers and wanted & BY_LAYER:
            embeddings = ", ".join(name for name in names if name in BY_LAYER)
            raise InvalidOption(f"repr_layers is empty, but include asks for {embeddings}: name at least one layer")
        for name in names:
            require_head(checkpoint, name)
        return cls(names, tuple(layers))

    @property
    def by_layer(self) -> tuple[int, ...]:
        """Layers whose embeddings are wanted."""
        return self.layers if BY_LAYER & set(self.include) else ()


def missing_head(checkpoint: Checkpoint, name: str) -> str | None:
    """Name the head that an output or a method needs and the weights lack; None if nothing is missing."""
    present = {
        "LM head": checkpoint.has_lm_head,
        "contact head": checkpoint.has_contact_head,
        "classification head": checkpoint.config.classifier is not None,
    }
    head = _HEADS.get(name)
    return None if head is None or present[head] else head


def require_head(checkpoint: Checkpoint, name: str) -> None:
    """Raise MissingHead if the weights lack the head that an output or a method needs."""
    head, config = missing_head(checkpoint, name), checkpoint.config
    if head is None:
        return
    reason = f"have no {head}"
    if config.whole_layers is not None:
        reason = f"are the first {config.num_layers} of {config.whole_layers} layers, and the {head} needs all of them"
    raise MissingHead(f"{name}: the weights ({checkpoint.source}) {reason}")


def require_classifier(checkpoint: Checkpoint) -> Classifier:
    """Describe the classification head; MissingHead if the weights have none."""
    require_head(checkpoint, "classify")
    assert checkpoint.config.classifier is not None
    return checkpoint.config.classifier


def check_includes(include: Iterable[str], *, allow_nothing: bool = False) -> frozenset[str]:
    """Return the outputs asked for; `per_residue` means `per_token`."""
    if isinstance(include, str):
        raise InvalidOption(f"include={include!r}: expected a list, such as [{include!r}]")
    try:
        names = list(include)
    except TypeError:
        raise InvalidOption(f"include={include!r}: expected a list of {', '.join(INCLUDES)}") from None
    if not names and not allow_nothing:
        raise InvalidOption(f"include is empty: ask for at least one of {', '.join(INCLUDES)}")
    for name in names:
        if not isinstance(name, str) or name not in (*INCLUDES, "per_residue"):
            raise InvalidOption(f"include has {name!r}: expected {', '.join(INCLUDES)} (per_residue means per_token)")
    return frozenset("per_token" if name == "per_residue" else name for name in names)


def whole_number(value: object) -> int | None:
    """Return a whole number of any integer type as an int; None for anything else, True and False included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def number_within(option: str, value: object, least: int, most: int | None = None) -> int:
    """Return the value of an option that is a whole number; InvalidOption if it is not, or out of range."""
    number = whole_number(value)
    if number is None or number < least or (most is not None and number > most):
        to = "" if most is None else f" to {most}"
        raise InvalidOption(f"{option}={value!r}: expected a whole number from {least}{to}")
    return number


def check_layers(repr_layers: Iterable[int], num_layers: int) -> list[int]:
    """Return the layers as numbers from 0 to num_layers, ascending, without duplicates; -1 is the last layer."""
    try:
        layers = list(repr_layers)
    except TypeError:
        raise InvalidOption(f"repr_layers={repr_layers!r}: expected a list of layers, such as [-1]") from None
    resolved = set()
    for layer in layers:
        number = whole_number(layer)
        if number is None:
            raise InvalidOption(f"repr_layers has {layer!r}: layers are whole numbers")
        if not -(num_layers + 1) <= number <= num_layers:
            raise InvalidOption(
                f"repr_layers has {number}: this model has {num_layers} layers, "
                f"expected {-(num_layers + 1)} to {num_layers} (0 is the embedding, -1 the last layer)"
            )
        resolved.add(number % (num_layers + 1))
    return sorted(resolved)


def check_precision(precision: str) -> str:
    """Return `precision`, or raise InvalidOption if it is unknown."""
    return one_of("precision", precision, PRECISIONS)


def check_backend(backend: str) -> str:
    """Return one of `BACKENDS` (`compiled` for `numba`), or raise InvalidOption."""
    return one_of("backend", BACKEND_ALIASES.get(backend, backend) if isinstance(backend, str) else backend, BACKENDS)


def one_of(option: str, value: str, allowed: Sequence[str]) -> str:
    """Return the value of an option, or raise InvalidOption if it is not among the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise InvalidOption(f"{option}={value!r}: expected one of {', '.join(allowed)}")
    return value
