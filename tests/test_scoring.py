"""Scores of mutations: against fair-esm's own loops, and against what a mutation may be."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, random_sequence, small_model

from numpyesm import ESM2, InvalidMutation, InvalidOption, InvalidSequence, NumpyesmError
from numpyesm.alphabet import AMINO_ACIDS, MASK, TOKEN_ID
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.passes import Passes
from numpyesm.scoring import SCAN_LETTERS, parse_mutant
from numpyesm.scoring.marginals import Window, optimal_window, position_logits, window_around

WILD_TYPE = random_sequence(41, 5)


def single(position: int, letter: str, offset: int = 1) -> str:
    return f"{WILD_TYPE[position - offset]}{position}{letter}"


MUTATIONS = [single(1, "W"), single(41, "C"), single(7, "W"), f"{single(7, 'R')}:{single(20, 'D')}:{single(3, 'H')}"]


def other(sequence: str, index: int) -> str:
    """A substitution at a 0-based index."""
    return f"{sequence[index]}{index + 1}{'A' if sequence[index] != 'A' else 'C'}"


# -- fair-esm's loops, written as its script does them -----------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Any:
    """(fair-esm, numpyesm on NumPy, numpyesm on the fastest backend) with the same small random weights."""
    pytest.importorskip("torch")
    pytest.importorskip("esm")
    from fair_esm_models import as_checkpoint, fair_esm_model

    fair = fair_esm_model(4, 1.0, SMALL)
    checkpoint = as_checkpoint(fair)
    return fair, ESM2(checkpoint, backend="numpy", threads=1), ESM2(checkpoint, threads=1)


def fair_log_probs(fair: Any, sequence: str, masked: int | None = None) -> Any:
    """log-softmax over the 33 tokens at every residue, `masked` (0-based) being masked: (L, 33)."""
    import torch
    from fair_esm_models import ALPHABET, tokens_of

    tokens = tokens_of([sequence])
    if masked is not None:
        tokens[0, masked + 1] = ALPHABET.mask_idx
    with torch.no_grad():
        return torch.log_softmax(fair(tokens)["logits"], dim=-1)[0, 1:-1].numpy()


def fair_marginals(fair: Any, sequence: str, mutant: str, masked: bool, offset: int = 1) -> float:
    from fair_esm_models import ALPHABET

    score = 0.0
    for part in mutant.split(":"):
        wild, index, letter = part[0], int(part[1:-1]) - offset, part[-1]
        assert sequence[index] == wild
        row = fair_log_probs(fair, sequence, index if masked else None)[index]
        score += row[ALPHABET.get_idx(letter)] - row[ALPHABET.get_idx(wild)]
    return score


def fair_pseudo_log_likelihood(fair: Any, sequence: str) -> float:
    from fair_esm_models import ALPHABET

    return sum(
        float(fair_log_probs(fair, sequence, i)[i, ALPHABET.get_idx(letter)]) for i, letter in enumerate(sequence)
    )


@pytest.mark.parity
@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals"])
def test_marginals_agree_with_fair_esm(pair: Any, method: str) -> None:
    """Of a protein, of one with letters beyond the twenty, and in windows: the residues around, as if a protein."""
    fair, ours, compiled = pair
    masked = method == "masked-marginals"
    for sequence, mutants in ((WILD_TYPE, MUTATIONS), ("MXKUTBAZOW", ["X2A", "U4C", "M1V:B6D"])):
        expected = [fair_marginals(fair, sequence, mutant, masked) for mutant in mutants]
        for model in (ours, compiled):
            np.testing.assert_allclose(model.score_mutations(sequence, mutants, method), expected, rtol=0, atol=1e-4)
        assert np.ptp(expected) > 0.1
    long = random_sequence(2100, 3)
    starts = {0: 0, 14: 0, 15: 0, 16: 1, 1000: 985, 2084: 2069, 2099: 2070}  # of the window around each index
    mutants = [other(long, i) for i in starts]
    expected = [
        fair_marginals(fair, long[a : a + 30], f"{m[0]}{i - a}{m[-1]}", masked, offset=0)
        for (i, a), m in zip(starts.items(), mutants, strict=True)
    ]
    np.testing.assert_allclose(ours.score_mutations(long, mutants, method, window=30), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_pseudo_ppl_agrees_with_fair_esm(pair: Any) -> None:
    from fair_esm_models import float64_softmax

    fair, ours, _ = pair
    sequence = "MKUTAXYIAKQRW"
    mutants = ["M1L", "K2K", "WT", "U3C:W13F"]
    changed = ["LKUTAXYIAKQRW", sequence, sequence, "MKCTAXYIAKQRF"]
    # A sum of thirteen terms of some -40: torch's own float32 is off by up to 5e-7 of it, depending on the CPU.
    exact = copy.deepcopy(fair).double()
    with float64_softmax():
        expected = [fair_pseudo_log_likelihood(exact, s) for s in changed]
    np.testing.assert_allclose(ours.score_mutations(sequence, mutants, "pseudo-ppl"), expected, rtol=5e-7, atol=0)


def proteingyms_window(mutation_position_relative: int, seq_len_wo_special: int, model_window: int) -> list[int]:
    """`get_optimal_window` of ProteinGym's scoring_utils.py, as it is published."""
    half_model_window = model_window // 2
    if seq_len_wo_special <= model_window:
        return [0, seq_len_wo_special]
    if mutation_position_relative < half_model_window:
        return [0, model_window]
    if mutation_position_relative >= seq_len_wo_special - half_model_window:
        return [seq_len_wo_special - model_window, seq_len_wo_special]
    return [
        max(0, mutation_position_relative - half_model_window),
        min(seq_len_wo_special, mutation_position_relative + half_model_window),
    ]


def test_windows() -> None:
    for length, window in itertools.product((1, 3, 7, 8, 9, 30), (1, 2, 3, 4, 7, 8)):
        for index in range(length):
            assert optimal_window(index, length, window) == tuple(proteingyms_window(index, length, window))
            start, stop = window_around(index, length, min(window, length))
            assert 0 <= start <= index < stop <= length
            assert stop - start == min(window, length)


def fair_logits_in_proteingyms_window(fair: Any, sequence: str, index: int, window: int) -> Any:
    """Its loop of masked marginals: the position is masked in the tokens of the whole, then the window is cut out."""
    import torch
    from fair_esm_models import ALPHABET, tokens_of

    tokens = tokens_of([sequence])
    start, stop = proteingyms_window(index + 1, tokens.size(1), window)
    tokens[0, index + 1] = ALPHABET.mask_idx
    with torch.no_grad():
        return fair(tokens[:, start:stop])["logits"][0, index + 1 - start].numpy()


@pytest.mark.parity
@pytest.mark.parametrize("window", [16, 17, 43])
def test_proteingyms_rule_agrees_with_fair_esm(pair: Any, window: int) -> None:
    """In small: windows with `<cls>`, with `<eos>`, with neither and with both."""
    fair, ours, _ = pair
    indices = [0, 6, 7, 8, 20, 33, 34, 40]
    found = position_logits(ours.passes, WILD_TYPE, indices, "masked-marginals", Window(window, of_tokens=True))
    expected = [fair_logits_in_proteingyms_window(fair, WILD_TYPE, index, window) for index in indices]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.slow
def test_proteingyms_rule_by_name(pair: Any) -> None:
    fair, ours, _ = pair
    sequence = random_sequence(1500, 11)
    mutants = [other(sequence, i) for i in (0, 700)]
    expected = []
    for index, mutant in zip((0, 700), mutants, strict=True):
        logits = fair_logits_in_proteingyms_window(fair, sequence, index, 1024)
        expected.append(logits[TOKEN_ID[mutant[-1]]] - logits[TOKEN_ID[mutant[0]]])
    found = ours.score_mutations(sequence, mutants, window="proteingym")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(ours.score_mutations(sequence, mutants, window=1022) - expected).max() > 0.01
    whole = [fair_marginals(fair, sequence, mutants[1], masked=False)]
    found = ours.score_mutations(sequence, mutants[1:], "wt-marginals", window="proteingym")
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-4)


def test_proteingyms_rule_sees_short_proteins_whole(model: ESM2, tiny: ESM2) -> None:
    for method in ("masked-marginals", "wt-marginals"):
        found = model.score_mutations(WILD_TYPE, MUTATIONS, method, window="proteingym")
        np.testing.assert_allclose(found, model.score_mutations(WILD_TYPE, MUTATIONS, method), rtol=0, atol=1e-6)
        scan = model.scan_mutations(WILD_TYPE, method, window="proteingym")
        np.testing.assert_allclose(scan.scores, model.scan_mutations(WILD_TYPE, method).scores, rtol=0, atol=1e-6)
    long = random_sequence(2100, 4)
    assert np.isfinite(tiny.score_mutations(long, [f"{long[1000]}1001W"], window="proteingym")).all()
    with pytest.raises(InvalidSequence, match=r"has 2100 residues, .*; ProteinGym's wt-marginals see the whole"):
        model.score_mutations(long, ["WT"], "wt-marginals", window="proteingym")


# -- what the methods mean ---------------------------------------------------------------------------------------


def test_log_prob_is_the_mutants_less_the_wild_types(model: ESM2) -> None:
    scores = model.score_mutations(WILD_TYPE, [*MUTATIONS, "WT"], "log-prob")
    first = "W" + WILD_TYPE[1:]
    mutated, wild = model.log_prob([first, WILD_TYPE])
    assert scores[0] == pytest.approx(mutated - wild, abs=1e-5)
    assert scores[-1] == 0


def test_log_prob_refuses_sums_of_unequal_numbers_of_terms(model: ESM2) -> None:
    """An X of the wild type counts nothing, the amino acid in its place does."""
    with pytest.raises(InvalidMutation, match="item 1: T31A:X32C: X32C: X is not one of the 20 amino acids") as caught:
        model.score_mutations("MKTX", ["M29A", "T31A:X32C"], "log-prob", offset=29)
    assert caught.value.position == 32
    assert np.isfinite(model.score_mutations("MKTX", ["M1A"], "log-prob")).all()
    assert np.isfinite(model.score_mutations("MKTX", ["X4A"], "wt-marginals")).all()
    assert model.score_mutations("XX", ["WT"], "log-prob").tolist() == [0]


def test_masked_marginals_are_predict(model: ESM2) -> None:
    position = 7
    masked = WILD_TYPE[: position - 1] + "<mask>" + WILD_TYPE[position:]
    logits = model.predict([masked], positions="masked")[0].logits[0].astype(np.float64)
    expected = logits[AMINO_ACIDS.index("W")] - logits[AMINO_ACIDS.index(WILD_TYPE[position - 1])]
    assert model.score_mutations(WILD_TYPE, [single(7, "W")])[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl"])
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


def test_offset_shifts_positions(model: ESM2) -> None:
    for offset in (-10, 0, 1, 24):
        shifted = [f"{WILD_TYPE[i]}{i + offset}W" for i in (0, 6, 40)]
        np.testing.assert_array_equal(
            model.score_mutations(WILD_TYPE, shifted, offset=offset),
            model.score_mutations(WILD_TYPE, [single(i + 1, "W") for i in (0, 6, 40)]),
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int, int]]]:
    """Of each call of the model: (tokens, masks, rows of logits) of every sequence."""
    seen: list[list[tuple[int, int, int]]] = []
    original = Passes.logits

    def spy(self: Passes, tokens: Any, rows: Any, *columns: Any) -> Any:
        pairs = zip(tokens, rows, strict=True)
        seen.append([(len(ids), int((ids == MASK).sum()), len(wanted)) for ids, wanted in pairs])
        return original(self, tokens, rows, *columns)

    monkeypatch.setattr(Passes, "logits", spy)
    return seen


def test_only_needed_positions_run_and_each_has_one_row(model: ESM2, calls: list[Any]) -> None:
    model.score_mutations(WILD_TYPE, [*MUTATIONS, single(7, "A"), single(9, WILD_TYPE[8])])
    assert calls == [[(43, 1, 1)] * 5]  # positions 1, 3, 7, 20 and 41: the unchanged ninth costs nothing
    calls.clear()
    model.score_mutations(WILD_TYPE, MUTATIONS, "wt-marginals")
    assert calls == [[(43, 0, 5)]]


def test_memory_is_bounded(tiny: ESM2, calls: list[Any]) -> None:
    """Few token rows at a time, though the scan has many."""
    progress: list[tuple[int, int]] = []
    tiny.scan_mutations(random_sequence(300), progress=lambda *done: progress.append(done))
    assert max(sum(tokens for tokens, _, _ in call) for call in calls) <= 32768
    assert len(calls) == math.ceil(300 / (32768 // 302))
    assert progress[-1] == (300, 300)


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_the_last_layer_runs_where_it_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers as when it runs everywhere."""
    model = small_model(backend=backend, threads=2)
    sequence = random_sequence(400, 2)
    masked = [sequence[:150] + "<mask>" + sequence[151:]] * 2
    rows: list[int] = []
    step = NumpyKernels.project_and_feed_forward

    def spy(self: Any, layer: int, context: Any, x: Any) -> None:
        rows.append(len(x)) if layer == 2 else None
        step(self, layer, context, x)

    monkeypatch.setattr(NumpyKernels, "project_and_feed_forward", spy)
    one = model.predict(masked, positions="masked")
    few = sum(rows)
    everywhere = model.predict(masked)
    if model.backend == "numpy":
        assert (few < 2 * 64, sum(rows) - few) == (True, 2 * 402)
    for found, whole in zip(one, everywhere, strict=True):
        np.testing.assert_allclose(found.logits, whole.logits[[150]], rtol=0, atol=1e-6)


def test_scan_is_all_mutations(model: ESM2) -> None:
    for method in ("masked-marginals", "wt-marginals"):
        scan = model.scan_mutations(WILD_TYPE, method, offset=10)
        assert scan.scores.shape == (41, 20)
        assert scan.positions == list(range(10, 51))
        assert scan.amino_acids == "ACDEFGHIKLMNPQRSTVWY" == SCAN_LETTERS
        mutants = [f"{w}{p}{a}" for w, p in zip(WILD_TYPE, scan.positions, strict=True) for a in SCAN_LETTERS]
        expected = model.score_mutations(WILD_TYPE, mutants, method, offset=10).reshape(41, 20)
        np.testing.assert_array_equal(scan.scores, expected)
        assert (scan.scores[np.arange(41), [SCAN_LETTERS.index(w) for w in WILD_TYPE]] == 0).all()


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


@pytest.mark.parametrize("said", NO_MUTATIONS)
def test_what_is_no_mutation(model: ESM2, said: str) -> None:
    for mutation in NO_MUTATIONS[said]:
        with pytest.raises(InvalidMutation, match="item 1: ") as caught:
            model.score_mutations(WILD_TYPE, ["WT", mutation])
        assert said in str(caught.value), mutation
        assert caught.value.item == 1
        with pytest.raises(InvalidMutation):
            parse_mutant(mutation)


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
    assert str(again) == str(caught.value)
    assert again.position == 7
    for position in (0, 42, -1):
        with pytest.raises(InvalidMutation, match="outside the wild type, whose positions are 1 to 41"):
            model.score_mutations(WILD_TYPE, [f"A{position}G"])
    assert isinstance(caught.value, NumpyesmError | ValueError)


def test_a_wrong_offset_is_recognised(model: ESM2) -> None:
    shifted = [f"{WILD_TYPE[i]}{i + 24}W" for i in range(12)]
    with pytest.raises(InvalidMutation, match=r"all mutations fit with offset 24"):
        model.score_mutations(WILD_TYPE, shifted)


@pytest.mark.parametrize(
    ("wild_type", "said"),
    [
        ("", "empty"),
        ("MK-T", "'-' at position 3"),
        ("MKt", "upper case"),
        ("MK<mask>", "'<mask>' at position 3"),
        (7, "int"),
    ],
)
def test_what_is_no_wild_type(model: ESM2, wild_type: Any, said: str) -> None:
    with pytest.raises(InvalidSequence, match=said):
        model.score_mutations(wild_type, ["WT"])
    with pytest.raises(InvalidSequence, match=said):
        model.scan_mutations(wild_type)


def test_long_wild_types(model: ESM2) -> None:
    sequence = random_sequence(2049)
    mutants = [other(sequence, 2048)]
    for method in ("masked-marginals", "wt-marginals", "pseudo-ppl", "log-prob"):
        with pytest.raises(InvalidSequence, match="2049 residues, at most 2048"):
            model.score_mutations(sequence, mutants, method)
    with pytest.raises(InvalidSequence, match="whole sequence in one pass"):
        model.score_mutations(sequence, mutants, "log-prob", window=1022)
    assert np.isfinite(model.score_mutations(sequence, mutants, window=64)).all()
    assert model.score_mutations(WILD_TYPE, MUTATIONS, window=2048) == pytest.approx(
        model.score_mutations(WILD_TYPE, MUTATIONS), abs=0
    )


def test_what_is_no_option(model: ESM2) -> None:
    wrong: dict[str, list[Any]] = {
        "method": ["masked_marginals", None, ["log-prob"]],
        "offset": [1.5, "1", True],
        "window": [0, 2049, 10.0, "1022", "ProteinGym", True],
    }
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(InvalidOption, match=option):
                model.score_mutations(WILD_TYPE, ["WT"], **{option: value})
    for method in ("log-prob", "pseudo-ppl"):  # options that exclude each other
        with pytest.raises(InvalidOption, match="is for masked-marginals and wt-marginals"):
            model.score_mutations(WILD_TYPE, ["WT"], method, window="proteingym")
        with pytest.raises(InvalidOption, match="expected one of masked-marginals, wt-marginals"):
            model.scan_mutations(WILD_TYPE, method)
    with pytest.raises(InvalidMutation, match="put it into a list"):
        model.score_mutations(WILD_TYPE, "A42G")
    with pytest.raises(InvalidMutation, match="expected a list"):
        model.score_mutations(WILD_TYPE, 7)  # type: ignore[arg-type]
