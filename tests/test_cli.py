"""The command line as a user runs it: results on stdout, talk on stderr, exit codes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done, random_sequence

from numpyesm import ESM2
from numpyesm.formats import json_results

EXAMPLES = Path(__file__).parents[1] / "examples" / "proteins.fasta"
OFFICIAL_HERE = list((Path(__file__).parents[1] / "weights").glob("esm2*"))
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX names and signals")


def results(done: Done) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)["results"]


def as_json(expected: Any, *ids: str) -> Any:
    """Results as they are written: numbers in the fewest digits."""
    names = ids or [f"sequence_{i}" for i in range(1, len(expected) + 1)]
    return json.loads(b"".join(json_results(expected, names)))["results"]


# -- what each command writes ------------------------------------------------------------------------------------


def test_encode_bare_sequences(run: Any, loaded: ESM2) -> None:
    wanted = ["mean", "bos", "per_token", "contacts", "logits", "attentions"]
    done = run("encode", "MKT-X", "W*", "--layers", "-1", "2", "--include", "per_residue", *wanted)
    assert results(done) == as_json(loaded.encode(["MKT-X", "W"], [-1, 2], wanted))


def test_encode_fasta(run: Any, loaded: ESM2) -> None:
    """From a file and from standard input; test_fasta.py has the forms that a file may have."""
    text = b">one first\r\nmktayi\r\nAKQR*\r\n>two\r\nmk*\r\n"
    Path("x.fasta").write_bytes(text)
    expected = as_json(loaded.encode(["MKTAYIAKQR", "MK"]), "one", "two")
    assert results(run("encode", "x.fasta")) == expected
    assert results(run("encode", "-", stdin=gzip.compress(text))) == expected


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
    table = run("encode", str(EXAMPLES), "--format", "table").out.decode().splitlines()
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
    assert done.code == 1
    assert "numpyesm[plot]" in done.err


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
        ("encode MKT", "x.h5", ".npz"),
        ("encode MKT", "x", "no ending"),
        ("encode MKT", "new/", "not a file name"),
        ("encode MKT", ".", "not a file name"),
        ("encode MKT --format json", "x.npz", "contradict"),
        ("encode MKT --include contacts", "x.csv", "row per residue"),
        ("encode MKT --include mean logits", "x.tsv.gz", "row per residue"),
        ("predict M<mask>T", "x.png", ".json"),
        ("log-prob MKT", "x.xlsx", ".tsv"),
        ("contacts MKT", "c.pdf", ".png"),
        ("contacts MKT GLV", "c.png", "2 pictures"),
        ("contacts MKT --format npz", "c/", "is a folder"),
        ("contacts MKT --format png", "-", "needs a file"),
        ("scan MKT", "s.npz", ".json"),
        (f"embed {EXAMPLES}", "-", ".parquet"),
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
        (["encode", "MKt"], 1, "lower case"),
        (["encode", "MKT:MKT"], 1, "between chains"),
        (["encode", "MK.T"], 1, "a stop codon or a gap"),
        (["encode", "no-such-file.fasta"], 1, "no file 'no-such-file.fasta'"),
        (["encode", ""], 1, "no file"),
        (["encode", "."], 1, "'.' is a folder"),
        (["encode", "MK<mask>"], 1, "predict"),
        (["predict", "MKT"], 1, "no <mask>"),
        (["encode", "A" * 2049], 1, "at most 2048"),
        (["encode", "-"], 1, "record 2 (sp|P1|BAD): 'J' at position 3"),
        (["encode", "MKT", "--layers", "9"], 2, "3 layers"),
        (["encode", "MKT", "--include", "all"], 2, "invalid choice"),
        (["encode"], 2, "required"),
        (["encode", "MKT", "--threads", "0"], 2, "threads=0"),
        (["encode", "MKT", "--weights", ""], 2, "an unset variable?"),
        (["serve", "--grace", "nan"], 2, "--grace: 'nan': expected a number above 0"),
        (["dance"], 2, "invalid choice"),
        ([], 2, "required"),
    ],
)
def test_wrong_use_and_bad_input(run: Any, arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments, stdin=b">good\nMKT\n>sp|P1|BAD x\nMKJ\n")
    assert done[:2] == (code, b"")
    assert message in done.err
    assert "Traceback" not in done.err
    if code == 1:
        assert "Traceback" in run(*arguments, "--debug").err


def test_without_weights_the_ways_out_are_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMPYESM_WEIGHTS", "gone.safetensors")
    done = run("encode", "MKT", bare=True)
    assert (done.code, "gone.safetensors" in done.err) == (1, True)
    if OFFICIAL_HERE:
        return
    monkeypatch.delenv("NUMPYESM_WEIGHTS")
    for cache in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(cache, "empty")
    done = run("encode", "MKT", bare=True)
    assert done.code == 1
    for way in ("numpyesm fetch", "NUMPYESM_WEIGHTS", "weights/", "synthetic", "fbaipublicfiles"):
        assert way in done.err


# -- weights files -----------------------------------------------------------------------------------------------


def test_convert_says_what_it_made_and_leaves_nothing_half_written(run: Any) -> None:
    done = run("convert", "synthetic:esm2-8m:1", "-o", "half.safetensors", "--dtype", "fp16")
    assert (done.code, done.out.decode().strip()) == (0, "half.safetensors")
    assert "esm2-8m" in done.err
    Path("bad.pt").write_bytes(b"PK\x03\x04 not really a zip")
    for source in ("bad.pt", "missing.pt", "."):
        done = run("convert", source, "-o", "out/x.safetensors")
        assert (done.code, done.err.count("\n")) == (1, 1), source
        assert not list(Path().rglob("x.safetensors*"))


def test_hostile_pickle_does_nothing(run: Any) -> None:
    torch = pytest.importorskip("torch")

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, ("touch owned",)

    torch.save({"model": {"x": Payload()}, "cfg": Payload()}, "evil.pt")
    Path("plain.pkl").write_bytes(pickle.dumps(Payload()))
    for source in ("evil.pt", "plain.pkl"):
        assert run("convert", source, "-o", "x.safetensors").code == 1
        assert not Path("owned").exists()


def test_info_and_verify(run: Any, small_file: str) -> None:
    done = run("info")
    assert done.code == 0
    for part in ("custom: 3 layers, width 80", "NUMPYESM_WEIGHTS", "threads"):
        assert part in done.out.decode()
    data = bytearray(Path(small_file).read_bytes())
    data[-5] ^= 1
    Path("bad.safetensors").write_bytes(data)
    for weights, code, said in (
        ("synthetic:esm2-8m", 1, "synthetic weights cannot reproduce"),
        (small_file, 2, "reference numbers for esm2-8m and esm2-35m only"),
        ("bad.safetensors", 1, "corrupted"),
    ):
        done = run("verify", "--weights", weights)
        assert (done.code, said in done.err) == (code, True), done.err
        assert ("DIFFERS" in done.out.decode()) == weights.startswith("synthetic")


@pytest.mark.skipif(bool(OFFICIAL_HERE), reason="official weights are in weights/")
@pytest.mark.slow
def test_demo_without_weights_shows_everything_and_says_synthetic(run: Any) -> None:
    done = run("demo", bare=True)
    assert done.code == 0
    assert "SYNTHETIC WEIGHTS" in done.err
    for part in ("Embeddings of 4 proteins", "Which residue is at position", "Contact map", "residues/s", "SYNTHETIC"):
        assert part in done.out.decode()
    assert Path("demo-output/contacts.txt").stat().st_size > 1000


# -- a process of its own ----------------------------------------------------------------------------------------


@posix
def test_broken_pipe_is_quiet(small_file: str) -> None:
    command = f"{sys.executable} -m numpyesm encode {EXAMPLES} --include per_token --weights {small_file} | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert (done.stdout, done.stderr) == (b'{"results"', b"")


@posix
def test_interrupt_ends_within_seconds(tmp_path: Path) -> None:
    fasta, out = tmp_path / "long.fasta", tmp_path / "x.json"
    fasta.write_text("".join(f">{i}\n{random_sequence(2000, i)}\n" for i in range(40)))
    command = ["encode", str(fasta), "-o", str(out), "--weights", "synthetic:esm2-8m", "--backend", "numpy"]
    process = subprocess.Popen([sys.executable, "-m", "numpyesm", *command], stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"SYNTHETIC" in process.stderr.readline()  # the weights are made: it computes from now on
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert b"interrupted" in process.stderr.read()
    assert not out.exists()
