"""FASTA as people have it."""

from __future__ import annotations

import gzip
import io
import tracemalloc
from pathlib import Path

import pytest

from numpyesm import InvalidSequence
from numpyesm.fasta import Record, clean_sequence, read_fasta

PLAIN = b">a first one\nMKT\nAYI\n\n>b\nMK*\n"
RECORDS = [Record("a", "a first one", "MKTAYI"), Record("b", "b", "MK")]


def read(data: bytes) -> list[Record]:
    return list(read_fasta(io.BufferedReader(io.BytesIO(data))))


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.lower().replace(b"a first one", b"a first one"),
        gzip.compress(PLAIN),
        gzip.compress(PLAIN[:15]) + gzip.compress(PLAIN[15:]),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.rstrip(),
        b"; a comment\n" + PLAIN,
        PLAIN.replace(b"MKT\nAYI", b"  MKT AYI  "),
    ],
    ids=["plain", "crlf", "lower", "gzip", "two-gzip-members", "bom", "no-last-newline", "comment", "blanks"],
)
def test_forms(data: bytes) -> None:
    assert read(data) == RECORDS


def test_file_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.fasta.gz").write_bytes(gzip.compress(PLAIN))
    assert list(read_fasta(tmp_path / "x.fasta.gz")) == RECORDS


def test_bare_lines_and_masks() -> None:
    assert [r.sequence for r in read(b"MKT\nak<mask>y\n")] == ["MKT", "AK<mask>Y"]
    assert read(b">m\nMK<ma\nsk>T\n")[0].sequence == "MK<mask>T"


def test_only_one_trailing_star_is_dropped() -> None:
    assert clean_sequence("MK*T*") == "MK*T"


@pytest.mark.parametrize("data", [b">a\n%b\n", b"%b\n", b">a\n%b*\n", b">a\nM\nK%b*\n"])
def test_records_of_more_than_a_million_letters(data: bytes) -> None:
    most = data % (b"A" * (1_000_000 - data.count(b"M") - data.count(b"K")))
    (record,) = read_fasta(io.BufferedReader(io.BytesIO(most)), tolerant=True)
    assert len(record.sequence) == 1_000_000
    longer = data % (b"A " * 1_000_001)
    with pytest.raises(InvalidSequence, match="longer than 1000000"):
        read(longer)
    (record,) = read_fasta(io.BufferedReader(io.BytesIO(longer)), tolerant=True)
    assert 1_000_000 < len(record.sequence) < 1_000_004


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no sequences"),
        (b"\n\n", "no sequences"),
        (b">a\n>b\nMK\n", "'a' has no sequence"),
        (b">a\nMK\n>b\n", "'b' has no sequence"),
        (b"MK\n>b\nMK\n", "line 2"),
        (gzip.compress(PLAIN)[:-6], "damaged"),
        (b"\x1f\x8bnonsense", "damaged"),
        (b">a\n\xff\xfe\x00", "not a text file"),
    ],
)
def test_bad_files(data: bytes, message: str) -> None:
    with pytest.raises(InvalidSequence, match=message):
        read(data)


def test_a_gzip_bomb_costs_nothing(tmp_path: Path) -> None:
    for number, text in enumerate((b">a\n" + b"A" * (1 << 25), b">a\n" + b"AAAAAAAAA\n" * (1 << 21))):
        path = tmp_path / f"{number}.gz"
        path.write_bytes(gzip.compress(text, 9))
        tracemalloc.start()
        try:
            with pytest.raises(InvalidSequence):
                list(read_fasta(path))
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
