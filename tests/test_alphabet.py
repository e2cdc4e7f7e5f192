"""Tokens, and every kind of bad input with the item, the position and what is allowed."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from numpyesm import ESM2, InvalidMutation, InvalidSequence
from numpyesm.alphabet import AMINO_ACIDS, TOKENS, SequenceNotes, tokenize
from numpyesm.bulk import embed_fasta
from numpyesm.compat import fair_esm
from numpyesm.errors import InputWarning


def test_vocabulary_is_fair_esms() -> None:
    esm = pytest.importorskip("esm")
    assert list(TOKENS) == esm.data.Alphabet.from_architecture("ESM-1b").all_toks
    assert "".join(AMINO_ACIDS) == "LAGVSERTIDPKQNFYMHWC"


def test_tokens() -> None:
    (ids,) = tokenize(["ACDEFGHIKLMNPQRSTVWYBXZUO-"])
    assert [TOKENS[i] for i in ids] == ["<cls>", *"ACDEFGHIKLMNPQRSTVWYBXZUO-", "<eos>"]
    (ids,) = tokenize(["M<mask><mask>U"], masks=True)
    assert [TOKENS[i] for i in ids] == ["<cls>", "M", "<mask>", "<mask>", "U", "<eos>"]
    for length in (1, 2048):
        assert len(tokenize(["A" * length])[0]) == length + 2
        assert len(tokenize(["<mask>" * length], masks=True)[0]) == length + 2


# What people write: sequence, position and character at fault, and what the message says of it.
BAD = [
    ("MkT", 2, "k", "lower case"),
    *(("M" + blank + "T", 2, blank, "a blank") for blank in " \n"),
    *(("M" + digit + "0T", 2, digit, "remove position numbers") for digit in "71"),
    ("MK*T", 3, "*", "a stop codon"),
    ("MK.T", 3, ".", "a stop codon or a gap"),
    ("JMK", 1, "J", "leucine or isoleucine"),
    *((f"MKT{mark}MKT", 4, mark, "between chains") for mark in ":|/"),
    *((f"MK{mask}T", 3, mask[0], "an unknown residue is X") for mask in ("_", "?", "#", "[MASK]")),
    ("MK\u00e9", 3, "\u00e9", "U+00E9, LATIN SMALL LETTER E WITH ACUTE)"),
    ("MK\u0410T", 3, "\u0410", "U+0410, CYRILLIC CAPITAL LETTER A, which looks like A"),
    ("MK\u039aT", 3, "\u039a", "U+039A, GREEK CAPITAL LETTER KAPPA, which looks like K"),
    ("MK\uff34T", 3, "\uff34", "U+FF34, FULLWIDTH LATIN CAPITAL LETTER T, which looks like T"),
    ("MK\u2013T", 3, "\u2013", "U+2013, EN DASH, which looks like -"),
    ("MK\u200bT", 3, "\u200b", "U+200B"),
    ("M\x00K", 2, "\x00", "U+0000"),
    ("MK<mask>", 3, "<mask>", "belongs to predict"),
    ("MK<pad>", 3, "<", "<cls> and <eos> are added"),
]


@pytest.mark.parametrize(("sequence", "position", "character", "hint"), BAD)
def test_bad_letters(sequence: str, position: int, character: str, hint: str) -> None:
    with pytest.raises(InvalidSequence) as caught:
        tokenize(["MKT", sequence])
    assert (caught.value.item, caught.value.position, caught.value.character) == (1, position, character)
    message = str(caught.value)
    for part in ("item 1", f"position {position}", "ACDEFGHIKLMNPQRSTVWY", hint):
        assert part in message
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert (str(again), again.item, again.position, again.character) == (message, 1, position, character)


@pytest.mark.parametrize("mask", ["_", "?", "#", "[MASK]", "[mask]", "<MASK>", "<mask", "<Mask>"])
def test_masks_as_others_write_them(mask: str) -> None:
    with pytest.raises(InvalidSequence, match="a mask is written <mask>"):
        tokenize([f"M<mask>K{mask}T"], masks=True)


DNA, CODES, GAPS = "ATGGCCAAAGTTTAG", "METLYSTHR", "MK--TAYI"


@pytest.mark.parametrize(
    ("sequence", "said"),
    [
        (DNA, "nucleotides"), ("AUGGCCNNAAGU", "nucleotides"), ("ACG-TTACGGATTA", "nucleotides"),
        (CODES, "three-letter"), ("ALA-GLY-SER-SEC", "three-letter"), (GAPS, "gaps (-)"), ("-MK", "gaps (-)"),
        ("MKTAYIAKQRQISFVKSHFSRQ", None), ("GATTACA", None), ("AAAAAAAAAAAAAA", None), ("GAGAGAGAGAGAGA", None),
        ("METLYS", None), ("METLYSTHRK", None),
    ],
)  # fmt: skip
def test_allowed_and_yet_seldom_meant(sequence: str, said: str | None) -> None:
    notes = SequenceNotes()
    notes.look("MKTAYI")
    notes.look(sequence)
    assert len(notes.texts()) == (said is not None)
    assert all(text.startswith("1 sequence (first: number 2)") for text in notes.texts())
    assert all(str(said) in text for text in notes.texts())


def test_one_note_a_call_at_every_door(model: ESM2, tmp_path: Path) -> None:
    """A warning for each kind, not for each sequence; it points to the caller."""
    fasta = tmp_path / "x.fasta"
    odd = [DNA, "MKT", GAPS, CODES, DNA + DNA]
    fasta.write_text("".join(f">s{i}\n{sequence}\n" for i, sequence in enumerate(odd)))
    convert = fair_esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    several = ["2 sequences", "1 sequence", "1 sequence"]
    doors: list[tuple[list[str], Any]] = [
        (several, lambda: model.encode(odd)),
        (several, lambda: model.log_prob(iter(odd))),
        (several, lambda: list(model.embed_iter(odd))),
        (several, lambda: embed_fasta(fasta, tmp_path / "out", model)),
        (several, lambda: convert(list(zip("abcde", odd, strict=True)))),
        (["1 sequence"], lambda: model.predict([DNA + "<mask>"])),
        (["1 sequence"], lambda: model.score_mutations(DNA, ["A1C"], "wt-marginals")),
        (["1 sequence"], lambda: model.scan_mutations(DNA, "wt-marginals")),
    ]
    for counts, door in doors:
        with pytest.warns(InputWarning, match="nucleotides. ESM-2 reads amino acids") as told:
            door()
        notes = [one for one in told if one.category is InputWarning]
        assert [str(one.message).split(" (")[0] for one in notes] == counts
        assert {one.filename for one in notes} == {__file__} or door is doors[3][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(["MKTAYIAKQR", "GATTACA"])
        with pytest.raises(InvalidMutation):  # an error comes first, alone
            model.score_mutations(DNA, ["A1"])


@pytest.mark.parametrize(
    ("batch", "masks", "message"),
    [
        ([], False, "empty"),
        ([""], False, "item 0.*empty"),
        (["M", ""], False, "item 1.*empty"),
        (["A" * 2049], False, "2049 residues, at most 2048"),
        (["A" * 100_000], False, "100000"),
        (["<mask>" * 2049], True, "2049 residues, at most 2048"),
        (["MKT"], True, "no <mask>"),
        (["M<mask><mask>-"], True, "'-' at position 4.*gaps"),
        ([b"MKT"], False, "item 0.*expected a string, got bytes"),
        ([None], False, "item 0.*expected a string, got NoneType"),
    ],
)
def test_bad_batches(batch: object, masks: bool, message: str) -> None:
    """What is no list of texts at all: test_given.py."""
    with pytest.raises(InvalidSequence, match=message):
        tokenize(batch, masks=masks)  # type: ignore[arg-type]
