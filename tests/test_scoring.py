"""Scores of mutations: against fair-esm's own loops, and against what a mutation may be. Spearman's correlation."""

from __future__ import annotations

import math
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import random_sequence, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from numpyesm import ESM2, InvalidMutation, InvalidOption, InvalidSequence
from numpyesm.alphabet import MASK, TOKEN_ID, tokenize
from numpyesm.heads import log_softmax
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.options import SCORING_METHODS
from numpyesm.passes import Passes
from numpyesm.reference import forward, nested
from numpyesm.scoring import SCAN_LETTERS, parse_mutant
from numpyesm.scoring.correlation import average_ranks, spearman
from numpyesm.scoring.marginals import Window, position_logits

WILD_TYPE = random_sequence(41, 5)


def single(position: int, letter: str) -> str:
    return f"{WILD_TYPE[position - 1]}{position}{letter}"


MUTATIONS = [single(1, "W"), single(41, "C"), single(7, "W"), f"{single(7, 'R')}:{single(20, 'D')}:{single(3, 'H')}"]


def other(sequence: str, index: int) -> str:
    """A substitution at a 0-based index."""
    return f"{sequence[index]}{index + 1}{'A' if sequence[index] != 'A' else 'C'}"


# -- fair-esm's loops, as its script does them, over the reference ------------------------------------------------


def exact_logits(model: ESM2, sequence: str, masked: int | None = None, seen: slice = slice(None)) -> Any:
    """Logits (T, 33) of the tokens of a protein, all or those that are `seen`; the residue `masked` is masked."""
    (tokens,) = tokenize([sequence])
    if masked is not None:
        tokens[masked + 1] = MASK
    return forward(tokens[seen], **nested(model.checkpoint))["logits"]


def exact_marginals(model: ESM2, sequence: str, mutant: str, masked: bool, offset: int = 1) -> float:
    score = 0.0
    for wild, index, letter in ((part[0], int(part[1:-1]) - offset, part[-1]) for part in mutant.split(":")):
        assert sequence[index] == wild
        row = exact_logits(model, sequence, index if masked else None)[index + 1]
        score += row[TOKEN_ID[letter]] - row[TOKEN_ID[wild]]
    return score


@pytest.mark.parametrize("backend", ["numpy", "auto"])
@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals"])
def test_marginals_are_fair_esms(backend: str, method: str) -> None:
    """Of a protein, of one with letters beyond the twenty, and in windows: the residues around, as if a protein."""
    model, masked = small_model(backend=backend, threads=1), method == "masked-marginals"
    for sequence, mutants in ((WILD_TYPE, MUTATIONS), ("MXKUTBAZOW", ["X2A", "U4C", "M1V:B6D"])):
        expected = [exact_marginals(model, sequence, mutant, masked) for mutant in mutants]
        found = model.score_mutations(sequence, mutants, method, window=50)  # larger than the protein
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert np.ptp(expected) > 0.1
    long = random_sequence(2100, 3)
    starts = {0: 0, 14: 0, 15: 0, 16: 1, 1000: 985, 2084: 2069, 2099: 2070}  # of the window around each index
    mutants = [other(long, i) for i in starts]
    expected = [
        exact_marginals(model, long[a : a + 30], f"{m[0]}{i - a}{m[-1]}", masked, offset=0)
        for (i, a), m in zip(starts.items(), mutants, strict=True)
    ]
    np.testing.assert_allclose(model.score_mutations(long, mutants, method, window=30), expected, rtol=0, atol=1e-4)


def test_pseudo_ppl_is_fair_esms(model: ESM2) -> None:
    sequence, mutants = "MKUTAXYIAKQRW", ["M1L", "K2K", "WT", "U3C:W13F"]
    expected = []
    for changed in ("LKUTAXYIAKQRW", sequence, sequence, "MKCTAXYIAKQRF"):
        rows = np.stack([exact_logits(model, changed, i)[i + 1] for i in range(len(changed))])
        expected.append(log_softmax(rows)[np.arange(len(rows)), [TOKEN_ID[letter] for letter in changed]].sum())
    np.testing.assert_allclose(model.score_mutations(sequence, mutants, "pseudo-ppl"), expected, rtol=5e-7, atol=0)


# Where ProteinGym's `get_optimal_window` cuts 43 tokens around some residues (0-based), by the size of the window.
INDICES = [0, 6, 7, 8, 20, 33, 34, 40]
CUTS = {
    16: [(0, 16), (0, 16), (0, 16), (1, 17), (13, 29), (26, 42), (27, 43), (27, 43)],
    17: [(0, 17), (0, 17), (0, 16), (1, 17), (13, 29), (26, 42), (26, 43), (26, 43)],
    43: [(0, 43)] * 8,
    44: [(0, 43)] * 8,
}


@pytest.mark.parametrize("size", CUTS)
def test_proteingyms_rule(model: ESM2, size: int) -> None:
    """In small: windows with `<cls>`, with `<eos>`, with neither and with both."""
    found = position_logits(model.passes, WILD_TYPE, INDICES, "masked-marginals", Window(size, of_tokens=True))
    for row, index, (start, stop) in zip(found, INDICES, CUTS[size], strict=True):
        expected = exact_logits(model, WILD_TYPE, index, slice(start, stop))[index + 1 - start]
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)


def test_proteingyms_rule_by_name(tiny: ESM2) -> None:
    """1024 tokens for masked marginals, the whole protein for wt-marginals, which may be too long for them."""
    long, indices = random_sequence(1500, 4), [0, 700]
    mutants = [other(long, i) for i in indices]
    logits = position_logits(tiny.passes, long, indices, "masked-marginals", Window(1024, of_tokens=True))
    expected = [row[TOKEN_ID[m[-1]]] - row[TOKEN_ID[m[0]]] for row, m in zip(logits, mutants, strict=True)]
    np.testing.assert_array_equal(tiny.score_mutations(long, mutants, window="proteingym"), expected)
    assert np.abs(tiny.score_mutations(long, mutants, window=1022) - expected).max() > 1e-4
    whole = tiny.score_mutations(long, mutants, "wt-marginals")
    np.testing.assert_array_equal(tiny.score_mutations(long, mutants, "wt-marginals", window="proteingym"), whole)
    with pytest.raises(InvalidSequence, match=r"has 2049 residues, .*; ProteinGym's wt-marginals see the whole"):
        tiny.score_mutations(LONG, ["WT"], "wt-marginals", window="proteingym")


# -- what the methods mean ---------------------------------------------------------------------------------------


def test_log_prob_is_a_difference_of_sums_of_equal_numbers_of_terms(model: ESM2) -> None:
    """An X of the wild type counts nothing, the amino acid in its place does."""
    scores = model.score_mutations(WILD_TYPE, [single(1, "W"), "WT"], "log-prob")
    mutated, wild = model.log_prob(["W" + WILD_TYPE[1:], WILD_TYPE])
    assert scores.tolist() == [pytest.approx(mutated - wild, abs=1e-5), 0]
    with pytest.raises(InvalidMutation, match="item 1: T31A:X32C: X32C: X is not one of the 20 amino acids") as caught:
        model.score_mutations("MKTX", ["M29A", "T31A:X32C"], "log-prob", offset=29)
    assert caught.value.position == 32
    assert np.isfinite(model.score_mutations("MKTX", ["M1A"], "log-prob")).all()
    assert model.score_mutations("XX", ["WT"], "log-prob").tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("method", SCORING_METHODS)
def test_mutants_one_by_one_and_no_change(model: ESM2, method: str) -> None:
    together = model.score_mutations(WILD_TYPE, (m for m in MUTATIONS), method)
    alone = [model.score_mutations(WILD_TYPE, [mutant], method)[0] for mutant in MUTATIONS]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)  # batch mates change the rounding on some CPUs
    same = single(5, WILD_TYPE[4])
    scores = model.score_mutations(WILD_TYPE, ["WT", same, f"{same}:{single(9, 'W')}", single(9, "W")], method)
    assert scores[0] == scores[1] != scores[2]
    assert scores[2] == pytest.approx(scores[3], abs=1e-5)
    if method != "pseudo-ppl":
        assert scores[0] == 0
    if method.endswith("marginals"):
        parts = model.score_mutations(WILD_TYPE, MUTATIONS[-1].split(":"), method)
        assert together[-1] == pytest.approx(parts.sum(), abs=1e-5)
    assert model.score_mutations(WILD_TYPE, [], method).shape == (0,)


@mock.patch.object(Passes, "logits", autospec=True, side_effect=Passes.logits)
def test_what_runs(logits: mock.Mock, model: ESM2, tiny: ESM2) -> None:
    """Needed positions alone, one row of logits each; and few token rows at a time, though a scan has many."""
    model.score_mutations(WILD_TYPE, [*MUTATIONS, single(7, "A"), single(9, WILD_TYPE[8])])
    model.score_mutations(WILD_TYPE, MUTATIONS, "wt-marginals")
    progress: list[tuple[int, int]] = []
    tiny.scan_mutations(random_sequence(300), progress=lambda *done: progress.append(done))
    # Of each call: (tokens, masks, rows of logits) of every sequence.
    pairs = [zip(*call.args[1:3], strict=True) for call in logits.call_args_list]
    shapes = [[(len(ids), int((ids == MASK).sum()), len(rows)) for ids, rows in call] for call in pairs]
    # Positions 1, 3, 7, 20 and 41: the unchanged ninth costs nothing.
    assert shapes[:2] == [[(43, 1, 1)] * 5, [(43, 0, 5)]]
    assert [len(call) for call in shapes[2:]] == [108, 108, 84]  # of 302 tokens: at most 32768
    assert progress[-1] == (300, 300)


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_the_last_layer_runs_where_it_is_wanted(backend: str) -> None:
    """And gives the same numbers as when it runs everywhere."""
    model, sequence = small_model(backend=backend, threads=2), random_sequence(400, 2)
    masked = [sequence[:150] + "<mask>" + sequence[151:]] * 2
    step = NumpyKernels.project_and_feed_forward
    with mock.patch.object(NumpyKernels, step.__name__, autospec=True, side_effect=step) as calls:
        some = model.predict(masked, positions="masked")
    # Of the NumPy kernels; the compiled ones have a step of their own.
    assert sum(len(call.args[3]) for call in calls.call_args_list if call.args[1] == 2) < 2 * 64
    for found, whole in zip(some, model.predict(masked), strict=True):
        np.testing.assert_allclose(found.logits, whole.logits[[150]], rtol=0, atol=1e-6)


def test_scan_is_all_mutations(model: ESM2) -> None:
    for method, offset in (("masked-marginals", 10), ("wt-marginals", -10)):
        scan = model.scan_mutations(WILD_TYPE, method, offset=offset)
        assert scan.positions == list(range(offset, offset + 41))
        assert scan.amino_acids == "ACDEFGHIKLMNPQRSTVWY" == SCAN_LETTERS
        mutants = [f"{w}{p}{a}" for w, p in zip(WILD_TYPE, scan.positions, strict=True) for a in SCAN_LETTERS]
        expected = model.score_mutations(WILD_TYPE, mutants, method, offset=offset).reshape(41, 20)
        np.testing.assert_array_equal(scan.scores, expected)
        assert (scan.scores[np.arange(41), [SCAN_LETTERS.index(w) for w in WILD_TYPE]] == 0).all()
    for method in SCORING_METHODS[2:]:
        with pytest.raises(InvalidOption, match="expected one of masked-marginals, wt-marginals"):
            model.scan_mutations(WILD_TYPE, method)


# -- what is refused -----------------------------------------------------------------------------------------------


NO_MUTATIONS: dict[str, list[Any]] = {
    "empty": [""],
    "expected one such as A42G": ["A", "42", "A42", "p.Ala42Abc"],
    "upper case": ["a42g", "A42g"],
    "stop codon": ["A42*", "A42Ter", "p.Trp42*", "p.Ala42X"],
    "a deletion cannot be scored": ["A42del", "A42-", "p.Ala42_Val44del"],
    "an insertion cannot be scored": ["A42_V43insG", "p.Lys2_Met3insGlnSer"],
    "a deletion with insertion": ["p.Cys28delinsTrpVal"],
    "a duplication": ["p.(Val7dup)"],
    "a frame shift": ["p.Arg97ProfsTer23", "NP_000537.3:p.R97fs*23"],
    "an extension": ["p.Met1ext-5", "p.Ter110GlnextTer17"],
    "is not known": ["p.?", "p.0"],
    "several alleles": ["p.[Ala2Val];[Lys3Arg]", "p.[Ala2Val(;)Lys3Arg]", "p.(Gly42Ala^Ser)"],
    "DNA or RNA": ["NM_004006.2:c.4375C>T"],
    "position 42 is changed twice": ["A42G:A42V", "A42G:A42G", "p.[Ala42Gly;Ala42Val]"],
    "U+0412": ["A42\u0412"],
    "joined by ':'": ["A42G,V50L", "A42G V50L", "A42G/V50L"],
    "is not one of the 20 amino acids": ["A42X", "A42J"],
    "is not a substitution": ["A42G:", ":A42G", "A４２G", "A99999999999999999999G", "A4.2G"],
    "expected text such as A42G, got": [None, float("nan"), 42],
}


@pytest.mark.parametrize(("said", "mutation"), [(said, one) for said, some in NO_MUTATIONS.items() for one in some])
def test_what_is_no_mutation(model: ESM2, said: str, mutation: Any) -> None:
    with pytest.raises(InvalidMutation, match="item 1: ") as caught:
        model.score_mutations(WILD_TYPE, ["WT", mutation])
    assert (said in str(caught.value), caught.value.item) == (True, 1), mutation


MEANS = {
    "": ["WT", "_wt", "p.=", "p.(=)", "_sy"],
    "A2V": ["p.Ala2Val", "p.(Ala2Val)", "p.A2V", "p.(A2V)", "Ala2Val", "P.ALA2VAL", "NP_000000.1:p.Ala2Val",
            "NM_1.6(TP53):p.(Ala2Val)", "P04637:p.A2V"],
    "A2A": ["p.Ala2=", "p.A2=", "NP_1.2:p.Ala2%3D"],
    "U-2A": ["p.Sec-2Ala"],
    "A2V:K3R": ["p.[Ala2Val;Lys3Arg]", "p.([Ala2Val;Lys3Arg])", "p.[(A2V);(K3R)]", "p.Ala2Val:p.Lys3Arg", "A2V:p.K3R"],
    "A2A:K3R": ["NP_1.1:p.[Ala2=;Lys3Arg]"],
}  # fmt: skip


@pytest.mark.parametrize("means", MEANS)
def test_notations(means: str) -> None:
    for written in MEANS[means]:
        assert ":".join(map(str, parse_mutant(written))) == means, written


def test_errors_name_mutation_and_position(model: ESM2) -> None:
    wrong = "A" if WILD_TYPE[6] != "A" else "C"
    with pytest.raises(InvalidMutation) as caught:
        model.score_mutations(WILD_TYPE, [f"{single(3, 'W')}:{wrong}7G"])
    assert f"the wild type has {WILD_TYPE[6]} at position 7, not {wrong}" in str(caught.value)
    assert (caught.value.item, caught.value.position) == (0, 7)
    assert caught.value.mutation == f"{single(3, 'W')}:{wrong}7G"
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (str(again), again.position) == (str(caught.value), 7)


WT, LONG = ["WT"], random_sequence(2049)
END = [other(LONG, 2048)]
# Error, text: wild types, mutants, perhaps a method and other options.
REFUSED: dict[tuple[type[Exception], str], list[tuple[Any, ...]]] = {
    (InvalidMutation, "wild type, whose positions are 1 to 41"): [(WILD_TYPE, [f"A{n}G"]) for n in (0, 42, -1)],
    (InvalidMutation, "all mutations fit with offset 24"): [
        (WILD_TYPE, [f"{WILD_TYPE[i]}{i + 24}W" for i in range(12)])
    ],
    (InvalidSequence, "empty"): [("", WT)],
    (InvalidSequence, "'-' at position 3"): [("MK-T", WT)],
    (InvalidSequence, "upper case"): [("MKt", WT)],
    (InvalidSequence, "'<mask>' at position 3"): [("MK<mask>", WT)],
    (InvalidSequence, "got int"): [(7, WT)],
    (InvalidSequence, "2049 residues, at most 2048"): [(LONG, END, method) for method in SCORING_METHODS],
    (InvalidSequence, "whole sequence in one pass"): [(LONG, END, "log-prob", {"window": 1022})],
    (InvalidSequence, "the other methods can score it with a window"): [(LONG, END, "log-prob", {})],
    (InvalidOption, "method"): [(WILD_TYPE, WT, bad) for bad in ("masked_marginals", None, ["log-prob"])],
    (InvalidOption, "offset"): [(WILD_TYPE, WT, SCORING_METHODS[0], {"offset": bad}) for bad in (1.5, "1", True)],
    (InvalidOption, "window"): [
        (WILD_TYPE, WT, SCORING_METHODS[0], {"window": bad}) for bad in (0, 2049, 10.0, "1022", "ProteinGym", True)
    ],
    (InvalidOption, "is for masked-marginals and wt-marginals"): [
        (WILD_TYPE, WT, method, {"window": "proteingym"}) for method in SCORING_METHODS[2:]
    ],
}


@pytest.mark.parametrize(("error", "said"), REFUSED)
def test_refused(model: ESM2, error: type[Exception], said: str) -> None:
    for wild_type, mutants, *more in REFUSED[error, said]:
        with pytest.raises(error, match=said):
            model.score_mutations(wild_type, mutants, *more[:1], **dict(*more[1:]))
        if mutants is WT and more[:1] not in (["log-prob"], ["pseudo-ppl"]):
            with pytest.raises(error, match=said):
                model.scan_mutations(wild_type, *more[:1], **dict(*more[1:]))


# -- Spearman's correlation ----------------------------------------------------------------------------------------


def test_missing_and_infinite_values() -> None:
    """A missing value leaves its pair out."""
    nan, inf = math.nan, math.inf
    assert spearman([1, nan, 2, 3, 9], [1, 5, 2, 3, nan]) == 1
    assert spearman([-inf, 0, inf], [3, 2, 1]) == -1
    for x, y in ([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [5, 5]), ([nan] * 3, [1, 2, 3]):
        assert math.isnan(spearman(x, y))
    with pytest.raises(ValueError, match="3 values on one side, 2 on the other"):
        spearman([1, 2, 3], [1, 2])


@settings(deadline=None)  # SciPy takes seconds to import
@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-1e6, 1e6)), min_size=2, max_size=60))
def test_like_scipy(pairs: list[tuple[int, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array(pairs, np.float64).T
    np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))
    if np.ptp(x) and np.ptp(y):
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
