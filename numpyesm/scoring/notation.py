"""Mutations as people write them: `A42G`, `A42G:V50L`, `WT`; and whether they fit a wild type."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..alphabet import AMINO_ACIDS, PREDICT_LETTERS
from ..errors import InvalidMutation, InvalidOption, InvalidSequence
from ..given import texts

_SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]{1,9})([A-Z])")
_WILD_TYPE_NAMES = frozenset({"wt", "_wt", "wild-type", "wildtype"})

# Why a text is no substitution, by what it looks like; the first that fits is said.
_LOOKS_LIKE = (
    (re.compile(r"\*|Ter|Stop", re.IGNORECASE), "a stop codon has no score"),
    (
        re.compile(r"del|ins|dup|fs|-$|\?$", re.IGNORECASE),
        "insertions and deletions have no score, substitutions only",
    ),
    (re.compile(r"^p\.|^[A-Z][a-z]{2}-?[0-9]+[A-Z][a-z]{2}$"), "write one-letter codes, without 'p.'"),
    (re.compile(r"[A-Za-z]-?[0-9]+[A-Za-z]\s*[,;/+_&| ]"), "several substitutions are joined by ':', as A42G:V50L"),
    (re.compile(r"^[a-z]-?[0-9]+[a-zA-Z]$|^[A-Z]-?[0-9]+[a-z]$"), "write it in upper case"),
)


class Substitution(NamedTuple):
    """`A42G`: the letter of the wild type, the position as it is numbered there, the new letter."""

    wild: str
    position: int
    mutant: str

    def __str__(self) -> str:
        return f"{self.wild}{self.position}{self.mutant}"


class Change(NamedTuple):
    """A substitution that has been found to fit: 0-based place in the wild type, and both letters."""

    at: int
    wild: str
    mutant: str


def parse_mutant(mutation: object, item: int | None = None) -> tuple[Substitution, ...]:
    """The substitutions of one mutant; none for `WT`.

    Parameters
    ----------
    mutation : str
        `A42G`, several joined by `:`, or `WT`.
    item : int, optional
        Its place in the caller's list, for the error.

    Raises
    ------
    InvalidMutation
        It cannot be read, it names a letter that is no amino acid, or it changes one position twice.
    """
    if not isinstance(mutation, str):
        raise InvalidMutation(f"expected text such as A42G, got {mutation!r}", item=item)
    text = mutation.strip()
    if not text:
        raise InvalidMutation("the mutation is empty; write WT for the wild type", item=item)
    if text.lower() in _WILD_TYPE_NAMES:
        return ()
    found: list[Substitution] = []
    for part in text.split(":"):
        match = _SUBSTITUTION.fullmatch(part.strip())
        if match is None:
            hint = next((hint for pattern, hint in _LOOKS_LIKE if pattern.search(part)), "expected one such as A42G")
            raise InvalidMutation(f"{part[:40]!r} is no substitution: {hint}", item=item, mutation=text)
        substitution = Substitution(match[1], int(match[2]), match[3])
        if substitution.mutant not in AMINO_ACIDS:
            raise InvalidMutation(
                f"{substitution}: {substitution.mutant} is none of the 20 amino acids",
                item=item,
                mutation=text,
                position=substitution.position,
            )
        if any(substitution.position == other.position for other in found):
            raise InvalidMutation(
                f"position {substitution.position} is changed twice",
                item=item,
                mutation=text,
                position=substitution.position,
            )
        found.append(substitution)
    return tuple(found)


def check_wild_type(wild_type: object) -> str:
    """A wild type of `ACDEFGHIKLMNPQRSTVWY` and `BXZUO`, of any length, or InvalidSequence."""
    if not isinstance(wild_type, str):
        raise InvalidSequence(f"the wild type: expected a string, got {type(wild_type).__name__}")
    if not wild_type:
        raise InvalidSequence("the wild type is empty")
    for position, letter in enumerate(wild_type, start=1):
        if letter not in PREDICT_LETTERS:
            hint = " (lower case; write it in upper case)" if letter.upper() in PREDICT_LETTERS else ""
            raise InvalidSequence(
                f"the wild type: {letter!r} at position {position} is not allowed{hint}; "
                "expected one of ACDEFGHIKLMNPQRSTVWY, BXZUO",
                position=position,
                character=letter,
            )
    return wild_type


def check_offset(offset: object) -> int:
    """A whole number: the position that the first residue has."""
    try:
        number = operator.index(offset)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(offset, bool):
        raise InvalidOption(f"offset={offset!r}: expected a whole number, the position of the first residue")
    return number


def read_mutants(wild_type: str, mutations: Iterable[object], offset: int) -> list[tuple[Change, ...]]:
    """All mutants as changes of the wild type.

    Raises
    ------
    InvalidMutation
        Names the item, the mutation and the position.
    """
    parsed = [
        parse_mutant(mutation, item) for item, mutation in enumerate(texts(mutations, "mutation", InvalidMutation))
    ]
    return [fit_mutant(wild_type, mutant, offset, item, parsed) for item, mutant in enumerate(parsed)]


def fit_mutant(
    wild_type: str,
    mutant: Sequence[Substitution],
    offset: int,
    item: int | None = None,
    others: Sequence[Sequence[Substitution]] = (),
) -> tuple[Change, ...]:
    """The mutant as changes of the wild type, or InvalidMutation; `others` are for a hint at the right offset."""
    changes = []
    for substitution in mutant:
        wild, position, letter = substitution
        index = position - offset
        if not 0 <= index < len(wild_type):
            problem = (
                f"position {position} is outside of the wild type, whose positions are "
                f"{offset} to {offset + len(wild_type) - 1} with offset {offset}"
            )
        elif wild_type[index] != wild:
            problem = f"the wild type has {wild_type[index]} at position {position}, not {wild}"
        else:
            changes.append(Change(index, wild, letter))
            continue
        raise InvalidMutation(
            f"{substitution}: {problem}{_offset_hint(wild_type, others or [mutant])}",
            item=item,
            mutation=":".join(map(str, mutant)),
            position=position,
        )
    return tuple(changes)


def apply_changes(wild_type: str, changes: Iterable[Change]) -> str:
    """The mutated sequence."""
    letters = list(wild_type)
    for change in changes:
        letters[change.at] = change.mutant
    return "".join(letters)


def check_same_terms(changes: Sequence[Change], offset: int, item: int | None = None) -> None:
    """Raise InvalidMutation if `log-prob` would compare sums over different numbers of residues."""
    substitutions = [Substitution(wild, at + offset, mutant) for at, wild, mutant in changes]
    for substitution in substitutions:
        wild, position, letter = substitution
        if wild not in AMINO_ACIDS:
            raise InvalidMutation(
                f"{substitution}: {wild} is none of the 20 amino acids, which alone count in 'log-prob': with {letter} "
                "the mutant's sum has a term that the wild type's has not; choose another method",
                item=item,
                mutation=":".join(map(str, substitutions)),
                position=position,
            )


def _offset_hint(wild_type: str, mutants: Sequence[Sequence[Substitution]]) -> str:
    """The one offset with which all mutations fit, in brackets; empty if there is none, or several."""
    letters = {position: wild for mutant in mutants for wild, position, _ in mutant}
    if len(letters) < 3:  # a letter or two fit somewhere by chance
        return ""
    first, last = min(letters), max(letters)
    if last - first >= len(wild_type):
        return ""
    fitting = [
        offset
        for offset in range(last - len(wild_type) + 1, first + 1)
        if all(wild_type[position - offset] == wild for position, wild in letters.items())
    ]
    return f" (all mutations fit with offset {fitting[0]})" if len(fitting) == 1 else ""
