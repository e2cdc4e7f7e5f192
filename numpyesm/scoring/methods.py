"""Score mutants in four ways, as fair-esm and ProteinGym define them, where they do; or every substitution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..alphabet import TOKEN_ID, tokenize, warn_of_odd_sequences
from ..config import MAX_RESIDUES
from ..errors import InvalidSequence
from ..given import texts
from ..options import SCAN_METHODS, SCORING_METHODS, one_of, require_head
from .marginals import FloatArray, Progress, check_window, position_logits, pseudo_log_likelihoods
from .notation import Substitution, check_fit, check_offset, check_same_terms, check_wild_type, mutated, parse_mutant

if TYPE_CHECKING:
    from ..passes import Passes

# Columns of a scan: the alphabet's order, not the model's.
SCAN_LETTERS = "ACDEFGHIKLMNPQRSTVWY"
# Sequences whose logits are held at a time by `log-prob`.
_SEQUENCES_AT_A_TIME = 256


@dataclass(eq=False)
class MutationScan:
    """Scores of all single substitutions of one protein.

    Attributes
    ----------
    wild_type : str
        L residues.
    offset : int
        Position of the first of them.
    method : str
    scores : ndarray (L, 20) float64
        log p(column's amino acid) - log p(wild type's), 0 for the wild type's own letter; columns as `amino_acids`.
    """

    wild_type: str
    offset: int
    method: str
    scores: FloatArray

    @property
    def amino_acids(self) -> str:
        """The columns: `ACDEFGHIKLMNPQRSTVWY`."""
        return SCAN_LETTERS

    @property
    def positions(self) -> list[int]:
        """Of the rows, counted from `offset`."""
        return list(range(self.offset, self.offset + len(self.wild_type)))


def score_mutations(
    passes: Passes,
    wild_type: str,
    mutations: Iterable[str],
    method: str = "masked-marginals",
    *,
    offset: int = 1,
    window: int | str | None = None,
    progress: Progress = None,
) -> FloatArray:
    """Compute one number per mutant; see `ESM2.score_mutations`."""
    one_of("method", method, SCORING_METHODS)
    wild_type = check_wild_type(wild_type)
    offset = check_offset(offset)
    mutants = [parse_mutant(mutation, item) for item, mutation in enumerate(texts(mutations, "mutation"))]
    for item, mutant in enumerate(mutants):
        check_fit(wild_type, mutant, offset, item, mutants)
    seen = check_window(window, len(wild_type), method)
    if method == "log-prob":
        length = len(wild_type)
        if seen.size < length:
            most = f"at most {MAX_RESIDUES} are allowed" if length > MAX_RESIDUES else f"the window {seen.size}"
            raise InvalidSequence(
                f"method 'log-prob' takes the whole sequence in one pass: the wild type has {length} residues, {most}"
            )
        for item, mutant in enumerate(mutants):
            check_same_terms(mutant, item)
    require_head(passes.checkpoint, "score_mutations")
    warn_of_odd_sequences([wild_type])
    if method in SCAN_METHODS:
        # A42A is worth 0 and needs no pass.
        positions = sorted({one.position for mutant in mutants for one in mutant if one.mutant != one.wild})
        indices = [position - offset for position in positions]
        logits = position_logits(passes, wild_type, indices, method, seen, progress)
        return _marginals(mutants, dict(zip(positions, logits, strict=True)))
    sequences = [mutated(wild_type, mutant, offset) for mutant in mutants]
    if method == "pseudo-ppl":
        distinct = list(dict.fromkeys(sequences))
        found = dict(zip(distinct, pseudo_log_likelihoods(passes, distinct, seen, progress), strict=True))
        return np.array([found[sequence] for sequence in sequences], np.float64)
    # The wild type is worth 0 even where it has no amino acid that counts.
    distinct = list(dict.fromkeys([wild_type, *sequences]))
    found = dict(zip(distinct, _log_probs(passes, distinct, progress), strict=True)) if mutants else {}
    return np.array([found[one] - found[wild_type] if one != wild_type else 0.0 for one in sequences], np.float64)


def scan_mutations(
    passes: Passes,
    wild_type: str,
    method: str = "masked-marginals",
    *,
    offset: int = 1,
    window: int | str | None = None,
    progress: Progress = None,
) -> MutationScan:
    """Score all single substitutions; see `ESM2.scan_mutations`."""
    one_of("method", method, SCAN_METHODS)
    wild_type = check_wild_type(wild_type)
    offset = check_offset(offset)
    seen = check_window(window, len(wild_type), method)
    require_head(passes.checkpoint, "scan_mutations")
    warn_of_odd_sequences([wild_type])
    length = len(wild_type)
    logits = position_logits(passes, wild_type, range(length), method, seen, progress)
    own = logits[np.arange(length), [TOKEN_ID[letter] for letter in wild_type]]
    scores = logits[:, [TOKEN_ID[letter] for letter in SCAN_LETTERS]] - own[:, None]
    return MutationScan(wild_type, offset, method, scores)


def _marginals(mutants: Sequence[Sequence[Substitution]], logits: Mapping[int, FloatArray]) -> FloatArray:
    """Σ log p(mutant letter) - log p(wild letter): a difference of logits, whatever the softmax covers."""
    scores = np.zeros(len(mutants))
    for i, mutant in enumerate(mutants):
        for wild, position, letter in mutant:
            if letter != wild:
                scores[i] += logits[position][TOKEN_ID[letter]] - logits[position][TOKEN_ID[wild]]
    return scores


def _log_probs(passes: Passes, sequences: Sequence[str], progress: Progress) -> FloatArray:
    scores = np.empty(len(sequences))
    for start in range(0, len(sequences), _SEQUENCES_AT_A_TIME):
        chunk = sequences[start : start + _SEQUENCES_AT_A_TIME]
        scores[start : start + len(chunk)] = passes.log_prob(tokenize(chunk))
        if progress is not None:
            progress(start + len(chunk), len(sequences))
    return scores
