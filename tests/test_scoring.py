"""Scores of mutations: against fair-esm's own loops, and against what a mutation may be."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence, small_model

from numpyesm import ESM2, InvalidMutation, InvalidOption, InvalidSequence, NumpyesmError
from numpyesm.alphabet import AMINO_ACIDS, TOKEN_ID
from numpyesm.kernels.numpy_forward import NumpyKernels
from numpyesm.passes import Passes
from numpyesm.scoring import SCAN_LETTERS, parse_mutant
from numpyesm.scoring.marginals import masked_logits
from numpyesm.scoring.windows import Window, optimal_window, window_around

WILD_TYPE = random_sequence(41, 5)


def single(position: int, letter: str, offset: int = 1) -> str:
    return f"{WILD_TYPE[position - offset]}{position}{letter}"


MUTATIONS = [single(1, "W"), single(41, "C"), single(7, "W"), f"{single(7, 'R')}:{single(20, 'D')}:{single(3, 'H')}"]


# -- fair-esm's loops, written as its script does them -----------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Any:
    """(fair-esm, numpyesm) with the same small random weights."""
    pytest.importorskip("torch")
    pytest.importorskip("esm")
    from fair_esm_models import fair_esm_model, numpyesm_models

    from numpyesm.config import PRESETS

    fair = fair_esm_model(4, 1.0, PRESETS["esm2-8m"])
    return fair, numpyesm_models(fair)[0]


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
    fair, ours = pair
    scores = ours.score_mutations(WILD_TYPE, MUTATIONS, method)
    assert scores.dtype == np.float64
    expected = [fair_marginals(fair, WILD_TYPE, mutant, method == "masked-marginals") for mutant in MUTATIONS]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1


@pytest.mark.parity
def test_masked_marginals_of_the_35m_agree_with_fair_esm() -> None:
    """At its true size, the whole of a small scan."""
    pytest.importorskip("esm")
    from fair_esm_models import fair_esm_model, numpyesm_models

    fair = fair_esm_model(1)
    sequence = random_sequence(300, 1)
    positions = [0, 150, 299]
    mutants = [f"{sequence[i]}{i + 24}{letter}" for i in positions for letter in AMINO_ACIDS]
    for backend in ("numpy", "auto"):
        ours = numpyesm_models(fair, backend)[0]
        scores = ours.score_mutations(sequence, mutants, offset=24).reshape(len(positions), 20)
        for i, found in zip(positions, scores, strict=True):
            row = fair_log_probs(fair, sequence, i)[i, 4:24]
            np.testing.assert_allclose(found, row - row[AMINO_ACIDS.index(sequence[i])], rtol=0, atol=1e-4)


@pytest.mark.parity
def test_pseudo_ppl_agrees_with_fair_esm(pair: Any) -> None:
    from fair_esm_models import float64_softmax

    fair, ours = pair
    sequence = "MKUTAXYIAKQRW"
    mutants = ["M1L", "K2K", "WT", "U3C:W13F"]
    changed = ["LKUTAXYIAKQRW", sequence, sequence, "MKCTAXYIAKQRF"]
    # A sum of thirteen terms of some -40: torch's own float32 is off by up to 5e-7 of it, depending on the CPU.
    exact = copy.deepcopy(fair).double()
    with float64_softmax():
        expected = [fair_pseudo_log_likelihood(exact, s) for s in changed]
    np.testing.assert_allclose(ours.score_mutations(sequence, mutants, "pseudo-ppl"), expected, rtol=5e-7, atol=0)


@pytest.mark.parity
def test_letters_beyond_the_twenty_in_the_wild_type(pair: Any) -> None:
    fair, ours = pair
    sequence = "MXKUTBAZOW"
    mutants = ["X2A", "U4C", "M1V:B6D"]
    for method, masked in (("masked-marginals", True), ("wt-marginals", False)):
        expected = [fair_marginals(fair, sequence, mutant, masked) for mutant in mutants]
        np.testing.assert_allclose(ours.score_mutations(sequence, mutants, method), expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals"])
def test_windows_agree_with_fair_esm_on_the_cut_sequence(pair: Any, method: str) -> None:
    """The residues around the position, as if they were a protein."""
    fair, ours = pair
    sequence = random_sequence(2100, 3)
    cuts = {
        0: (0, 30),
        14: (0, 30),
        15: (0, 30),
        16: (1, 31),
        1000: (985, 1015),
        2084: (2069, 2099),
        2099: (2070, 2100),
    }
    mutants = [f"{sequence[i]}{i + 1}{'A' if sequence[i] != 'A' else 'C'}" for i in cuts]
    expected = [
        fair_marginals(fair, sequence[a:b], f"{m[0]}{i - a}{m[-1]}", method == "masked-marginals", offset=0)
        for (i, (a, b)), m in zip(cuts.items(), mutants, strict=True)
    ]
    np.testing.assert_allclose(ours.score_mutations(sequence, mutants, method, window=30), expected, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize(("length", "window"), list(itertools.product((3, 7, 8, 9, 30), (1, 4, 7, 8))))
def test_proteingyms_window(length: int, window: int) -> None:
    for position in range(length):
        assert optimal_window(position, length, window) == tuple(proteingyms_window(position, length, window))


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
    fair, ours = pair
    indices = [0, 6, 7, 8, 20, 33, 34, 40]
    found = masked_logits(ours.passes, WILD_TYPE, indices, Window(window, of_tokens=True))
    expected = [fair_logits_in_proteingyms_window(fair, WILD_TYPE, index, window) for index in indices]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.slow
def test_proteingyms_rule_by_name(pair: Any) -> None:
    fair, ours = pair
    sequence = random_sequence(1500, 11)
    mutants = [f"{sequence[i]}{i + 1}{'A' if sequence[i] != 'A' else 'C'}" for i in (0, 700)]
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


def test_proteingyms_rule_sees_short_proteins_whole(model: ESM2) -> None:
    for method in ("masked-marginals", "wt-marginals"):
        found = model.score_mutations(WILD_TYPE, MUTATIONS, method, window="proteingym")
        np.testing.assert_allclose(found, model.score_mutations(WILD_TYPE, MUTATIONS, method), rtol=0, atol=1e-6)
        scan = model.scan_mutations(WILD_TYPE, method, window="proteingym")
        np.testing.assert_allclose(scan.scores, model.scan_mutations(WILD_TYPE, method).scores, rtol=0, atol=1e-6)
    long = random_sequence(2100, 4)
    assert np.isfinite(model.score_mutations(long, [f"{long[1000]}1001W"], window="proteingym")).all()
    with pytest.raises(InvalidSequence, match="wt-marginals see the whole wild type at once: it has 2100 residues"):
        model.score_mutations(long, ["WT"], "wt-marginals", window="proteingym")


# -- what the methods mean ---------------------------------------------------------------------------------------


def test_log_prob_is_the_mutants_less_the_wild_types(model: ESM2) -> None:
    scores = model.score_mutations(WILD_TYPE, [*MUTATIONS, "WT"], "log-prob")
    first = "W" + WILD_TYPE[1:]
    mutated, wild = model.log_prob([first, WILD_TYPE])
    assert scores[0] == mutated - wild
    assert scores[-1] == 0


def test_log_prob_refuses_sums_of_unequal_numbers_of_terms(model: ESM2) -> None:
    """An X of the wild type counts nothing, the amino acid in its place does."""
    with pytest.raises(InvalidMutation, match="item 1: T31A:X32C: X32C: X is none of the 20 amino acids") as caught:
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


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "log-prob"])
def test_no_change_is_worth_nothing(model: ESM2, method: str) -> None:
    same = single(5, WILD_TYPE[4])
    scores = model.score_mutations(WILD_TYPE, ["WT", same, f"{same}:{single(9, 'W')}", single(9, "W")], method)
    assert scores[0] == scores[1] == 0
    assert scores[2] == scores[3] != 0


def test_each_mutant_alone_gives_the_same(model: ESM2) -> None:
    for method in ("masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl"):
        together = model.score_mutations(WILD_TYPE, MUTATIONS, method)
        alone = [model.score_mutations(WILD_TYPE, [mutant], method)[0] for mutant in MUTATIONS]
        np.testing.assert_array_equal(together, alone)


def test_sum_of_single_scores(model: ESM2) -> None:
    parts = MUTATIONS[-1].split(":")
    for method in ("masked-marginals", "wt-marginals"):
        scores = model.score_mutations(WILD_TYPE, [MUTATIONS[-1], *parts], method)
        assert scores[0] == pytest.approx(scores[1:].sum(), abs=1e-12)


def test_offset_shifts_positions(model: ESM2) -> None:
    for offset in (-10, 0, 1, 24):
        shifted = [f"{WILD_TYPE[i]}{i + offset}W" for i in (0, 6, 40)]
        np.testing.assert_array_equal(
            model.score_mutations(WILD_TYPE, shifted, offset=offset),
            model.score_mutations(WILD_TYPE, [single(i + 1, "W") for i in (0, 6, 40)]),
        )


def test_only_needed_positions_run_and_each_has_one_row(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    original = Passes.logits

    def spy(self: Passes, tokens: Any, rows: Any, *columns: Any) -> Any:
        calls.extend((int((ids == 32).sum()), len(wanted)) for ids, wanted in zip(tokens, rows, strict=True))
        return original(self, tokens, rows, *columns)

    monkeypatch.setattr(Passes, "logits", spy)
    model.score_mutations(WILD_TYPE, [*MUTATIONS, single(7, "A"), single(9, WILD_TYPE[8])])
    assert calls == [(1, 1)] * 5  # positions 1, 3, 7, 20 and 41: the unchanged ninth costs nothing
    calls.clear()
    model.score_mutations(WILD_TYPE, MUTATIONS, "wt-marginals")
    assert calls == [(0, 5)]


@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_the_last_layer_runs_where_it_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers as when it runs everywhere."""
    model = small_model(backend=backend, threads=2)
    sequence = random_sequence(400, 2)
    masked = sequence[:150] + "<mask>" + sequence[151:]
    rows: list[int] = []
    if model.backend == "numpy":
        step = NumpyKernels.project_and_feed_forward

        def spy(self: Any, layer: int, context: Any, x: Any) -> None:
            rows.append(len(x)) if layer == 2 else None
            step(self, layer, context, x)

        monkeypatch.setattr(NumpyKernels, "project_and_feed_forward", spy)
    else:
        from numpyesm.kernels.numba_.forward import NumbaForward

        run = NumbaForward._run

        def spy_run(self: Any, stop: int) -> None:
            if stop == 4:  # the phase of the third, last layer
                rows.extend((self._block_table[:, 1] - self._block_table[:, 0]).tolist())
            run(self, stop)

        monkeypatch.setattr(NumbaForward, "_run", spy_run)
    one = model.predict([masked, masked], positions="masked")
    assert sum(rows) < 2 * 64
    rows.clear()
    everywhere = model.predict([masked, masked])
    assert sum(rows) == 2 * 402
    for found, whole in zip(one, everywhere, strict=True):
        np.testing.assert_array_equal(found.logits, whole.logits[[150]])


def test_memory_is_bounded(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few token rows at a time, though the scan has many."""
    sizes: list[int] = []
    original = Passes.logits

    def spy(self: Passes, tokens: Any, rows: Any, *columns: Any) -> Any:
        sizes.append(sum(map(len, tokens)))
        return original(self, tokens, rows, *columns)

    monkeypatch.setattr(Passes, "logits", spy)
    seen: list[tuple[int, int]] = []
    model.scan_mutations(random_sequence(300), progress=lambda done, total: seen.append((done, total)))
    assert max(sizes) <= 32768
    assert len(sizes) == math.ceil(300 / (32768 // 302))
    assert seen[-1] == (300, 300)


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


def test_none_at_all(model: ESM2) -> None:
    assert model.score_mutations(WILD_TYPE, []).shape == (0,)
    assert model.score_mutations(WILD_TYPE, (m for m in MUTATIONS)).shape == (4,)


@pytest.mark.parametrize(("length", "window"), list(itertools.product((1, 2, 7, 30), (1, 2, 3, 7))))
def test_windows_hold_their_position(length: int, window: int) -> None:
    window = min(window, length)
    for index in range(length):
        start, stop = window_around(index, length, window)
        assert 0 <= start <= index < stop <= length
        assert stop - start == window


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mutation", "said"),
    [
        ("", "empty"),
        ("A", "expected one such as A42G"),
        ("42", "expected one such as A42G"),
        ("A42", "expected one such as A42G"),
        ("a42g", "upper case"),
        ("A42g", "upper case"),
        ("A42*", "stop codon"),
        ("A42Ter", "stop codon"),
        ("p.Trp42*", "stop codon"),
        ("p.Ala42X", "stop codon"),
        ("A42del", "a deletion has no score"),
        ("A42-", "a deletion has no score"),
        ("p.Ala42_Val44del", "a deletion has no score"),
        ("A42_V43insG", "an insertion has no score"),
        ("p.Lys2_Met3insGlnSer", "an insertion has no score"),
        ("p.Cys28delinsTrpVal", "a deletion with insertion"),
        ("p.(Val7dup)", "a duplication"),
        ("p.Arg97ProfsTer23", "a frame shift"),
        ("NP_000537.3:p.R97fs*23", "a frame shift"),
        ("p.Met1ext-5", "an extension"),
        ("p.Ter110GlnextTer17", "an extension"),
        ("p.?", "is not known"),
        ("p.0", "is not known"),
        ("p.[Ala2Val];[Lys3Arg]", "several alleles"),
        ("p.[Ala2Val(;)Lys3Arg]", "several alleles"),
        ("p.(Gly42Ala^Ser)", "several alleles"),
        ("NM_004006.2:c.4375C>T", "DNA or RNA"),
        ("p.Ala42Abc", "expected one such as A42G"),
        ("p.[Ala42Gly;Ala42Val]", "position 42 is changed twice"),
        ("A42\u0412", "U+0412"),
        ("A42G,V50L", "joined by ':'"),
        ("A42G V50L", "joined by ':'"),
        ("A42G/V50L", "joined by ':'"),
        ("A42X", "none of the 20 amino acids"),
        ("A42J", "none of the 20 amino acids"),
        ("A42G:A42V", "position 42 is changed twice"),
        ("A42G:A42G", "position 42 is changed twice"),
        ("A42G:", "no substitution"),
        (":A42G", "no substitution"),
        ("A４２G", "no substitution"),
        ("A99999999999999999999G", "no substitution"),
        ("A4.2G", "no substitution"),
        (None, "got None"),
        (float("nan"), "got nan"),
        (42, "got 42"),
    ],
)
def test_what_is_no_mutation(model: ESM2, mutation: Any, said: str) -> None:
    with pytest.raises(InvalidMutation, match="item 1: ") as caught:
        model.score_mutations(WILD_TYPE, ["WT", mutation])
    assert said in str(caught.value)
    assert caught.value.item == 1
    with pytest.raises(InvalidMutation):
        parse_mutant(mutation)


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("WT", ""), ("_wt", ""), ("p.=", ""), ("p.(=)", ""), ("_sy", ""),
        ("p.Ala2Val", "A2V"), ("p.(Ala2Val)", "A2V"), ("p.A2V", "A2V"), ("p.(A2V)", "A2V"), ("Ala2Val", "A2V"),
        ("P.ALA2VAL", "A2V"), ("p.Ala2=", "A2A"), ("p.A2=", "A2A"), ("NP_1.2:p.Ala2%3D", "A2A"), ("p.Sec-2Ala", "U-2A"),
        ("NP_000000.1:p.Ala2Val", "A2V"), ("NM_1.6(TP53):p.(Ala2Val)", "A2V"), ("P04637:p.A2V", "A2V"),
        ("p.[Ala2Val;Lys3Arg]", "A2V:K3R"), ("p.([Ala2Val;Lys3Arg])", "A2V:K3R"), ("p.[(A2V);(K3R)]", "A2V:K3R"),
        ("NP_1.1:p.[Ala2=;Lys3Arg]", "A2A:K3R"), ("p.Ala2Val:p.Lys3Arg", "A2V:K3R"), ("A2V:p.K3R", "A2V:K3R"),
    ],
)  # fmt: skip
def test_notations(written: str, means: str) -> None:
    assert ":".join(map(str, parse_mutant(written))) == means


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
        with pytest.raises(InvalidMutation, match="outside of the wild type, whose positions are 1 to 41"):
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
        ("MK<mask>", "'<' at position 3"),
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
    mutants = [f"{sequence[-1]}2049{'A' if sequence[-1] != 'A' else 'C'}"]
    for method in ("masked-marginals", "wt-marginals", "pseudo-ppl", "log-prob"):
        with pytest.raises(InvalidSequence, match="2049 residues, at most 2048"):
            model.score_mutations(sequence, mutants, method)
    with pytest.raises(InvalidSequence, match="whole sequence in one pass"):
        model.score_mutations(sequence, mutants, "log-prob", window=1022)
    assert np.isfinite(model.score_mutations(sequence, mutants, window=64)).all()
    assert model.score_mutations(WILD_TYPE, MUTATIONS, window=2048) == pytest.approx(
        model.score_mutations(WILD_TYPE, MUTATIONS), abs=0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"method": "masked_marginals"},
        {"method": None},
        {"method": ["log-prob"]},
        {"offset": 1.5},
        {"offset": "1"},
        {"offset": True},
        {"window": 0},
        {"window": 2049},
        {"window": 10.0},
        {"window": "1022"},
        {"window": "ProteinGym"},
        {"window": "proteingym", "method": "log-prob"},
        {"window": "proteingym", "method": "pseudo-ppl"},
        {"window": True},
    ],
)
def test_what_is_no_option(model: ESM2, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption):
        model.score_mutations(WILD_TYPE, ["WT"], **options)


def test_scan_takes_marginals_only(model: ESM2) -> None:
    with pytest.raises(InvalidOption, match="allowed are masked-marginals, wt-marginals"):
        model.scan_mutations(WILD_TYPE, "pseudo-ppl")


def test_one_text_is_no_list(model: ESM2) -> None:
    with pytest.raises(InvalidMutation, match="put it into a list"):
        model.score_mutations(WILD_TYPE, "A42G")
    with pytest.raises(InvalidMutation, match="expected a list"):
        model.score_mutations(WILD_TYPE, 7)  # type: ignore[arg-type]
