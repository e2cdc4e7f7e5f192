"""Tokens; bad letters, with item, position and what is allowed; FASTA as people have it; formats that are refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import fasta, rows

from numpyesm import ESM2, InvalidMutation, InvalidSequence
from numpyesm.alphabet import TOKENS, SequenceNotes, tokenize
from numpyesm.bulk import embed_fasta
from numpyesm.cli.inputs import read_records
from numpyesm.compat import fair_esm
from numpyesm.errors import InputWarning
from numpyesm.fasta import MAX_LETTERS, Record, clean_sequence, read_fasta, record_name, scan_fasta


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


# As others write them.
MASKS = ["_", "?", "#", "[MASK]", "[mask]", "<MASK>", "<mask", "<Mask>"]
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
    assert all(text.startswith("1 sequence (first: item 1)") for text in notes.texts())
    assert all(str(said) in text for text in notes.texts())


def test_one_note_a_call_at_every_door(model: ESM2, tmp_path: Path) -> None:
    """A warning for each kind, not for each sequence; it points to the caller."""
    odd = [DNA, "MKT", GAPS, CODES, DNA + DNA]
    source = fasta(tmp_path / "x.fasta", *zip("abcde", odd, strict=True))
    convert = fair_esm.Alphabet.from_architecture("ESM-1b").get_batch_converter()
    several = ["2 sequences", "1 sequence", "1 sequence"]
    doors: list[tuple[list[str], Any]] = [
        (several, lambda: model.encode(odd)),
        (several, lambda: model.log_prob(iter(odd))),
        (several, lambda: list(model.embed_iter(odd))),
        (several, lambda: embed_fasta(source, tmp_path / "out", model)),
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
        (["M", ""], False, "item 1.*empty"),
        (["A" * 2049], False, "2049 residues, at most 2048"),
        (["<mask>" * 2049], True, "2049 residues, at most 2048"),
        (["MKT"], True, "no <mask>"),
        (["M<mask><mask>-"], True, "'-' at position 4.*gaps"),
        *(([f"M<mask>K{mask}T"], True, "a mask is written <mask>") for mask in MASKS),
        ([b"MKT"], False, "item 0.*expected a string, got bytes"),
    ],
)
def test_bad_batches(batch: object, masks: bool, message: str) -> None:
    """What is no list of texts at all: test_given.py."""
    with pytest.raises(InvalidSequence, match=message):
        tokenize(batch, masks=masks)  # type: ignore[arg-type]


# -- FASTA -----------------------------------------------------------------------------------------------------------

TEXT = ">a first one\nMKT\nAYI\n\n>b\nMK*\n"
PLAIN = TEXT.encode()
RECORDS = [Record("a", "a first one", "MKTAYI"), Record("b", "b", "MK")]


def stream(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def read(data: bytes | str) -> list[Record]:
    return list(read_fasta(stream(data.encode() if isinstance(data, str) else data)))


def zipped(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("_", "."), text)
    return buffer.getvalue()


FORMS = {
    "plain": PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "CR": PLAIN.replace(b"\n", b"\r"),
    "lower case": PLAIN.lower(),
    "gzip": gzip.compress(PLAIN),
    "bzip2": bz2.compress(PLAIN),
    "xz": lzma.compress(PLAIN),
    "zip": zipped(x_fasta=TEXT, __MACOSX="junk"),
    "UTF-8 with a mark": TEXT.encode("utf-8-sig"),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, big end first, no mark": TEXT.encode("utf-16-be"),
    "no last line end": PLAIN.rstrip(),
    "comment": b"; a comment\n" + PLAIN,
    "blanks": PLAIN.replace(b"MKT\nAYI", b"  MKT AYI  "),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, tmp_path: Path) -> None:
    assert read(FORMS[form]) == RECORDS
    (tmp_path / "x").write_bytes(FORMS[form])
    assert list(read_fasta(tmp_path / "x")) == RECORDS


def test_names() -> None:
    assert [r.id for r in read("MKT\nAK\n")] == ["sequence_1", "sequence_2"]
    for name, expected in (
        ("sp|P12345|AATM_RABIT", "P12345"),
        ("tr|A0A1-2|X", "A0A1-2"),
        ("gi|6|ref|NP_1.1|", "NP_1.1"),
        ("UniRef50_P12345", "UniRef50_P12345"),
        ("a|b", "a|b"),
    ):
        assert (record_name(name, "accession"), record_name(name, "first-word")) == (expected, name)


@pytest.mark.parametrize("ids", ["first-word", "accession"])
def test_nameless_records_are_called_by_their_place_at_every_door(model: ESM2, tmp_path: Path, ids: str) -> None:
    inputs = [str(tmp_path / name) for name in ("named.fasta", "more.fasta")]
    Path(inputs[0]).write_text(">sp|P12345|AATM_RABIT x\nMK\n>\nMA\n")
    Path(inputs[1]).write_text(">  \nMC\n>tr|A0A1|B c\nMD\n")
    expected = [record_name("sp|P12345|AATM_RABIT", ids), "sequence_2", "sequence_3", record_name("tr|A0A1|B", ids)]
    assert [record.id for record in read_records([*inputs, "ME"], ids=ids)] == [*expected, "sequence_5"]
    embed_fasta(inputs, tmp_path / "embedded", model, ids=ids)
    assert [row["id"] for row in rows(tmp_path / "embedded")] == expected
    given: list[Any] = [("a", "MK"), ("", "MA"), Record("", "", "MC"), (None, "MD"), "ME", Record("b", "b c", "MF")]
    found = [record.id for record, _ in model.embed_iter(given)]
    assert found == ["a", "sequence_2", "sequence_3", "sequence_4", "sequence_5", "b"]
    assert [record.id for record, _ in model.embed_iter({"a": "MK", "": "MA"})] == ["a", "sequence_2"]


def test_letters() -> None:
    assert read(">m\nMK<ma\nsk>T\n")[0].sequence == "MK<mask>T"
    assert clean_sequence("MK*T*") == "MK*T"  # one trailing star only
    assert clean_sequence("mkß<MASK>ſt") == "MKß<mask>ſT"  # ASCII alone is raised
    assert read(">u\nMKTAYIAKQR QISFVKSHFS\nRQLEE\n>p\nK A <mask> I\n")[0].sequence == "MKTAYIAKQRQISFVKSHFSRQLEE"


W = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVK"  # 60 letters


@pytest.mark.parametrize(
    ("lines", "lengths"),
    [
        ([W, W, W[:20]], [140]),
        ([W, W[:9]], [69]),
        ([W, W], [120]),
        ([W[:33], W[:33], W[:8]], [74]),
        ([W, W[:9], "", W, W, W[:5]], [69, 125]),  # paragraphs
        (["MKT", "AKWY", "MK"], [3, 4, 2]),
        ([W[:9], W[:9], W[:9]], [9, 9, 9]),  # a list of peptides
        ([W] * 40, [60] * 40),  # longer than the model takes: a library
        ([W[:33], W[:8]], [33, 8]),
        ([W, W[:9], W], [60, 9, 60]),
        ([W, "AK<mask>Y"], [69]),
    ],
)
@pytest.mark.filterwarnings("ignore::numpyesm.errors.InputWarning")
def test_without_headers(lines: list[str], lengths: list[int]) -> None:
    records = read("\n".join(lines))
    assert [len(r.sequence) for r in records] == lengths
    assert "".join(r.sequence for r in records) == "".join(lines)


def test_what_is_dropped_or_joined_is_told_once() -> None:
    with pytest.warns(InputWarning, match=r"-- \(grep's separator\) are left out, the first in line 3") as told:
        assert read(">a\nMKT\n--\n>b\nMKA\n--\n") == [Record("a", "a", "MKT"), Record("b", "b", "MKA")]
    assert len(told) == 1
    with pytest.warns(InputWarning, match="read as one sequence, from line 2"):
        read(f"\n{W}\n{W[:9]}")


OTHERS = {
    "FASTQ": "@r1 x\nMKT\n+\nIII\n",
    "SAM": "@HD\tVN:1.6\n",
    "GenBank": "LOCUS       NP_000509  147 aa  linear\n",
    "UniProt": "ID   LYSC_CHICK              Reviewed;         147 AA.\n",
    "PDB": "ATOM      1  N   MET A   1      27.340  24.430\n",
    "mmCIF": "data_1AKE\n#\n",
    "Clustal": "CLUSTAL O(1.2.4) multiple sequence alignment\n\na MKT\n",
    "PHYLIP": "\n 2 60\nCow       MKT\n",
    "Stockholm": "# STOCKHOLM 1.0\n",
    "NEXUS": "#NEXUS\nbegin data;\n",
    "A3M": "#58\t1\n>q\nMKT\n",
    "A3M or A2M": ">q\nMKTAY\n>h\nMK-AY\n>i\nMKaTA-\n",
    "NBRF/PIR": ">P1;CRAB\ntitle of it\nMKT*\n",
    "JSON": '[{"id": "a"}]',
    "HTML": "<!DOCTYPE html>",
    "HTML or XML": "<uniprot xmlns='x'>",
    "Git LFS": "version https://git-lfs.github.com/spec/v1\n",
    "table .columns separated by tabs": "LYSC\tKVFGRC\n",
    "table .columns separated by commas": "id,sequence\na,MKT\n",
    "'sequence' is a column's title": "sequence\nMKT\n",
    "'Heavy' is a column's title": "Heavy\nMKT\nMKA\n",
    "is text or a table": "Cow       MKTAYI\n",
    "line 2: 'Sequence unavailable' is text": ">a\nSequence unavailable\n",
    "line 4: .* separated by commas": ">a\nMKT\n>b\nMKT,AYI\n",
}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        *((text.encode(), f"input, line [0-9]+: .*{said}|input, {said}") for said, text in OTHERS.items()),
        (b"", "input: no sequences"),
        (b">a\n>b\nMK\n", "line 1: no sequence .record 'a'"),
        (b">a\nMK\n>b\n", "line 3: no sequence .record 'b'"),
        (b">a\tMKT\n", "is it in the header"),
        (b">a\n*\n", "no sequence"),
        (b">a\nMK\n>b\n--.-\n", "no residue, only gaps .record 'b'"),
        (b">a\nNaN\n", "a missing value"),
        (b"MK\n>b\nMK\n", "line 2: a FASTA header after"),
        (gzip.compress(PLAIN)[:-6], "the gzip data are damaged or cut short"),
        (lzma.compress(PLAIN)[:-6], "the xz data are damaged"),
        (zipped(a="x", b="x"), "a zip archive of 2 files"),
        (zipped(a=TEXT)[:-30], "the zip archive cannot be read"),
        (b"\x28\xb5\x2f\xfd??", "zstd|not a text"),
        (b"PAR1\x15\x04", "Parquet"),
        (b">a\n\xff\xfe\x00", "not a text file"),
        (b">" + b"a" * (MAX_LETTERS + 1), "a line of more than"),
    ],
)
@pytest.mark.filterwarnings("ignore::numpyesm.errors.InputWarning")
def test_what_is_no_fasta_is_named(data: bytes, said: str) -> None:
    with pytest.raises(InvalidSequence, match=said):
        read(data)


@pytest.mark.parametrize("data", [b">a\n%b\n", b"%b\n", b">a\n%b*\n", b">a\nM\nK%b*\n"])
def test_records_of_more_than_a_million_letters(data: bytes) -> None:
    most = data % (b"A" * (MAX_LETTERS - data.count(b"M") - data.count(b"K")))
    ((record, problem),) = scan_fasta(stream(most))
    assert (len(record.sequence), problem) == (MAX_LETTERS, None)
    longer = data % (b"A " * (MAX_LETTERS + 1))
    ((record, problem),) = scan_fasta(stream(longer))
    assert MAX_LETTERS < len(record.sequence) < MAX_LETTERS + 4
    assert "more than 1000000 letters" in str(problem)
    with pytest.raises(InvalidSequence, match="more than 1000000"):
        read(longer)


@pytest.mark.slow
@pytest.mark.parametrize("text", [b">a\n" + b"A" * (1 << 25), b">a\n" + b"AAAAAAAAA\n" * (1 << 21)])
def test_a_gzip_bomb_costs_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(text, 9))
    tracemalloc.start()
    with pytest.raises(InvalidSequence):
        list(read_fasta(tmp_path / "x.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
