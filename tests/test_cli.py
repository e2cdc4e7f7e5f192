"""The command line as a user runs it: results on stdout, talk on stderr, exit codes."""

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
def test_pictures_of_contacts(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert run("contacts", "MKTAYIAKQR", "-o", "map.png").code == 0
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    assert run("contacts", "MKTAYIAKQR", "MKT", "-o", "maps", "--format", "png").code == 0
    assert {path.name for path in Path("maps").iterdir()} == {"001_sequence_1.png", "002_sequence_2.png"}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("contacts", "MKT", "-o", "m.png")
    assert (done.code, "numpyesm[plot]" in done.err) == (1, True)


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


def test_notes(run: Any) -> None:
    """Once a command for each kind; the results are there all the same."""
    done = run("encode", "-", stdin=b">a\nATGGCCAAAGTTTAG\n>b\nMKT\n>c\nATGGCCAAAGTTTAA\n>d\nM-T\n")
    assert len(results(done)) == 4
    notes = [line.split(" (")[0] for line in done.err.splitlines()]
    assert notes == ["numpyesm: warning: 2 sequences", "numpyesm: warning: 1 sequence"]


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
        (["encode", "MKT", "--weights", ""], 2, "an unset variable?"),
        (["convert", "missing.pt", "-o", "x.safetensors"], 1, "missing.pt"),
        (["embed", PROTEINS, "-o", "x/", "--max-memory", "2G", "--engine", "ray"], 2, "with the local engine only"),
        (["embed", "gone.fasta", "-o", "x/"], 1, "gone.fasta"),
        (["embed", os.devnull, "-o", "x/"], 1, "no sequences"),
        (["embed", ".", "-o", "x/"], 1, "folder"),
        (["embed", PROTEINS, "-o", f"{PROTEINS}/x/"], 1, "proteins.fasta"),
        (["serve", "--grace", "nan"], 2, "--grace: 'nan': expected a number above 0"),
        ([], 2, "required"),
    ],
)
def test_wrong_use_and_bad_input(run: Any, arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments, stdin=b">good\nMKT\n>sp|P1|BAD x\nMKJ\n")
    assert done[:2] == (code, b"")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(Path().iterdir())
    if code == 1:
        assert "Traceback" in run(*arguments, "--debug").err


# -- weights files -----------------------------------------------------------------------------------------------


def test_convert_says_what_it_made(run: Any) -> None:
    done = run("convert", "synthetic:esm2-8m:1", "-o", "half.safetensors", "--dtype", "fp16")
    assert (done.code, done.out.decode().strip()) == (0, "half.safetensors")
    assert "esm2-8m" in done.err


def test_info_and_verify(run: Any) -> None:
    done = run("info")
    assert done.code == 0
    for part in ("custom: 3 layers, width 80", "NUMPYESM_WEIGHTS", "threads"):
        assert part in done.out.decode()
    done = run("verify", "--weights", "synthetic:esm2-8m")
    assert (done.code, "DIFFERS" in done.out.decode()) == (1, True)
    assert "synthetic weights cannot reproduce" in done.err
    done = run("verify")
    assert (done.code, done.out) == (2, b"")
    assert "reference numbers for esm2-8m and esm2-35m only" in done.err


@pytest.mark.skipif(bool(OFFICIAL_HERE), reason="official weights are in weights/")
@pytest.mark.slow
def test_demo_without_weights_shows_everything_and_says_synthetic(run: Any) -> None:
    done = run("demo", bare=True)
    assert done.code == 0
    assert "SYNTHETIC WEIGHTS" in done.err
    for part in ("Embeddings of 4 proteins", "Which residue is at position", "Contact map", "residues/s", "SYNTHETIC"):
        assert part in done.out.decode()
    assert Path("demo-output/contacts.txt").stat().st_size > 1000


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
    source = write_fasta(Path("in.fasta"), 30, duplicates=5)
    source.write_text(source.read_text() + ">bad\nMKJ\n>dna\n" + "ACGT" * 20 + "\n")

    def events(code: int, *more: str) -> list[dict[str, Any]]:
        done = run("embed", "in.fasta", "-o", "out/a", "--json-progress", *more)
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
    assert len(rows(Path("out/a"))) == 36


def test_embed_shows_a_bar_on_a_terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    write_fasta(Path("in.fasta"), 60)
    assert run("embed", "in.fasta", "-o", "a").code == 0
    assert "residues/s" in terminal.getvalue()
    assert "60 records in" in terminal.getvalue()


def test_options_of_embed_reach_the_output(run: Any) -> None:
    write_fasta(Path("in.fasta"), 5)
    options = "--layers 0 -1 --dtype fp16 --tokens-per-batch 50 --threads 1 --include per_residue contacts"
    assert run("embed", "in.fasta", "-o", "all", *options.split()).code == 0
    row = rows(Path("all"))[0]
    assert {"per_token_0", f"per_token_{LAST}", "contacts"} < set(row)
    assert (row["contacts"].shape, row["contacts"].dtype) == ((row["length"],) * 2, "float16")


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
