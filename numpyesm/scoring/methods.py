"""The four ways to score a mutant, as fair-esm and ProteinGym define them where they have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..alphabet import TOKEN_ID, tokenize, warn_of_odd_sequences
from ..config import MAX_RESIDUES
from ..errors import InvalidOption, InvalidSequence
from ..options import SCORING_METHODS, require_lm_head
from .marginals import Progress, masked_logits, plain_logits, pseudo_log_likelihoods
from .notation import Change, apply_changes, check_offset, check_same_terms, check_wild_type, read_mutants
from .windows import Window, check_window

if TYPE_CHECKING:
    from ..passes import Passes

FloatArray = npt.NDArray[np.float64]

# Sequences whose logits are held at a time by `log-prob`.
_SEQUENCES_AT_A_TIME = 256


def score_mutations(
    passes: Passes,
    wild_type: str,
    mutations: Iterable[str],
    method: str = "masked-marginals",
    *,
    offset: int = 1,
    window: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FloatArray:
    """Compute one number per mutant; see `ESM2.score_mutations`."""
    check_method(method, SCORING_METHODS)
    wild_type = check_wild_type(wild_type)
    mutants = read_mutants(wild_type, mutations, check_offset(offset))
    seen = check_window(window, len(wild_type), method)
    if method == "log-prob":
        length = len(wild_type)
        if seen.size < length:
            raise InvalidSequence(
                f"method 'log-prob' takes the whole sequence in one pass: the wild type has {len(wild_type)} residues, "
                + (
                    f"at most {MAX_RESIDUES} are allowed"
                    if len(wild_type) > MAX_RESIDUES
                    else f"the window {seen.size}"
                )
            )
        for item, mutant in enumerate(mutants):
            check_same_terms(mutant, offset, item)
    require_lm_head(passes.checkpoint, "score_mutations")
    warn_of_odd_sequences([wild_type], stacklevel=4)
    if not mutants:
        return np.empty(0)
    if method in ("masked-marginals", "wt-marginals"):
        return _marginals(passes, wild_type, mutants, method, seen, progress)
    # Equal sequences are computed once; the wild type comes first.
    sequences = list(dict.fromkeys([wild_type, *(apply_changes(wild_type, mutant) for mutant in mutants)]))
    place = {sequence: i for i, sequence in enumerate(sequences)}
    own = [place[apply_changes(wild_type, mutant)] for mutant in mutants]
    if method == "log-prob":
        found = _log_probs(passes, sequences, progress)
        # The wild type is worth 0 even where it has no amino acid that counts.
        return np.array([found[i] - found[0] if i else 0.0 for i in own])
    if 0 not in own:
        sequences, own = sequences[1:], [i - 1 for i in own]
    total = sum(map(len, sequences))
    found = pseudo_log_likelihoods(passes, sequences, seen, counter(progress, total))
    likelihoods: FloatArray = found[np.array(own)]
    return likelihoods


def check_method(method: object, allowed: Sequence[str]) -> str:
    """Return the method, or raise InvalidOption."""
    if not isinstance(method, str) or method not in allowed:
        raise InvalidOption(f"method={method!r}: allowed are {', '.join(allowed)}")
    return method


def position_logits(
    passes: Passes, wild_type: str, indices: Sequence[int], method: str, window: Window, progress: Progress | None
) -> FloatArray:
    """Compute the logits (n, 33) that a marginal method needs at these positions."""
    compute = masked_logits if method == "masked-marginals" else plain_logits
    return compute(passes, wild_type, indices, window, progress)


def counter(progress: Callable[[int, int], None] | None, total: int) -> Progress | None:
    """Turn increments into calls of `progress(done, total)`."""
    if progress is None:
        return None
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return add


def _marginals(
    passes: Passes,
    wild_type: str,
    mutants: Sequence[Sequence[Change]],
    method: str,
    window: Window,
    progress: Callable[[int, int], None] | None,
) -> FloatArray:
    """Σ log p(mutant letter) - log p(wild letter): a difference of logits, whatever the softmax covers."""
    # A42A is worth 0 and needs no pass.
    indices = sorted({change.at for mutant in mutants for change in mutant if change.mutant != change.wild})
    logits = position_logits(passes, wild_type, indices, method, window, counter(progress, len(indices)))
    row = {index: i for i, index in enumerate(indices)}
    scores = np.zeros(len(mutants))
    for i, mutant in enumerate(mutants):
        for index, wild, letter in mutant:
            if letter != wild:
                scores[i] += logits[row[index], TOKEN_ID[letter]] - logits[row[index], TOKEN_ID[wild]]
    return scores


def _log_probs(passes: Passes, sequences: Sequence[str], progress: Callable[[int, int], None] | None) -> FloatArray:
    add = counter(progress, len(sequences))
    scores = np.empty(len(sequences))
    for start in range(0, len(sequences), _SEQUENCES_AT_A_TIME):
        chunk = sequences[start : start + _SEQUENCES_AT_A_TIME]
        scores[start : start + len(chunk)] = passes.log_prob(tokenize(chunk))
        if add is not None:
            add(len(chunk))
    return scores
