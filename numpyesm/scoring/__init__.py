"""Scores of mutations: of a substitution, of several at once, of every one a protein can have."""

from .correlation import spearman
from .methods import SCAN_LETTERS, MutationScan, scan_mutations, score_mutations
from .notation import Substitution, parse_mutant

__all__ = [
    "SCAN_LETTERS",
    "MutationScan",
    "Substitution",
    "parse_mutant",
    "scan_mutations",
    "score_mutations",
    "spearman",
]
