"""The command line as a user runs it: results on stdout, talk on stderr, exit codes; tables of variants."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAST, Done, assert_same, random_sequence, rows, write_fasta

from numpyesm import ESM2
from numpyesm.cli.parser import build_parser
from numpyesm.formats import json_results

EXAMPLES = Path(__file__).parents[1] / "examples"
PROTEINS = str(EXAMPLES / "proteins.fasta")
OFFICIAL_HERE = list((Path(__file__).parents[1] / "weights").glob("esm2*"))
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX names and signals")


def results(done: Done) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)["results"]


def as_json(expected: Any) -> Any:
    """Results as they are written: numbers in the fewest digits."""
    names = [f"sequence_{i}" for i in range(1, len(expected) + 1)]
    return json.loads(b"".join(json_results(expected, names)))["results"]


# -- what each command writes ------------------------------------------------------------------------------------


def test_encode_bare_sequences(run: Any, loaded: ESM2) -> None:
    wanted = ["mean", "bos", "per_token", "contacts", "logits", "attentions"]
    done = run("encode", "MKT-X", "W*", "--layers", "-1", "2", "--include", "per_residue", *wanted)
    assert results(done) == as_json(loaded.encode(["MKT-X", "W"], [-1, 2], wanted))


def test_encode_to_npz_and_table(run: Any) -> None:
    done = run("encode", "MKT", "MKTA", "-o", "out.npz", "--include", "mean", "contacts")
    assert done == (0, b"", "")
    assert [path.name for path in Path().iterdir()] == ["out.npz"]
    with np.load("out.npz", allow_pickle=False) as arrays:
        assert list(arrays["ids"]) == ["sequence_1", "sequence_2"]
        assert arrays["mean_3"].shape == (2, 80)
        assert arrays["contacts_1"].shape == (4, 4)
    with np.load(io.BytesIO(run("encode", "MKT", "--format", "npz").out), allow_pickle=False) as arrays:
        assert arrays["mean_3"].shape == (1, 80)
    table = run("encode", PROTEINS, "--format", "table").out.decode().splitlines()
    assert len(table) == 16
    assert table[0].split()[:3] == ["id", "length", "output"]


def test_predict(run: Any, loaded: ESM2) -> None:
    (expected,) = loaded.predict(["M<mask>T"])
    assert results(run("predict", "M<mask>T")) == as_json([expected])
    masked = results(run("predict", "M<mask>T", "--positions", "masked"))
    assert np.shape(masked[0]["logits"]) == (1, 20)
    table = run("predict", "M<mask>T", "--format", "table").out.decode().splitlines()
    assert [line.split()[1] for line in table] == ["position", "2"]
    lines = [line.split("\t") for line in run("predict", "M<mask>T", "--format", "tsv").out.decode().splitlines()]
    assert [line[1:3] for line in lines] == [["position", "token"], ["1", "M"], ["2", "<mask>"], ["3", "T"]]
    np.testing.assert_array_equal(np.array([line[3:] for line in lines[1:]], np.float32), expected.logits)


def test_log_prob(run: Any, loaded: ESM2) -> None:
    expected = loaded.log_prob(["MKT"]).tolist()
    assert results(run("log-prob", "MKT")) == as_json(expected)
    assert run("log-prob", "MKT", "--format", "csv").out.decode().splitlines() == [
        "id,length,log_prob", f"sequence_1,3,{expected[0]!r}"]  # fmt: skip
    done = run("log-prob", "-", stdin=b">whole\nMKT\n>unknown\nXXXX\n>gaps\nX-BZ\n")
    assert [one["log_prob"] is None for one in results(done)] == [False, True, True]
    assert "no log-probability (NaN)" in done.err
    assert "amino acids: unknown, gaps\n" in done.err
    assert done.err.count("numpyesm: warning: ") == done.err.count("\n") == 2  # the other is of gaps


def test_contacts(run: Any, loaded: ESM2) -> None:
    sequence = random_sequence(60)
    contacts = loaded.encode([sequence], include=["contacts"])[0].contacts
    lines = run("contacts", sequence, "--threshold", "0.1").out.decode().splitlines()[1:]
    listed = {(int(f[1]), int(f[3])): float(f[5]) for f in (line.split("\t") for line in lines)}
    i, j = np.nonzero(np.triu(contacts >= 0.1, k=6))
    assert listed == {(a + 1, b + 1): pytest.approx(contacts[a, b], abs=1e-4) for a, b in zip(i, j, strict=True)}
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    both = run("contacts", sequence, sequence, "--threshold", "0.1", "-o", "both.csv.gz")
    assert both.code == 0
    rows = gzip.decompress(Path("both.csv.gz").read_bytes()).decode().splitlines()
    assert [rows[0], len(rows)] == ["id,i,residue_i,j,residue_j,probability", 1 + 2 * len(lines)]  # one header
    assert "60 residues" in run("contacts", sequence, "--format", "map").out.decode()
    assert results(run("contacts", "MKT", "--format", "json"))[0]["contacts"]


@pytest.mark.slow
def test_pictures_of_contacts(run: Any) -> None:
    pytest.importorskip("matplotlib")
    assert run("contacts", "MKTAYIAKQR", "-o", "map.png").code == 0
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    Path("in.fasta").write_text(">b$\\frac$\nMKTAYIAKQR\n>c\nMKT\n")  # no TeX
    Path("maps/map").mkdir(parents=True)  # somebody's own
    assert run("contacts", "in.fasta", "-o", "maps", "--format", "png").code == 0
    assert {path.name for path in Path("maps").iterdir()} == {"001_b_frac.png", "002_c.png", "map"}


READERS = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@pytest.mark.parametrize(("ending", "compression"), list(zip([".csv", ".tsv"] * 2, READERS, strict=True)))
def test_spreadsheets_of_embeddings(run: Any, loaded: ESM2, ending: str, compression: str) -> None:
    """A row per sequence or per residue, with the very numbers, compressed if the name says so."""
    name, out = "a," + "x" * 300, f"out{ending}{compression}"
    fasta = f">{name}\nMKT\n>two\nGL\n".encode()

    def rows(*include: str) -> list[list[str]]:
        assert run("encode", "-", "-o", out, "--include", *include, stdin=fasta).code == 0
        with READERS[compression](out, "rt") as file:
            return list(csv.reader(file, delimiter="," if ending == ".csv" else "\t"))

    both = loaded.encode(["MKT", "GL"], include=["mean", "bos", "per_token", "logits"])
    header, *found = rows("mean", "bos")
    assert header[:2] == ["id", "mean_3_0"]
    assert [row[0] for row in found] == [name, "two"]
    expected = [np.concatenate([r.embeddings[3], r.bos_embeddings[3]]) for r in both]
    np.testing.assert_array_equal(np.array([row[1:] for row in found], np.float32), expected)
    header, *found = rows("per_token", "logits")
    assert header[-20:] == [f"logits_{letter}" for letter in both[0].vocab_tokens]
    assert [" ".join(row[:3]) for row in found] == [f"{name} 1 M", f"{name} 2 K", f"{name} 3 T", "two 1 G", "two 2 L"]
    expected = np.concatenate([np.hstack([r.per_token_embeddings[3], r.logits]) for r in both])
    np.testing.assert_array_equal(np.array([row[3:] for row in found], np.float32), expected)


@pytest.mark.parametrize(
    ("command", "letters"), [("encode", "MKTA"), ("log-prob", "MK-A"), ("predict", "MK<mask>A"), ("contacts", "MKTA")]
)
def test_ids(run: Any, command: str, letters: str) -> None:
    """And notes are seen at each of them."""
    text = f">sp|P12345|AATM_RABIT x\n{letters}\n>\n{letters}\n".encode()
    for ids, first in ((), "sp|P12345|AATM_RABIT"), (("--ids", "accession"), "P12345"):
        done = run(command, "-", "--format", "json", *ids, stdin=text)
        assert [result["id"] for result in results(done)] == [first, "sequence_2"]
        assert ("with gaps (-)" in done.err) == ("-" in letters)


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "output", "said"),
    [
        ("encode MKT", "x.parquet", ".csv"),
        ("encode MKT", "x", "no ending"),
        ("encode MKT", "new/", "not a file name"),
        ("encode MKT --format json", "x.npz", "contradict"),
        ("encode MKT --include contacts", "x.csv", "row per residue"),
        ("contacts MKT", "c.pdf", ".png"),
        ("contacts MKT GLV", "c.png", "2 pictures"),
        ("contacts MKT --format npz", "c/", "is a folder"),
        ("contacts MKT --format png", "-", "needs a file"),
        ("scan MKT", "s.npz", ".json"),
        ("scan MKT --heatmap a.csv", "a.csv", "ends in .png"),
        ("scan MKT --heatmap x.png --no-heatmap", "-", "contradict"),
        (f"embed {PROTEINS}", "-", ".parquet"),
    ],
)
def test_the_output_is_refused_before_anything_is_computed(run: Any, command: str, output: str, said: str) -> None:
    done = run(*command.split(), "-o", output, "--weights", "synthetic:esm2-8m")
    assert (done.code, said in done.err) == (2, True), done.err
    assert "SYNTHETIC" not in done.err  # nothing is loaded
    assert not list(Path().iterdir())


@posix
def test_outputs_that_are_streams_or_cannot_be_written(run: Any) -> None:
    assert run("encode", "MKT", "-o", "/dev/stdout") == run("encode", "MKT")
    Path("file").write_text("")
    done = run("encode", "MKT", "-o", "file/x.npz", "--weights", "missing.pt")
    assert done.code == 1
    assert "file/x.npz cannot be written" in done.err  # and not that the weights are missing


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["encode", "MK7"], 1, "position 3"),
        (["encode", "MKT:MKT"], 1, "between chains"),
        (["encode", "no-such-file.fasta"], 1, "no file 'no-such-file.fasta'"),
        (["encode", "."], 1, "'.' is a folder"),
        (["encode", "MK<mask>"], 1, "predict"),
        (["encode", "-"], 1, "record 2 (sp|P1|BAD): 'J' at position 3"),
        (["encode", "MKT", "--layers", "9"], 2, "3 layers"),
        (["encode", "MKT", "--max-memory", "plenty"], 2, "max_memory='plenty'"),
        (["encode", "MKT", "--max-memory", "10M"], 1, "max_memory is 10 MiB, but a process with"),
        (["classify", "MKT", "-o", "x.tsv"], 1, "have no classification head"),
        (["contacts", "MKT", "-o", "x.png", "--threshold", "0.5"], 2, "png holds the whole map"),
        (["contacts", "MKT", "--threshold", "nan"], 2, "expected a number from 0 to 1"),
        (["embed", PROTEINS, "-o", "x/", "--overlap", "9"], 2, "no windows that could overlap"),
        (["serve", "--allow-host", "https://b"], 2, "expected one name of a host"),
        (["convert", "missing.pt", "-o", "x.safetensors"], 1, "missing.pt"),
        (["embed", PROTEINS, "-o", "x/", "--max-memory", "2G", "--engine", "ray"], 2, "with the local engine only"),
        (["embed", "gone.fasta", "-o", "x/"], 1, "gone.fasta"),
        (["embed", os.devnull, "-o", "x/"], 1, "no sequences"),
        (["embed", ".", "-o", "x/"], 1, "folder"),
        (["embed", PROTEINS, "-o", f"{PROTEINS}/x/"], 1, "proteins.fasta"),
        (["serve", "--grace", "nan"], 2, "--grace: 'nan': expected a number above 0"),
        (["score", "MKT", "none.csv"], 1, "there is no file 'none.csv'"),
        (["score", "MKT", "."], 1, "is a folder"),
        (["score", "MKT"], 2, "expected a wild type and a table"),
        (["score", "two.fasta", "v.csv"], 1, "2 sequences (a, b), expected one wild type"),
        (["score", "MKX", "v.csv", "--method", "log-prob"], 1, "v.csv, line 3: X3A: X is not one of the 20 amino"),
        (["score", "MKX", "v.csv", "-o", "v.csv"], 2, "is the input itself"),
        (["score", "MKX", "v.csv", "--window", "0"], 2, "from 1 to 2048"),
        (["score", "MKX", "v.csv", "--window", "gym"], 2, "expected a number of residues, or proteingym"),
        (["score", "-", "-"], 2, "cannot both come from standard input"),
        (["score", "--model-location", "a", "b", "--sequence", "MKX", "--dms-input", "v.csv"], 2, "one at a time"),
        ([], 2, "required"),
    ],
)
def test_wrong_use_and_bad_input(run: Any, arguments: list[str], code: int, message: str) -> None:
    given = {"v.csv": "mutant\nM1A\nX3A\n", "two.fasta": ">a\nMKT\n>b\nMKT\n"}
    for name, text in given.items():
        Path(name).write_text(text)
    done = run(*arguments, stdin=b">good\nMKT\n>sp|P1|BAD x\nMKJ\n")
    assert done[:2] == (code, b"")
    assert message in done.err
    assert "Traceback" not in done.err
    assert {path.name: path.read_text() for path in Path().iterdir()} == given
    if code == 1:
        assert "Traceback" in run(*arguments, "--debug").err


# -- weights files -----------------------------------------------------------------------------------------------


def test_convert_info_and_verify(run: Any) -> None:
    done = run("convert", "synthetic:esm2-8m:1", "-o", "half.safetensors", "--dtype", "fp16")
    assert (done.code, done.out, "esm2-8m" in done.err) == (0, b"half.safetensors\n", True)
    assert b"stored as fp16" in run("info", "--weights", "half.safetensors").out
    done = run("info")
    assert done.code == 0
    for part in ("custom: 3 layers, width 80", "NUMPYESM_WEIGHTS", "threads"):
        assert part in done.out.decode()
    done = run("verify", "--weights", "half.safetensors")
    assert (done.code, "DIFFERS" in done.out.decode()) == (1, True)
    assert "synthetic weights cannot reproduce" in done.err


@pytest.mark.skipif(bool(OFFICIAL_HERE), reason="official weights are in weights/")
@pytest.mark.slow
def test_demo_without_weights_shows_everything_and_says_synthetic(run: Any) -> None:
    done = run("demo", bare=True)
    assert done.code == 0
    assert "SYNTHETIC WEIGHTS" in done.err
    for part in ("Embeddings of 4 proteins", "Which residue is at position", "Contact map", "residues/s", "SYNTHETIC"):
        assert part in done.out.decode()
    assert Path("demo-output/contacts.txt").stat().st_size > 1000


# -- scores: tables as people have them, kept as they are ---------------------------------------------------------

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
        ("mutant;fitness\nM1A;1,5\nM1C;0,5\n", ["log-prob and fitness", "(2 of 2 rows)"]),
        ("mutant,DMS_score\n", ["not defined"]),
        (",mutant,2500,pseudo-ppl,note\n0,M1A,1,5,a\n1,M1C,NA,6,b\n2,M1D,3,7,c\n", ["log-prob and 2500"]),
        ("mutant,ddG,position\nM1A,1,1\nM1C,2,1\n", ["say with --measured-col which of 'ddG', 'position' is measured"]),
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
        (b"mutant,masked-marginals\nM1A,1\n", "has a column 'masked-marginals' already: choose another name with --c"),
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


def test_scan_writes_matrix_and_heat_map(run: Any, loaded: ESM2) -> None:
    assert run("scan", WILD_TYPE, "-o", "folder/", "--offset", "24")[:2] == (0, b"")
    header, *rows = csv.reader(Path("folder/scan.csv").read_text().splitlines())
    assert header == ["position", "wild_type", *"ACDEFGHIKLMNPQRSTVWY"]
    assert [row[:2] for row in rows] == [[str(i), letter] for i, letter in enumerate(WILD_TYPE, start=24)]
    expected = loaded.scan_mutations(WILD_TYPE).scores
    np.testing.assert_array_equal(np.array([row[2:] for row in rows], np.float64), expected)
    assert Path("folder/scan.png").read_bytes().startswith(b"\x89PNG")
    assert run("scan", WILD_TYPE, "-o", "s.json.xz", "--no-heatmap").code == 0
    document = json.loads(lzma.decompress(Path("s.json.xz").read_bytes()))
    np.testing.assert_array_equal(document["scores"], expected)
    assert run("scan", "MXK" * 50, *["--heatmap", "long.png", "-o", "long.tsv", "--window", "proteingym"]).code == 0
    names = {"folder/scan.csv", "folder/scan.png", "s.json.xz", "long.png", "long.tsv"}
    assert {str(path) for path in Path().rglob("*.*")} == names
    code, out, _ = run("scan", WILD_TYPE, "--method", "wt-marginals")
    assert (code, len(out.splitlines())) == (0, 12)
    assert b"K" in out.splitlines()[2]


def test_without_matplotlib(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("scan", "MKT", "-o", "b.csv")
    assert (code, "no heat map" in err, Path("b.csv").exists()) == (0, True, True)
    for command in ("scan MKT -o c.csv --heatmap c.png", "contacts MKT -o c.png"):
        code, _, err = run(*command.split())
        assert (code, "numpyesm[plot]" in err, list(Path().glob("c.*"))) == (1, True, [])


def test_standard_input_and_the_format_that_the_ending_names(run: Any) -> None:
    Path("gym.csv.gz").write_bytes(gzip.compress(GYM.encode()))
    done = run("score", WILD_TYPE, "gym.csv.gz", "--method", "log-prob")
    assert run("score", WILD_TYPE, "-", "--method", "log-prob", "-o", "out.tsv", stdin=GYM.encode()).code == 0
    assert (done.code, added(Path("out.tsv").read_bytes(), "\t")) == (0, added(done.out))
    assert Path("out.tsv").read_text().startswith("mutant\tmutated_sequence\t")


# -- embed: see also test_bulk.py --------------------------------------------------------------------------


@pytest.mark.slow
def test_embed_is_quiet_when_not_a_terminal_and_reads_stdin(run: Any) -> None:
    data = write_fasta(Path("in.fasta"), 30).read_bytes()
    assert run("embed", "in.fasta", "-o", "a") == (0, b"", "")
    assert run("embed", "-", "-o", "b", stdin=gzip.compress(data)) == (0, b"", "")
    assert_same(rows(Path("a")), rows(Path("b")))
    assert {path.name for path in Path().iterdir()} == {"in.fasta", "a", "b"}
    again = run("embed", "in.fasta", "-o", "a")
    assert (again.code, "complete already" in again.err) == (0, True)


def test_every_line_of_embed_is_json_for_schedulers(run: Any) -> None:
    """And options reach the output."""
    source = write_fasta(Path("in.fasta"), 30, duplicates=5)
    source.write_text(source.read_text() + ">bad\nMKJ\n>dna\n" + "ACGT" * 20 + "\n")

    options = "--layers 0 -1 --dtype fp16 --tokens-per-batch 50 --threads 1 --include per_residue contacts"

    def events(code: int, *more: str) -> list[dict[str, Any]]:
        done = run("embed", "in.fasta", "-o", "out/a", "--json-progress", *options.split(), *more)
        assert done.code == code
        return [json.loads(line) for line in done.err.splitlines()]

    found = events(1)  # one record was rejected
    assert [event["event"] for event in found if event["event"] != "progress"] == ["warning", "writing", "done"]
    last = [event for event in found if event["event"] == "progress"][-1]
    assert last["records"] == last["records_total"] == 36
    assert (last["residues_per_second"] > 0, last["seconds_left"]) == (True, 0)
    assert found[-1]["rejected"] == 1
    assert found[-1]["rejected_file"].endswith("out/a.rejected.tsv")
    assert events(1, "--strict", "--overwrite")[-1]["event"] == "error"
    assert events(2, "--layers", "9")[-1]["event"] == "error"
    embedded = rows(Path("out/a"))
    assert (len(embedded), embedded[0]["contacts"].dtype) == (36, "float16")
    assert {"per_token_0", f"per_token_{LAST}"} < set(embedded[0])


def test_embed_shows_a_bar_on_a_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    write_fasta(Path("in.fasta"), 60)
    assert run("embed", "in.fasta", "-o", "a").code == 0
    assert "residues/s" in terminal.getvalue()
    assert "60 records in" in terminal.getvalue()


@posix
@pytest.mark.slow
def test_the_slurm_example(run: Any, small_file: str) -> None:
    """Each task of the array as Slurm would start it; together they are the whole."""
    pytest.importorskip("pyarrow")
    source = write_fasta(Path("in.fasta"), 40, duplicates=10)
    source.write_text(source.read_text() + ">bad\nJ\n")  # rejected: its task succeeds all the same
    Path("bin").mkdir()
    Path("bin/numpyesm").write_text(f'#!/bin/sh\nexec {sys.executable} -m numpyesm "$@" --backend numpy\n')
    Path("bin/numpyesm").chmod(0o755)
    variables = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "1", "WEIGHTS": small_file}
    variables["PATH"] = f"{Path('bin').resolve()}:{os.environ['PATH']}"
    for task in ("1", "2"):
        script = ["bash", EXAMPLES / "slurm" / "embed_array.sh", "in.fasta", "parts", "2"]
        environment = os.environ | variables | {"SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(script, env=environment, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr.decode()
    assert len(list(Path("parts").glob("*.rejected.tsv"))) == 1
    parts = [rows(path) for path in Path("parts").glob("*.parquet")]
    assert [bool(part) for part in parts] == [True, True]
    embedded = sorted((row["record"], row["id"]) for part in parts for row in part)
    headers = [line[1:].split()[0] for line in source.read_text().splitlines() if line.startswith(">")]
    assert embedded == list(enumerate(headers[:-1], start=1))


def test_the_nextflow_example_uses_options_that_exist() -> None:
    text = (EXAMPLES / "nextflow" / "embed.nf").read_text()
    found = re.search(r"numpyesm (embed .*?--json-progress)", text, re.DOTALL)
    assert found is not None
    line = re.sub(r"\$\{[^}]*\}", "3", found[1].replace("\\\\\n", " "))
    arguments = build_parser().parse_args(shlex.split(line))
    assert (arguments.shard, arguments.output) == ("3/3", "part-3.parquet")


@posix
def test_broken_pipe_is_quiet(small_file: str) -> None:
    command = f"{sys.executable} -m numpyesm encode {PROTEINS} --include per_token --weights {small_file} | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == (b'{"results"', b"")
