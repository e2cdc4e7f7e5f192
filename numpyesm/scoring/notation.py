"""Mutations as people write them: `A42G`, `A42G:V50L`, `WT`, `p.Ala42Gly` (HGVS); and whether they fit a wild type."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..alphabet import AMINO_ACIDS, check_letters, letter_hint
from ..errors import InvalidMutation, InvalidOption, InvalidSequence
from ..options import whole_number

_SUBSTITUTION = re.compile(r"([A-Z])(-?[0-9]{1,9})([A-Z=])")
_THREE_LETTERS = re.compile(r"([A-Za-z]{3})(-?[0-9]{1,9})([A-Za-z]{3}|=)")
# The kind of sequence that HGVS numbers: p for a protein, the others for DNA and RNA.
_HGVS_KIND = re.compile(r"[pcgmnor]\.", re.IGNORECASE)
_WILD_TYPE_NAMES = frozenset({"wt", "_wt", "_sy", "wild-type", "wildtype", "=", "(=)", "p.=", "p.(=)"})  # some MaveDB's
_THREE_LETTER_NAMES = (
    "Ala Arg Asn Asp Cys Gln Glu Gly His Ile Leu Lys Met Phe Pro Ser Thr Trp Tyr Val Asx Glx Sec Pyl Xaa"
)
_ONE_LETTER = dict(zip(_THREE_LETTER_NAMES.split(), "ARNDCQEGHILKMFPSTWYVBZUOX", strict=True))

_UNSCORED = "cannot be scored, only substitutions can"
# Why a text is not a substitution, judged by what it looks like; the first match counts.
_LOOKS_LIKE = (
    (re.compile(r"^[cgmnor]\.|>"), "a change of DNA or RNA; give the protein's, such as p.Ala42Gly"),
    (re.compile(r"[0-9]\w*fs|frame", re.IGNORECASE), f"a frame shift {_UNSCORED}"),
    (re.compile(r"ext(Ter|[-*?0-9])", re.IGNORECASE), f"an extension {_UNSCORED}"),
    (re.compile(r"del.*ins|indel", re.IGNORECASE), f"a deletion with insertion {_UNSCORED}"),
    (re.compile(r"del|-$|^[Δ∆]", re.IGNORECASE), f"a deletion {_UNSCORED}"),
    (re.compile(r"ins", re.IGNORECASE), f"an insertion {_UNSCORED}"),
    (re.compile(r"dup", re.IGNORECASE), f"a duplication {_UNSCORED}"),
    (re.compile(r"\*|[0-9](Ter|Stop)|^Ter[0-9]", re.IGNORECASE), "a stop codon cannot be scored"),
    (re.compile(r"^[A-Z][a-z]{2}[0-9]+X$"), "X, a stop codon in older HGVS, cannot be scored"),
    (re.compile(r"\?$|^\(?0\)?$"), "the effect on the protein is not known"),
    (re.compile(r"[]^]|\(;\)"), "expected one protein, not several alleles or possibilities"),
    (re.compile(r"[A-Za-z]-?[0-9]+[A-Za-z]+\s*[,;/+_&| ]"), "several substitutions are joined by ':', as in A42G:V50L"),
    (re.compile(r"^[a-z]-?[0-9]+[a-zA-Z]$|^[A-Z]-?[0-9]+[a-z]$"), "write it in upper case"),
)


class Substitution(NamedTuple):
    """`A42G`: the letter of the wild type, the position as it is numbered there, the new letter."""

    wild: str
    position: int
    mutant: str

    def __str__(self) -> str:
        return f"{self.wild}{self.position}{self.mutant}"


def parse_mutant(mutation: object, item: int | None = None) -> tuple[Substitution, ...]:
    """Parse the substitutions of one mutant; none for the wild type.

    Parameters
    ----------
    mutation : str
        `A42G`, several joined by `:`, or `WT`; or in HGVS, such as `p.Ala42Gly`, `p.[Ala42Gly;Val50Leu]`, `p.Ala42=`.
    item : int, optional
        Its place in the caller's list, for the error.

    Raises
    ------
    InvalidMutation
        It cannot be read (stop codons, insertions, deletions and frame shifts are named), one of its letters is not an
        amino acid, or it changes one position twice.
    """
    if not isinstance(mutation, str):
        raise InvalidMutation(f"expected text such as A42G, got {mutation!r}", item=item)
    text = mutation.strip()
    if not text:
        raise InvalidMutation("the mutation is empty; write WT for the wild type", item=item)
    if text.lower() in _WILD_TYPE_NAMES:
        return ()
    found: list[Substitution] = []
    for part in _parts(text):
        substitution = _substitution(part)
        if substitution is None:
            raise InvalidMutation(f"{part[:40]!r} is not a substitution: {_meant(part)}", item=item, mutation=text)
        if substitution.mutant not in AMINO_ACIDS:
            problem = f"{substitution}: {substitution.mutant} is not one of the 20 amino acids"
        elif any(substitution.position == other.position for other in found):
            problem = f"position {substitution.position} is changed twice"
        else:
            found.append(substitution)
            continue
        raise InvalidMutation(problem, item=item, mutation=text, position=substitution.position)
    return tuple(found)


def _parts(text: str) -> list[str]:
    """Split into single changes, without what HGVS puts around them: a reference, `p.`, brackets for "predicted"."""
    text = text.replace("%3D", "=")  # as Ensembl's VEP writes it
    reference, _, change = text.partition(":")
    if _HGVS_KIND.match(change.lstrip()) and not _HGVS_KIND.match(reference) and _substitution(reference) is None:
        text = change
    parts: list[str] = []
    for part in text.split(":"):
        inner = re.sub(r"^\s*[pP]\.", "", part).strip()
        several = None if "(;)" in inner else re.fullmatch(r"\(?\[([^][]*)\]\)?", inner)
        changes = several[1].split(";") if several else [inner]
        parts += [re.sub(r"\A\(([^(]*)\)\Z", r"\1", change.strip()) for change in changes]
    return parts


def _meant(part: str) -> str:
    """Say why a part is not a substitution."""
    for pattern, hint in _LOOKS_LIKE:
        if pattern.search(part):
            return hint
    strange = re.search(r"[^\x00-\x7f]", part)
    return letter_hint(strange[0])[2:-1] if strange else "expected one such as A42G or p.Ala42Gly"


def _substitution(part: str) -> Substitution | None:
    """Parse `A42G`, `Ala42Gly`, `A42=` or `Ala42=`; None if it is none of these."""
    if match := _THREE_LETTERS.fullmatch(part):
        wild = _ONE_LETTER.get(match[1].capitalize())
        mutant = wild if match[3] == "=" else _ONE_LETTER.get(match[3].capitalize())
        return Substitution(wild, int(match[2]), mutant) if wild and mutant else None
    if match := _SUBSTITUTION.fullmatch(part):
        return Substitution(match[1], int(match[2]), match[1] if match[3] == "=" else match[3])
    return None


def check_wild_type(wild_type: object) -> str:
    """Return a wild type of `ACDEFGHIKLMNPQRSTVWY` and `BXZUO`, of any length, or raise InvalidSequence."""
    if not isinstance(wild_type, str):
        raise InvalidSequence(f"the wild type: expected a string, got {type(wild_type).__name__}")
    if not wild_type:
        raise InvalidSequence("the wild type is empty")
    try:
        check_letters(wild_type, besides="")
    except InvalidSequence as error:
        reason = f"the wild type: {error.reason}"
        raise InvalidSequence(reason, position=error.position, character=error.character) from None
    return wild_type


def check_offset(offset: object) -> int:
    """Return the position of the first residue, a whole number, or raise InvalidOption."""
    number = whole_number(offset)
    if number is None:
        raise InvalidOption(f"offset={offset!r}: expected a whole number, the position of the first residue")
    return number


def check_fit(
    wild_type: str,
    mutant: Sequence[Substitution],
    offset: int,
    item: int | None = None,
    others: Sequence[Sequence[Substitution]] = (),
) -> None:
    """Raise InvalidMutation unless the mutant fits the wild type; `others` help to guess the offset."""
    for substitution in mutant:
        wild, position, _ = substitution
        index = position - offset
        if not 0 <= index < len(wild_type):
            problem = (
                f"position {position} is outside the wild type, whose positions are "
                f"{offset} to {offset + len(wild_type) - 1} with offset {offset}"
            )
        elif wild_type[index] != wild:
            problem = f"the wild type has {wild_type[index]} at position {position}, not {wild}"
        else:
            continue
        raise InvalidMutation(
            f"{substitution}: {problem}{_offset_hint(wild_type, others or [mutant])}",
            item=item,
            mutation=":".join(map(str, mutant)),
            position=position,
        )


def mutated(wild_type: str, mutant: Iterable[Substitution], offset: int) -> str:
    """Return the sequence of a mutant that fits the wild type."""
    letters = list(wild_type)
    for one in mutant:
        letters[one.position - offset] = one.mutant
    return "".join(letters)


def check_same_terms(mutant: Sequence[Substitution], item: int | None = None) -> None:
    """Raise InvalidMutation if `log-prob` would compare sums over different numbers of residues."""
    for one in mutant:
        if one.wild not in AMINO_ACIDS:
            raise InvalidMutation(
                f"{one}: {one.wild} is not one of the 20 amino acids, and only these count in 'log-prob': with "
                f"{one.mutant} the mutant's sum has one term more than the wild type's; choose another method",
                item=item,
                mutation=":".join(map(str, mutant)),
                position=one.position,
            )


def _offset_hint(wild_type: str, mutants: Sequence[Sequence[Substitution]]) -> str:
    """Name in brackets the only offset at which all mutations fit; empty if there is none, or several."""
    letters = {position: wild for mutant in mutants for wild, position, _ in mutant}
    if len(letters) < 3:  # a letter or two fit somewhere by chance
        return ""
    fitting = [
        offset
        for offset in range(max(letters) - len(wild_type) + 1, min(letters) + 1)
        if all(wild_type[position - offset] == wild for position, wild in letters.items())
    ]
    return f" (all mutations fit with offset {fitting[0]})" if len(fitting) == 1 else ""
