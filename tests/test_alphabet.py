"""Tokens, and every kind of bad input with the item, the position and what is allowed."""

from __future__ import annotations

import pickle

import pytest

from numpyesm import InvalidSequence
from numpyesm.alphabet import AMINO_ACIDS, TOKENS, residue_tokens, tokenize


def test_vocabulary_is_fair_esms() -> None:
    esm = pytest.importorskip("esm")
    assert list(TOKENS) == esm.data.Alphabet.from_architecture("ESM-1b").all_toks
    assert "".join(AMINO_ACIDS) == "LAGVSERTIDPKQNFYMHWC"


def test_tokens_of_all_letters() -> None:
    ids = tokenize(["ACDEFGHIKLMNPQRSTVWYBXZUO-"])[0]
    assert [TOKENS[i] for i in ids] == ["<cls>", *"ACDEFGHIKLMNPQRSTVWYBXZUO-", "<eos>"]


def test_mask_is_one_residue() -> None:
    assert [TOKENS[i] for i in tokenize(["M<mask>U"], masks=True)[0]] == ["<cls>", "M", "<mask>", "U", "<eos>"]
    assert residue_tokens("M<mask><mask>F") == ["M", "<mask>", "<mask>", "F"]


@pytest.mark.parametrize("length", [1, 2048])
def test_allowed_lengths(length: int) -> None:
    assert len(tokenize(["A" * length])[0]) == length + 2
    assert len(tokenize(["<mask>" * length], masks=True)[0]) == length + 2


# sequence, position, character, part of the message
BAD = [
    ("MkT", 2, "k", "lower case"),
    ("M T", 2, " ", "blank"),
    ("MKT\n", 4, "\n", "blank"),
    ("MK7", 3, "7", "expected one of"),
    ("MK*", 3, "*", "expected one of"),
    ("JMK", 1, "J", "expected one of"),
    ("MKé", 3, "é", "expected one of"),
    ("M.K", 2, ".", "expected one of"),
    ("M\x00K", 2, "\x00", "expected one of"),
    ("MK<mask>", 3, "<mask>", "predict"),
    ("MK<pad>", 3, "<", "expected one of"),
    ("MK＞", 3, "＞", "expected one of"),
]


@pytest.mark.parametrize(("sequence", "position", "character", "message"), BAD)
def test_bad_character_in_encode(sequence: str, position: int, character: str, message: str) -> None:
    with pytest.raises(InvalidSequence, match=message) as caught:
        tokenize(["MKT", sequence])
    assert (caught.value.item, caught.value.position, caught.value.character) == (1, position, character)
    assert "item 1" in str(caught.value)
    assert f"position {position}" in str(caught.value)
    assert "ACDEFGHIKLMNPQRSTVWY" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_bad_character_in_predict_counts_masks_as_one() -> None:
    with pytest.raises(InvalidSequence, match="gaps") as caught:
        tokenize(["M<mask><mask>-"], masks=True)
    assert caught.value.position == 4


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
        ("MKT", False, "list of sequences"),
        (b"MKT", False, "list of sequences"),
        ([b"MKT"], False, "item 0.*expected a string, got bytes"),
        ([None], False, "item 0.*expected a string, got NoneType"),
        ([["M"]], False, "item 0.*expected a string, got list"),
        (7, False, "list of sequences, got int"),
    ],
)
def test_bad_batches(batch: object, masks: bool, message: str) -> None:
    with pytest.raises(InvalidSequence, match=message):
        tokenize(batch, masks=masks)  # type: ignore[arg-type]


def test_error_survives_pickling() -> None:
    error = InvalidSequence("wrong", item=3, position=2, character="x")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (str(again), again.item, again.position, again.character) == ("item 3: wrong", 3, 2, "x")
