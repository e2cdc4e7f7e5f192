"""`numpyesm score` and `scan`: tables as people have them, kept as they are; one line for what is wrong."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2
from numpyesm.cli import main
from numpyesm.cli.variant_table import InvalidTable, read_table

WILD_TYPE = "MKTAYIAKQRW"
WEIGHTS = ["--weights", "synthetic:esm2-8m", "--backend", "numpy"]

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")


@pytest.fixture(scope="module")
def eight_m() -> ESM2:
    return ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, eight_m: ESM2) -> None:
    """The model is loaded once for the module."""
    monkeypatch.setattr(ESM2, "from_pretrained", classmethod(lambda cls, *_, **__: eight_m))


@pytest.fixture
def run(capfdbinary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(exit code, stdout, stderr) of a command line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, bytes, str]:
        capfdbinary.readouterr()
        try:
            code = main([*arguments, *WEIGHTS])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfdbinary.readouterr()
        return code, out, err.decode()

    return call


def added(out: bytes, delimiter: str = ",") -> list[str]:
    """The last column of a table."""
    return [row[-1] for row in csv.reader(io.StringIO(out.decode("utf-8-sig"), newline=""), delimiter=delimiter) if row]


GYM = (
    "mutant,mutated_sequence,DMS_score,DMS_score_bin\n"
    "M1A,AKTAYIAKQRW,0.5,1\nK2R:T3S,MRSAYIAKQRW,0.25,0\nW11W,MKTAYIAKQRW,1e1,1\n"
)


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals", "log-prob", "pseudo-ppl"])
def test_proteingym_layout(run: Any, eight_m: ESM2, method: str) -> None:
    Path("gym.csv").write_text(GYM)
    Path("wt.fasta").write_text(f">wild\n{WILD_TYPE[:5]}\n{WILD_TYPE[5:]}\n")
    code, out, err = run("score", "wt.fasta", "gym.csv", "--method", method)
    assert code == 0
    name, *values = added(out)
    assert name == method
    expected = eight_m.score_mutations(WILD_TYPE, ["M1A", "K2R:T3S", "W11W"], method)
    assert [float(value) for value in values] == expected.tolist()
    assert [line.rpartition(",")[0] for line in out.decode().splitlines()] == GYM.splitlines()
    from scipy.stats import spearmanr

    rho = spearmanr(expected, [0.5, 0.25, 10]).statistic
    assert f"Spearman of {method} and DMS_score: {rho:.4f} (3 of 3 rows)" in err


def test_fair_esm_layout_and_option_names(run: Any, eight_m: ESM2) -> None:
    table = ",mutant,2500\n0,M24A,0.5\n1,R33W,-1\n2,K25P,0\n"
    Path("blat.csv").write_text(table)
    code, out, err = run(
        "score", "--sequence", WILD_TYPE, "--dms-input", "blat.csv", "--mutation-col", "mutant", "--dms-output",
        "out.csv", "--offset-idx", "24", "--scoring-strategy", "wt-marginals", "--measured-col", "2500",
        "--nogpu",
    )  # fmt: skip
    assert (code, out) == (0, b"")
    values = [float(value) for value in added(Path("out.csv").read_bytes())[1:]]
    assert values == eight_m.score_mutations(WILD_TYPE, ["M1A", "R10W", "K2P"], "wt-marginals").tolist()
    assert "Spearman of wt-marginals and 2500" in err


def test_every_byte_of_the_table_is_kept(run: Any) -> None:
    """BOM, CRLF, blank lines, quotes, line ends and delimiters inside quotes, no end of line at the end."""
    head = '\ufeff"mutant",note,"a ""b"", c"\r\n'
    body = ['M1A,"two\r\nlines, and ""quotes""",  x \r\n', "\r\n", "WT,ä 蛋白,\r\n", '"K2R:T3S",,1.50']
    Path("odd.csv").write_bytes((head + "".join(body)).encode())
    code, out, err = run("score", WILD_TYPE, "odd.csv", "--column", 'my, "score"')
    assert (code, err.count("Spearman")) == (0, 0)
    name, first, wild, last = added(out)
    assert name == 'my, "score"'
    assert float(wild) == 0
    expected = [
        head[:-2] + ',"my, ""score"""\r\n', body[0][:-2] + f",{first}\r\n", body[1], body[2][:-2] + f",{wild}\r\n",
        body[3] + f",{last}",
    ]  # fmt: skip
    assert out.decode() == "".join(expected)


@pytest.mark.parametrize("delimiter", ["\t", ";"])
def test_other_delimiters(run: Any, delimiter: str) -> None:
    Path("v.tsv").write_text(f"id{delimiter}mutant\n1, 2{delimiter}M1A\n")
    code, out, _ = run("score", WILD_TYPE, "v.tsv")
    assert code == 0
    assert out.decode().splitlines()[0] == f"id{delimiter}mutant{delimiter}masked-marginals"
    assert float(added(out, delimiter)[1]) != 0


def test_mutations_from_whole_sequences(run: Any, eight_m: ESM2) -> None:
    Path("s.csv").write_text("mutated_sequence\nMKTAYIAKQRA\nMKTAYIAKQRW\nCKTAYIAKQRF\n")
    code, out, _ = run("score", WILD_TYPE, "s.csv", "--offset", "5")
    assert code == 0
    expected = eight_m.score_mutations(WILD_TYPE, ["W11A", "WT", "M1C:W11F"])
    assert [float(value) for value in added(out)[1:]] == expected.tolist()
    Path("s.csv").write_text("mutated_sequence\nMKTAYIAKQRA\nMKTAYIAKQR\n")
    code, out, err = run("score", WILD_TYPE, "s.csv")
    assert code == 1
    assert "s.csv, line 3: the mutated_sequence has 10 residues, the wild type 11" in err


def test_measured_values_that_are_missing(run: Any) -> None:
    rows = ["M1A,1", "M1C,", "M1D,NaN", "M1E,NA", "M1F,oops", "M1G,3", "M1H,2"]
    Path("v.csv").write_text("mutant,DMS_score\n" + "\n".join(rows) + "\n")
    code, out, err = run("score", WILD_TYPE, "v.csv")
    assert code == 0
    assert len(added(out)) == 8
    assert "1 values of DMS_score are no numbers (first in line 6)" in err
    assert "(3 of 7 rows)" in err
    Path("v.csv").write_text("mutant,DMS_score\nM1A,1\nM1C,1\n")
    assert "not defined" in run("score", WILD_TYPE, "v.csv")[2]


def test_the_only_column_of_numbers_is_the_measured_one(run: Any) -> None:
    Path("v.csv").write_text(",mutant,2500,pseudo-ppl,note\n0,M1A,1,5,a\n1,M1C,NA,6,b\n2,M1D,3,7,c\n")
    assert "Spearman of log-prob and 2500" in run("score", WILD_TYPE, "v.csv", "--method", "log-prob")[2]
    Path("v.csv").write_text("mutant,ddG,position\nM1A,1,1\nM1C,2,1\n")
    err = run("score", WILD_TYPE, "v.csv", "--method", "log-prob")[2]
    assert "--measured-col says which of 'ddG', 'position' is measured" in err
    assert "Spearman" not in err


def test_gzip(run: Any) -> None:
    Path("gym.csv.gz").write_bytes(gzip.compress(GYM.encode()))
    code, out, _ = run("score", WILD_TYPE, "gym.csv.gz", "--method", "log-prob")
    assert (code, len(added(out))) == (0, 4)
    Path("gym.csv.gz").write_bytes(gzip.compress(GYM.encode())[:-9])
    code, _, err = run("score", WILD_TYPE, "gym.csv.gz")
    assert code == 1
    assert "damaged or cut short" in err


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("cp1252", b""), ("latin-1", b""), ("utf-8-sig", b""), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"),
     ("utf-16-le", b""), ("utf-32", b"")],
)  # fmt: skip
def test_encodings_are_kept(run: Any, encoding: str, mark: bytes) -> None:
    head, row = "MUTANT;Größe\r\n", "M1A;\u20ac\r\n" if encoding == "cp1252" else "M1A;ÿ\x81\r\n"
    Path("v.csv").write_bytes(mark + (head + row).encode(encoding))
    code, out, err = run("score", WILD_TYPE, "v.csv", "--method", "log-prob")
    assert code == 0, err
    score = out.removeprefix(mark).decode(encoding).split(";")[-1].strip()
    assert float(score) != 0
    expected = f"{head[:-2]};log-prob\r\n{row[:-2]};{score}\r\n"
    assert out == mark + expected.encode(encoding)
    # A name that the encoding has no letters for: all of it becomes UTF-8.
    code, out, _ = run("score", WILD_TYPE, "v.csv", "--column", "Δ蛋")
    written = encoding if mark or encoding.startswith("utf") else "utf-8"
    assert (code, out.decode(written).splitlines()[0].split(";")[-1]) == (0, "Δ蛋")


def test_excels_delimiter_comments_and_fields_of_any_length(run: Any, eight_m: ESM2) -> None:
    """Kept as they are, too; below the header `#` may begin a row's id."""
    long = "x" * 200_000
    table = [
        "sep=|\r\n", "# made by 'us, \"a|b|c\r\n", "\r\n", "id|Mutant|DMS_SCORE|note\r\n", "#1|M1A|1|\r\n",
        '# "open\r\n', f'2|K2R|2|"{long}"\r\n', "#3|p.(Thr3Ser)|3|\r\n",
    ]  # fmt: skip
    Path("v.csv").write_bytes("".join(table).encode())
    limit = csv.field_size_limit()
    code, out, err = run("score", WILD_TYPE, "v.csv", "--method", "wt-marginals")
    assert (code, csv.field_size_limit()) == (0, limit)
    first, second, third = eight_m.score_mutations(WILD_TYPE, ["M1A", "K2R", "T3S"], "wt-marginals").tolist()
    news = ["", "", "", "|wt-marginals", f"|{first!r}", "", f"|{second!r}", f"|{third!r}"]
    assert out.decode() == "".join(line[:-2] + new + "\r\n" for line, new in zip(table, news, strict=True))
    assert "(3 of 3 rows)" in err
    Path("v.csv").write_text("sep=;\n#c\nmutant;x\nM1A;1\n# M1C;2\nM1D;3\nA1D;3\n")
    assert "v.csv, line 7: A1D: the wild type has M" in run("score", WILD_TYPE, "v.csv")[2]
    Path("v.csv").write_text("sep=;\n#c\nmutant;x\nM1A;1\n# M1C;2\nM1D;3\n")
    assert run("score", WILD_TYPE, "v.csv", "-o", "v.tsv")[0] == 0
    assert [line.split("\t")[0] for line in Path("v.tsv").read_text().splitlines()] == ["mutant", "M1A", "M1D"]


def test_hgvs(run: Any, eight_m: ESM2) -> None:
    """MaveDB's column, whose wild type and synonymous variants have names of their own."""
    rows = ["_wt", "p.=", "p.Lys2=", "p.[Met1Ala;Lys2Arg]", "NP_000537.3:p.(Thr3Ser)", "p.Lys2Ter", "p.Thr3fs"]
    Path("v.csv").write_text("hgvs_pro,score\n" + "".join(f"{row},0\n" for row in rows))
    code, out, err = run("score", WILD_TYPE, "v.csv", "--mutation-col", "HGVS_pro", "--skip-invalid")
    assert code == 0
    expected = eight_m.score_mutations(WILD_TYPE, ["WT", "WT", "K2K", "M1A:K2R", "T3S"]).tolist()
    assert added(out)[1:] == [*map(repr, expected), "", ""]
    assert "line 7: p.Lys2Ter: 'Lys2Ter' is no substitution: a stop codon" in err
    assert "line 8: p.Thr3fs: 'Thr3fs' is no substitution: a frame shift" in err


@pytest.mark.parametrize("ending", ["xlsx", "parquet"])
def test_spreadsheets(run: Any, eight_m: ESM2, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
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
    scores = eight_m.score_mutations(WILD_TYPE, ["M1A", "K2R", "WT"], "log-prob").tolist()
    assert out.decode().splitlines() == [
        "Mutant,DMS_score,n,log-prob", f"M1A,0.1,1,{scores[0]!r}", f"p.Lys2Arg,,2,{scores[1]!r}",
        f"WT,{'2' if ending == 'xlsx' else '2.0'},3,{scores[2]!r}",
    ]  # fmt: skip
    assert ("of 2 sheets, 'data' is read" in err) == (ending == "xlsx")
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    code, _, err = run("score", WILD_TYPE, f"v.{ending}")
    assert code == 1
    assert "pip install 'numpyesm[tables]'" in err


def test_skip_invalid(run: Any) -> None:
    Path("v.csv").write_text("mutant,DMS_score\nM1A,1\nM1*,2\nM1del,3\nA1G,4\nM1C,5\n")
    code, out, err = run("score", WILD_TYPE, "v.csv", "--skip-invalid")
    assert code == 0
    values = added(out)
    assert values[2:5] == ["", "", ""]
    assert float(values[1]) != float(values[5])
    for said in (
        "3 of 5 rows left without a score",
        "line 3: M1*: ",
        "line 4: M1del: ",
        "line 5: A1G: ",
        "(2 of 5 rows)",
    ):
        assert said in err


def test_log_prob_where_letters_begin_to_count(run: Any) -> None:
    Path("v.csv").write_text("mutant\nM1A\nX3A\n")
    code, out, err = run("score", "MKX", "v.csv", "--method", "log-prob")
    assert (code, out) == (1, b"")
    assert "v.csv, line 3: X3A: X is none of the 20 amino acids" in err
    code, out, _ = run("score", "MKX", "v.csv", "--method", "log-prob", "--skip-invalid")
    assert (code, added(out)[2]) == (0, "")


def test_window_of_proteingym(run: Any, eight_m: ESM2) -> None:
    long = random_sequence(1100, 2)
    mutant = f"{long[600]}601{'A' if long[600] != 'A' else 'C'}"
    Path("v.csv").write_text(f"mutant\n{mutant}\n")
    code, out, _ = run("score", long, "v.csv", "--window", "proteingym")
    assert (code, float(added(out)[1])) == (0, eight_m.score_mutations(long, [mutant], window="proteingym")[0])
    code, _, err = run("score", long, "v.csv", "--window", "gym")
    assert code == 2
    assert "expected a number of residues, or proteingym" in err


def test_header_alone(run: Any) -> None:
    Path("v.csv").write_text("mutant,DMS_score\n")
    code, out, err = run("score", WILD_TYPE, "v.csv")
    assert (code, out) == (0, b"mutant,DMS_score,masked-marginals\n")
    assert "not defined" in err


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"", "v.csv is empty"),
        (b"\xef\xbb\xbf \r\n\r\n", "v.csv is empty"),
        (b"variant,score\nM1A,1\n", "has no column 'mutant'; its columns are 'variant', 'score': choose with --mut"),
        (b"mutant,mutant\nM1A,M1C\n", "2 columns are called 'mutant'; --mutation-col NAME chooses"),
        (b"Mutant,MUTANT\nM1A,M1C\n", "2 columns are called 'mutant'; --mutation-col NAME chooses"),
        (b"mutant,variant\n1,M1A\n2,M1C\n", "line 2: 1: '1' is no substitution: expected one such as A42G or p.Al"),
        (
            b"mutant,variant\n1,M1A\n2,M1C\n",
            "nothing in column 'mutant' is a mutation: choose another with --mutation-col",
        ),
        (b"mutant,x\nM1A,1\nM1C\n", "line 3: 1 fields, but the header has 2 columns"),
        (b"mutant,x\nM1A,1\nM1C,1,2\n", "line 3: 3 fields, but the header has 2 columns"),
        (b'mutant,x\nM1A,"1\nM1C,2\n', "line 2: unexpected end of data"),
        (b'mutant,x\nM1A,1\nM1C,"2"3\n', "line 3: ',' expected after '\"'"),
        (b"mutant\nM1A\nA2G\n", "line 3: A2G: the wild type has K at position 2, not A"),
        (b'x,mutant\n"a\nb",M1A\n1,K2R:M1Z\n', "line 4: K2R:M1Z: M1Z: Z is none of the 20 amino acids"),
        (b"mutant\nM1A\nW12A\n", "line 3: W12A: position 12 is outside of the wild type, whose positions are 1 to 11"),
        (b"mutant,x\nM1A,\n,1\n", "line 3: the mutation is empty"),
        (b"mutant\nM1A\nM1C;K2R\n", "line 3: M1C;K2R: 'M1C;K2R' is no substitution: several"),
        (b"\xff\xfem\0u\0t\0a\0n\0t\0\n", "the UTF-16-LE text is damaged or cut short"),
        (b"# nothing\n", "holds comments only"),
        (b"PAR1 and no more", "the Parquet file cannot be read"),
        (b"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
        (b"mutant,mutated_sequence\nM1A,CKTAYIAKQRW\n", "line 2: M1A does not turn the wild type into"),
        (b"mutant,masked-marginals\nM1A,1\n", "has a column 'masked-marginals' already"),
    ],
)
def test_tables_that_are_refused(run: Any, table: bytes, said: str) -> None:
    Path("v.csv").write_bytes(table)
    code, out, err = run("score", WILD_TYPE, "v.csv", "-o", "out.csv")
    assert code in (1, 2)
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert (out, Path("out.csv").exists()) == (b"", False)


def test_wrong_use(run: Any) -> None:
    Path("v.csv").write_text("mutant\nM1A\n")
    Path("two.fasta").write_text(">a\nMKT\n>b\nMKT\n")
    for arguments, code, said in (
        ([WILD_TYPE, "none.csv"], 1, "there is no file 'none.csv'"),
        ([WILD_TYPE, "."], 1, "is a folder"),
        ([WILD_TYPE], 2, "expected a wild type and a table"),
        ([], 2, "expected a wild type and a table"),
        (["two.fasta", "v.csv"], 1, "2 sequences (a, b …), expected one wild type"),
        (["none.fasta", "v.csv"], 1, "there is no file 'none.fasta'"),
        (["MK-T", "v.csv"], 1, "'-' at position 3"),
        ([WILD_TYPE, "v.csv", "-o", "v.csv"], 2, "is the input itself"),
        (
            [WILD_TYPE, "v.csv", "--mutation-col", "x"],
            1,
            "no column 'x'; its columns are 'mutant': choose with --mutation",
        ),
        (
            [WILD_TYPE, "v.csv", "--measured-col", "x"],
            1,
            "no column 'x'; its columns are 'mutant': choose with --measured",
        ),
        ([WILD_TYPE, "v.csv", "--column", "mutant"], 2, "already"),
        ([WILD_TYPE, "v.csv", "--method", "x"], 2, "invalid choice"),
        ([WILD_TYPE, "v.csv", "--window", "0"], 2, "from 1 to 2048"),
        (["-", "-"], 2, "cannot both come from standard input"),
        (["--model-location", "a", "b", "--sequence", WILD_TYPE, "--dms-input", "v.csv"], 2, "one at a time"),
    ):
        found, out, err = run("score", *arguments)
        assert (found, out) == (code, b""), arguments
        assert said in err
    assert Path("v.csv").read_text() == "mutant\nM1A\n"


def test_scan_writes_matrix_and_heat_map(run: Any, eight_m: ESM2) -> None:
    code, out, _ = run("scan", WILD_TYPE, "-o", "scan.csv", "--offset", "24")
    assert (code, out) == (0, b"")
    header, *rows = csv.reader(Path("scan.csv").read_text().splitlines())
    assert header == ["position", "wild_type", *"ACDEFGHIKLMNPQRSTVWY"]
    assert [row[0] for row in rows] == [str(i) for i in range(24, 35)]
    assert "".join(row[1] for row in rows) == WILD_TYPE
    np.testing.assert_array_equal(
        np.array([row[2:] for row in rows], np.float64), eight_m.scan_mutations(WILD_TYPE).scores
    )
    assert Path("scan.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("scan", WILD_TYPE, "--method", "wt-marginals")
    assert (code, len(out.splitlines())) == (0, 12)
    assert b"K" in out.splitlines()[2]


def test_scan_outputs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("scan", "MXK" * 50, "--heatmap", "long.png", "-o", "long.tsv")[0] == 0
    assert Path("long.tsv").read_text().startswith("position\twild_type\tA\t")
    assert Path("long.png").stat().st_size > 1000
    assert run("scan", "MKT", "-o", "a.csv", "--no-heatmap")[0] == 0
    assert not Path("a.png").exists()
    assert run("scan", "MKT", "-o", "folder/")[0] == 0
    assert {path.name for path in Path("folder").iterdir()} == {"scan.csv", "scan.png"}
    for arguments in (["-o", "a.png"], ["-o", "a.csv", "--heatmap", "a.csv"], ["--heatmap", "x.png", "--no-heatmap"]):
        assert run("scan", "MKT", *arguments)[0] == 2
    assert run("scan", "MKT", "--method", "log-prob")[0] == 2
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("scan", "MKT", "-o", "b.csv")
    assert code == 0
    assert "no heat map" in err
    assert Path("b.csv").exists()
    code, _, err = run("scan", "MKT", "-o", "c.csv", "--heatmap", "c.png")
    assert code == 1
    assert "numpyesm[plot]" in err
    assert not Path("c.csv").exists()


def test_the_ending_names_the_format(run: Any, eight_m: ESM2) -> None:
    Path("gym.csv").write_text(GYM)
    assert run("score", WILD_TYPE, "gym.csv", "-o", "out.csv.gz")[0] == 0
    packed = gzip.decompress(Path("out.csv.gz").read_bytes())
    assert run("score", WILD_TYPE, "gym.csv", "-o", "out.tsv")[0] == 0
    assert added(packed) == added(Path("out.tsv").read_bytes(), "\t")
    assert Path("out.tsv").read_text().startswith("mutant\tmutated_sequence\t")
    assert run("scan", WILD_TYPE, "-o", "s.json.xz", "--no-heatmap")[0] == 0
    document = json.loads(lzma.decompress(Path("s.json.xz").read_bytes()))
    np.testing.assert_array_equal(document["scores"], eight_m.scan_mutations(WILD_TYPE).scores)
    for arguments in (["score", WILD_TYPE, "gym.csv"], ["scan", WILD_TYPE]):
        code, _, err = run(*arguments, "-o", "x.parquet")
        assert code == 2
        assert ".csv, .tsv" in err


def test_standard_input(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(GYM.encode())

    monkeypatch.setattr("sys.stdin", Stdin)
    code, out, _ = run("score", WILD_TYPE, "-")
    assert (code, len(added(out))) == (0, 4)


def test_old_line_ends() -> None:
    table = read_table(b"mutant,x\rM1A,1\rM1C,2\r", "t", ["mutant"])
    assert [row.line for row in table.rows] == [2, 3]
    assert table.with_column("s", ["1", "2"]) == b"mutant,x,s\rM1A,1,1\rM1C,2,2\r"
    with pytest.raises(InvalidTable):
        table.require("y", "--mutation-col")
