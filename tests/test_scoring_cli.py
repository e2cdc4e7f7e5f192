"""`numpyesm score` and `scan`: tables as people have them, kept as they are; one line for what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm import ESM2

WILD_TYPE = "MKTAYIAKQRW"
GYM = (
    "mutant,mutated_sequence,DMS_score,DMS_score_bin\n"
    "M1A,AKTAYIAKQRW,0.5,1\nK2R:T3S,MRSAYIAKQRW,0.25,0\nW11W,MKTAYIAKQRW,1e1,1\n"
)


@pytest.fixture
def score(run: Any) -> Any:
    """Score a table's variants of `WILD_TYPE`, or of another protein."""

    def call(table: str | bytes, *options: str, wild_type: str = WILD_TYPE) -> Any:
        Path("v.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        return run("score", wild_type, "v.csv", *options)

    return call


def added(out: bytes, delimiter: str = ",") -> list[str]:
    """The last column of a table."""
    return [row[-1] for row in csv.reader(io.StringIO(out.decode("utf-8-sig"), newline=""), delimiter=delimiter) if row]


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl"])
def test_proteingym_layout(score: Any, loaded: ESM2, method: str) -> None:
    Path("wt.fasta").write_text(f">wild\n{WILD_TYPE[:5]}\n{WILD_TYPE[5:]}\n")
    code, out, err = score(GYM, "--method", method, wild_type="wt.fasta")
    assert (code, added(out)[0]) == (0, method)
    expected = loaded.score_mutations(WILD_TYPE, ["M1A", "K2R:T3S", "W11W"], method)
    assert added(out)[1:] == [*map(repr, expected.tolist())]
    assert [line.rpartition(",")[0] for line in out.decode().splitlines()] == GYM.splitlines()
    from scipy.stats import spearmanr

    rho = spearmanr(expected, [0.5, 0.25, 10]).statistic
    assert f"Spearman of {method} and DMS_score: {rho:.4f} (3 of 3 rows)" in err


def test_fair_esm_layout_and_option_names(run: Any, loaded: ESM2) -> None:
    Path("blat.csv").write_text(",mutant,2500\n0,M24A,0.5\n1,R33W,-1\n2,K25P,0\n")
    code, out, err = run(
        "score", "--sequence", WILD_TYPE, "--dms-input", "blat.csv", "--mutation-col", "mutant", "--dms-output",
        "out.csv", "--offset-idx", "24", "--scoring-strategy", "wt-marginals", "--measured-col", "2500", "--nogpu",
        "--window", "5",
    )  # fmt: skip
    assert (code, out) == (0, b"")
    expected = loaded.score_mutations(WILD_TYPE, ["M1A", "R10W", "K2P"], "wt-marginals", window=5).tolist()
    assert added(Path("out.csv").read_bytes())[1:] == [*map(repr, expected)]
    assert "Spearman of wt-marginals and 2500" in err


def test_mutations_from_whole_sequences(score: Any, loaded: ESM2) -> None:
    _, out, _ = score("mutated_sequence\nMKTAYIAKQRA\nMKTAYIAKQRW\nCKTAYIAKQRF\n", "--offset", "5")
    assert added(out)[1:] == [*map(repr, loaded.score_mutations(WILD_TYPE, ["W11A", "WT", "M1C:W11F"]).tolist())]


@pytest.mark.parametrize("ending", ["xlsx", "parquet"])
def test_spreadsheets(run: Any, loaded: ESM2, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"Mutant": ["M1A", "p.Lys2Arg", "WT"], "DMS_score": [0.1, None, 2.0], "n": [1, 2, 3]})
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet("v.parquet")
    else:
        pytest.importorskip("openpyxl")
        with pandas.ExcelWriter("v.xlsx") as book:
            pandas.DataFrame({"about": ["this table"]}).to_excel(book, sheet_name="Read me", index=False)
            frame.to_excel(book, sheet_name="data", index=False, startrow=1)  # below an empty row
    code, out, err = run("score", WILD_TYPE, f"v.{ending}", "--method", "log-prob")
    assert code == 0, err
    scores = loaded.score_mutations(WILD_TYPE, ["M1A", "K2R", "WT"], "log-prob").tolist()
    assert out.decode().splitlines() == [
        "Mutant,DMS_score,n,log-prob", f"M1A,0.1,1,{scores[0]!r}", f"p.Lys2Arg,,2,{scores[1]!r}",
        f"WT,{'2' if ending == 'xlsx' else '2.0'},3,{scores[2]!r}",
    ]  # fmt: skip
    assert ("reading sheet 'data' of 2" in err) == (ending == "xlsx")
    monkeypatch.setitem(sys.modules, "pandas", None)
    code, _, err = run("score", WILD_TYPE, f"v.{ending}")
    assert (code, "pip install 'numpyesm[tables]'" in err) == (1, True)


def test_quotes_line_ends_and_blank_lines(score: Any) -> None:
    """BOM, CRLF, blank lines, quotes, line ends and delimiters inside quotes, no end of line at the end."""
    head = '\ufeff"mutant",note,"a ""b"", c"\r\n'
    body = ['M1A,"two\r\nlines, and ""quotes""",  x \r\n', "\r\n", "WT,ä 蛋白,\r\n", '"K2R:T3S",,1.50']
    code, out, err = score(head + "".join(body), "--column", 'my, "score"')
    assert (code, err.count("Spearman")) == (0, 0)
    name, first, wild, last = added(out)
    assert (name, float(wild)) == ('my, "score"', 0)
    expected = [
        head[:-2] + ',"my, ""score"""\r\n', body[0][:-2] + f",{first}\r\n", body[1], body[2][:-2] + f",{wild}\r\n",
        body[3] + f",{last}",
    ]  # fmt: skip
    assert out.decode() == "".join(expected)


@pytest.mark.parametrize(
    ("encoding", "mark", "delimiter"),
    [("cp1252", b"", ";"), ("latin-1", b"", "\t"), ("utf-8-sig", b"", ";"), ("utf-16-le", b"\xff\xfe", "\t"),
     ("utf-16-be", b"\xfe\xff", ";"), ("utf-16-le", b"", ";"), ("utf-32", b"", "\t")],
)  # fmt: skip
def test_encodings_and_delimiters(score: Any, encoding: str, mark: bytes, delimiter: str) -> None:
    head, row = ["MUTANT", "Größe"], ["M1A", "\u20ac" if encoding == "cp1252" else "ÿ\x81"]

    def written(*rows: list[str]) -> bytes:
        return mark + "".join(delimiter.join(row) + "\r\n" for row in rows).encode(encoding)

    code, out, err = score(written(head, row), "--method", "log-prob")
    assert code == 0, err
    value = out.removeprefix(mark).decode(encoding).split(delimiter)[-1].strip()
    assert float(value) != 0
    assert out == written([*head, "log-prob"], [*row, value])
    # A name that the encoding has no letters for: all of it becomes UTF-8.
    code, out, _ = score(written(head, row), "--column", "Δ蛋")
    now = encoding if mark or encoding.startswith("utf") else "utf-8"
    assert (code, out.decode(now).splitlines()[0].split(delimiter)[-1]) == (0, "Δ蛋")


def test_excels_delimiter_comments_and_fields_of_any_length(score: Any, loaded: ESM2) -> None:
    """Below the header `#` may begin a row's id."""
    table = [
        "sep=|\r\n", "# made by 'us, \"a|b|c\r\n", "\r\n", "id|Mutant|DMS_SCORE|note\r\n", "#1|M1A|1|\r\n",
        '# "open\r\n', f'2|K2R|2|"{"x" * 200_000}"\r\n', "#3|p.(Thr3Ser)|3|\r\n",
    ]  # fmt: skip
    limit = csv.field_size_limit()
    code, out, err = score("".join(table), "--method", "wt-marginals")
    assert (code, csv.field_size_limit(), "(3 of 3 rows)" in err) == (0, limit, True)
    first, second, third = loaded.score_mutations(WILD_TYPE, ["M1A", "K2R", "T3S"], "wt-marginals").tolist()
    news = ["", "", "", "|wt-marginals", f"|{first!r}", "", f"|{second!r}", f"|{third!r}"]
    assert out.decode() == "".join(line[:-2] + new + "\r\n" for line, new in zip(table, news, strict=True))
    assert score("sep=;\n#c\nmutant;x\nM1A;1\n# M1C;2\nM1D;3\n", "-o", "v.tsv").code == 0
    assert [line.split("\t")[0] for line in Path("v.tsv").read_text().splitlines()] == ["mutant", "M1A", "M1D"]
    code, out, _ = score("mutant,x\rWT,1\rWT,2\r")  # old line ends
    assert (code, out) == (0, b"mutant,x,masked-marginals\rWT,1,0.0\rWT,2,0.0\r")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("mutant,DMS_score\nM1A,1\nM1C,\nM1D,NaN\nM1E,NA\nM1F,oops\nM1G,3\nM1H,2\n",
         ["1 values of DMS_score are not numbers (first in line 6)", "(3 of 7 rows)"]),
        ("mutant,DMS_score\nM1A,1\nM1C,1\n", ["not defined"]),
        ("mutant,DMS_score\n", ["not defined"]),
        (",mutant,2500,pseudo-ppl,note\n0,M1A,1,5,a\n1,M1C,NA,6,b\n2,M1D,3,7,c\n", ["log-prob and 2500"]),
        ("mutant,ddG,position\nM1A,1,1\nM1C,2,1\n", ["say with --measured-col which of 'ddG', 'position' is measured"]),
        ("mutant\nM1A\n", []),
    ],
)  # fmt: skip
def test_correlation(score: Any, table: str, said: list[str]) -> None:
    code, out, err = score(table, "--method", "log-prob")
    assert (code, len(added(out))) == (0, table.count("\n"))
    assert all(part in err for part in said), err
    assert ("Spearman of " in err) == ("not defined" in err or "rows)" in err)


def test_skip_invalid(score: Any, loaded: ESM2) -> None:
    table = "HGVS_pro,DMS_score\n_wt,1\np.Lys2Ter,2\nM1del,3\nA1G,4\np.[Met1Ala;Lys2Arg],5\n"
    code, out, err = score(table, "--mutation-col", "hgvs_pro", "--skip-invalid")
    wild, double = loaded.score_mutations(WILD_TYPE, ["WT", "M1A:K2R"]).tolist()
    assert (code, added(out)[1:]) == (0, [repr(wild), "", "", "", repr(double)])
    assert "3 of 5 rows left without a score" in err
    assert "line 3: p.Lys2Ter: 'Lys2Ter' is not a substitution: a stop codon" in err
    assert [f"line {line}: {text}: " in err for line, text in ((4, "M1del"), (5, "A1G"))] == [True, True]
    assert "(2 of 5 rows)" in err
    code, out, _ = score("mutant\nM1A\nX3A\n", "--method", "log-prob", "--skip-invalid", wild_type="MKX")
    assert (code, added(out)[2]) == (0, "")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"\xef\xbb\xbf \r\n\r\n", "v.csv is empty"),
        (b"variant,score\nM1A,1\n", "has no column 'mutant'; its columns are 'variant', 'score': choose with --mut"),
        (b"Mutant,MUTANT\nM1A,M1C\n", "2 columns are called 'mutant'; --mutation-col NAME chooses"),
        (b"mutant,variant\n1,M1A\n2,M1C\n", "nothing in column 'mutant' is a mutation: choose another with --mut"),
        (b"mutant,x\nM1A,1\nM1C\n", "line 3: 1 fields, but the header has 2 columns"),
        (b'mutant,x\nM1A,1\nM1C,"2"3\n', "line 3: ',' expected after '\"'"),
        (b"sep=;\n#c\nmutant;x\nM1A;1\n# M1C;2\nM1D;3\nA1D;3\n", "line 7: A1D: the wild type has M"),
        (b'x,mutant\n"a\nb",M1A\n1,K2R:M1Z\n', "line 4: K2R:M1Z: M1Z: Z is not one of the 20 amino acids"),
        (b"mutant,x\nM1A,\n,1\n", "line 3: the mutation is empty"),
        (b"mutated_sequence\nMKTAYIAKQRA\nMKTAYIAKQR\n", "line 3: the mutated_sequence has 10 residues, the wild type"),
        (b"mutant,mutated_sequence\nM1A,CKTAYIAKQRW\n", "line 2: M1A does not turn the wild type into"),
        (b"mutant,masked-marginals\nM1A,1\n", "has a column 'masked-marginals' already"),
        (b"# nothing\n", "holds comments only"),
        (b"\xff\xfem\0u\0t\0a\0n\0t\0\n", "the UTF-16-LE text is damaged or cut short"),
        (gzip.compress(GYM.encode())[:-9], "damaged or cut short"),
        (b"PAR1 and no more", "the Parquet file cannot be read"),
    ],
)
def test_tables_that_are_refused(score: Any, table: bytes, said: str) -> None:
    code, out, err = score(table, "-o", "out.csv")
    assert code in (1, 2)
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert (out, Path("out.csv").exists()) == (b"", False)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("MKT none.csv", 1, "there is no file 'none.csv'"),
        ("MKT .", 1, "is a folder"),
        ("MKT", 2, "expected a wild type and a table"),
        ("two.fasta v.csv", 1, "2 sequences (a, b), expected one wild type"),
        ("MKX v.csv --method log-prob", 1, "v.csv, line 3: X3A: X is not one of the 20 amino acids"),
        ("MKX v.csv -o v.csv", 2, "is the input itself"),
        ("MKX v.csv --mutation-col x", 1, "no column 'x'; its columns are 'mutant': choose with --mutation"),
        ("MKX v.csv --column mutant", 2, "already"),
        ("MKX v.csv --window 0", 2, "from 1 to 2048"),
        ("MKX v.csv --window gym", 2, "expected a number of residues, or proteingym"),
        ("- -", 2, "cannot both come from standard input"),
        ("--model-location a b --sequence MKX --dms-input v.csv", 2, "one at a time"),
    ],
)
def test_wrong_use(run: Any, arguments: str, code: int, said: str) -> None:
    Path("v.csv").write_text("mutant\nM1A\nX3A\n")
    Path("two.fasta").write_text(">a\nMKT\n>b\nMKT\n")
    done = run("score", *arguments.split())
    assert done[:2] == (code, b"")
    assert said in done.err
    assert Path("v.csv").read_text() == "mutant\nM1A\nX3A\n"


def test_scan_writes_matrix_and_heat_map(run: Any, loaded: ESM2) -> None:
    assert run("scan", WILD_TYPE, "-o", "scan.csv", "--offset", "24")[:2] == (0, b"")
    header, *rows = csv.reader(Path("scan.csv").read_text().splitlines())
    assert header == ["position", "wild_type", *"ACDEFGHIKLMNPQRSTVWY"]
    assert [row[:2] for row in rows] == [[str(i), letter] for i, letter in enumerate(WILD_TYPE, start=24)]
    expected = loaded.scan_mutations(WILD_TYPE).scores
    np.testing.assert_array_equal(np.array([row[2:] for row in rows], np.float64), expected)
    assert Path("scan.png").read_bytes().startswith(b"\x89PNG")
    assert run("scan", WILD_TYPE, "-o", "s.json.xz", "--no-heatmap").code == 0
    document = json.loads(lzma.decompress(Path("s.json.xz").read_bytes()))
    np.testing.assert_array_equal(document["scores"], expected)
    assert not Path("s.png").exists()
    code, out, _ = run("scan", WILD_TYPE, "--method", "wt-marginals")
    assert (code, len(out.splitlines())) == (0, 12)
    assert b"K" in out.splitlines()[2]


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("--heatmap long.png -o long.tsv --window proteingym", {"long.png", "long.tsv"}),
        ("-o folder/", {"folder/scan.csv", "folder/scan.png"}),
        ("-o a.csv --heatmap a.csv", None),
        ("--heatmap x.png --no-heatmap", None),
    ],
)
@pytest.mark.slow
def test_scan_outputs(run: Any, arguments: str, written: set[str] | None) -> None:
    assert run("scan", "MXK" * 50, *arguments.split()).code == (2 if written is None else 0)
    assert {str(path) for path in Path().rglob("*.*")} == (written or set())


def test_scan_without_matplotlib(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("scan", "MKT", "-o", "b.csv")
    assert (code, "no heat map" in err, Path("b.csv").exists()) == (0, True, True)
    code, _, err = run("scan", "MKT", "-o", "c.csv", "--heatmap", "c.png")
    assert (code, "numpyesm[plot]" in err, Path("c.csv").exists()) == (1, True, False)


def test_standard_input_and_the_format_that_the_ending_names(run: Any) -> None:
    Path("gym.csv.gz").write_bytes(gzip.compress(GYM.encode()))
    done = run("score", WILD_TYPE, "gym.csv.gz", "--method", "log-prob")
    assert run("score", WILD_TYPE, "-", "--method", "log-prob", "-o", "out.tsv", stdin=GYM.encode()).code == 0
    assert (done.code, added(Path("out.tsv").read_bytes(), "\t")) == (0, added(done.out))
    assert Path("out.tsv").read_text().startswith("mutant\tmutated_sequence\t")
