"""The command line as a user runs it: a process, its stdout, stderr and exit code."""

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
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2
from numpyesm.fasta import read_fasta
from numpyesm.formats import json_results
from numpyesm.weights import convert

EXAMPLES = Path(__file__).parents[1] / "examples" / "proteins.fasta"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small canonical file that is not flagged synthetic, so that stderr stays quiet."""
    path = convert("synthetic:esm2-8m:1", tmp_path_factory.mktemp("weights") / "m.safetensors").path
    return str(path)


def numpyesm(*arguments: str, stdin: bytes = b"", cwd: Path | None = None, **environment: str) -> Any:
    """Run `numpyesm …` away from the network and from this machine's weights."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMPYESM", "HF_"))}
    return subprocess.run(
        [sys.executable, "-m", "numpyesm", *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env=clean | {"HF_HUB_OFFLINE": "1", "NUMPYESM_CACHE": str(cwd or "/nonexistent")} | environment,
        timeout=300,
    )


def results(done: Any) -> Any:
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)["results"]


def as_json(expected: Any, *ids: str) -> Any:
    """Results as they are written: numbers in the fewest digits."""
    names = ids or [f"sequence_{i}" for i in range(1, len(expected) + 1)]
    return json.loads(b"".join(json_results(expected, names)))["results"]


def test_encode_bare_sequences_as_json(weights: str) -> None:
    found = results(
        numpyesm("encode", "MKT-X", "W*", "--weights", weights, "--layers", "-1", "2", "--backend", "numpy",
                 "--include", "mean", "bos", "per_residue", "contacts", "logits", "attentions")
    )  # fmt: skip
    expected = ESM2.from_pretrained(weights, backend="numpy").encode(
        ["MKT-X", "W"], [-1, 2], ["mean", "bos", "per_token", "contacts", "logits", "attentions"]
    )
    assert found == as_json(expected)


@pytest.mark.parametrize("kind", ["plain", "gzip", "crlf-lower-star", "stdin", "stdin-gzip"])
def test_encode_fasta(weights: str, tmp_path: Path, kind: str) -> None:
    text = b">one first\nMKTAYI\nAKQR\n>two\nMK\n"
    if kind == "crlf-lower-star":
        text = b">one first\r\nmktayi\r\nakqr*\r\n>two\r\nmk*\r\n"
    data = gzip.compress(text) if "gzip" in kind else text
    path = tmp_path / "x.fasta"
    path.write_bytes(data)
    stdin = kind.startswith("stdin")
    found = results(
        numpyesm(
            "encode",
            "-" if stdin else str(path),
            "--weights",
            weights,
            "--backend",
            "numpy",
            stdin=data if stdin else b"",
        )
    )
    expected = ESM2.from_pretrained(weights, backend="numpy").encode(["MKTAYIAKQR", "MK"])
    assert found == as_json(expected, "one", "two")


def test_encode_to_npz_and_table(weights: str, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    done = numpyesm("encode", "MKT", "MKTA", "-o", str(out), "--weights", weights, "--include", "mean", "contacts")
    assert done.returncode == 0
    assert done.stdout == b""
    with np.load(out, allow_pickle=False) as arrays:
        assert list(arrays["ids"]) == ["sequence_1", "sequence_2"]
        assert arrays["mean_6"].shape == (2, 320)
        assert arrays["contacts_1"].shape == (4, 4)
    piped = numpyesm("encode", "MKT", "--format", "npz", "--weights", weights)
    with np.load(io.BytesIO(piped.stdout), allow_pickle=False) as arrays:
        assert arrays["mean_6"].shape == (1, 320)
    table = numpyesm("encode", str(EXAMPLES), "--format", "table", "--weights", weights).stdout.decode().splitlines()
    assert len(table) == 16
    assert table[0].split()[:3] == ["id", "length", "output"]
    assert list(tmp_path.iterdir()) == [out]


def test_predict_and_log_prob(weights: str) -> None:
    model = ESM2.from_pretrained(weights, backend="numpy")
    common = ("--weights", weights, "--backend", "numpy")
    assert results(numpyesm("predict", "M<mask>T", *common)) == as_json(model.predict(["M<mask>T"]))
    masked = results(numpyesm("predict", "M<mask>T", "--positions", "masked", *common))
    assert np.shape(masked[0]["logits"]) == (1, 20)
    assert results(numpyesm("log-prob", "MKT", *common)) == as_json(model.log_prob(["MKT"]).tolist())
    table = numpyesm("predict", "M<mask>T", "--format", "table", *common).stdout.decode()
    assert "position" in table.splitlines()[0]
    assert table.splitlines()[1].split()[1] == "2"


def test_contacts_as_text_numbers_and_picture(weights: str, tmp_path: Path) -> None:
    sequence = random_sequence(60)
    common = ("--weights", weights, "--backend", "numpy")
    contacts = ESM2.from_pretrained(weights, backend="numpy").encode([sequence], include=["contacts"])[0].contacts
    lines = numpyesm("contacts", sequence, "--threshold", "0.1", *common).stdout.decode().splitlines()[1:]
    listed = {(int(f[1]), int(f[3])): float(f[5]) for f in (line.split("\t") for line in lines)}
    i, j = np.nonzero(np.triu(contacts >= 0.1, k=6))
    assert listed == {(a + 1, b + 1): pytest.approx(contacts[a, b], abs=1e-4) for a, b in zip(i, j, strict=True)}
    assert list(listed.values()) == sorted(listed.values(), reverse=True)
    drawn = numpyesm("contacts", sequence, "--format", "map", *common).stdout.decode()
    assert "60 residues" in drawn
    pytest.importorskip("matplotlib")
    assert numpyesm("contacts", sequence, "-o", str(tmp_path / "map.png"), *common).returncode == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert (
        numpyesm("contacts", sequence, "MKT", "-o", str(tmp_path / "maps"), "--format", "png", *common).returncode == 0
    )
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2


READERS = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@pytest.mark.parametrize("compression", READERS)
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_spreadsheets_of_embeddings(weights: str, tmp_path: Path, ending: str, compression: str) -> None:
    """A row per sequence or per residue, with the very numbers, compressed if the name says so."""
    name = "a," + "x" * 300
    fasta, out = tmp_path / "in.fasta", tmp_path / f"out{ending}{compression}"
    fasta.write_text(f">{name}\nMKT\n>two\nGL\n")
    model = ESM2.from_pretrained(weights, backend="numpy")
    for include in (["mean", "bos"], ["per_token", "logits"]):
        done = numpyesm("encode", str(fasta), "-o", str(out), "--include", *include, "--weights", weights,
                        "--backend", "numpy")  # fmt: skip
        assert done.returncode == 0, done.stderr
        with READERS[compression](out, "rt") as file:
            rows = list(csv.reader(file, delimiter="," if ending == ".csv" else "\t"))
        first, second = model.encode(["MKT", "GL"], include=include)
        if include == ["mean", "bos"]:
            assert [row[0] for row in rows] == ["id", name, "two"]
            assert rows[0][1] == "mean_6_0"
            expected = [np.concatenate([r.embeddings[6], r.bos_embeddings[6]]) for r in (first, second)]
            np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], np.float32), expected)
        else:
            assert [row[:3] for row in rows[1:]] == [[name, "1", "M"], [name, "2", "K"], [name, "3", "T"],
                                                     ["two", "1", "G"], ["two", "2", "L"]]  # fmt: skip
            assert rows[0][-20:] == [f"logits_{letter}" for letter in first.vocab_tokens]
            expected = np.concatenate([np.hstack([r.per_token_embeddings[6], r.logits]) for r in (first, second)])
            np.testing.assert_array_equal(np.array([row[3:] for row in rows[1:]], np.float32), expected)


def test_log_prob_of_no_amino_acid(weights: str, tmp_path: Path) -> None:
    (tmp_path / "odd.fasta").write_text(">whole\nMKT\n>unknown\nXXXX\n>gaps\nX-BZ\n")
    common = ("--weights", weights, "--backend", "numpy")
    found = numpyesm("log-prob", str(tmp_path / "odd.fasta"), *common)
    assert found.returncode == 0
    assert "no log-probability (NaN)" in found.stderr.decode()
    assert "amino acids: unknown, gaps\n" in found.stderr.decode()
    assert [one["log_prob"] is None for one in json.loads(found.stdout)["results"]] == [False, True, True]


def test_log_prob_and_predict_as_csv(weights: str, tmp_path: Path) -> None:
    common = ("--weights", weights, "--backend", "numpy")
    model = ESM2.from_pretrained(weights, backend="numpy")
    lines = numpyesm("log-prob", "MKT", "--format", "csv", *common).stdout.decode().splitlines()
    assert lines == ["id,length,log_prob", f"sequence_1,3,{model.log_prob(['MKT']).tolist()[0]!r}"]
    lines = numpyesm("predict", "M<mask>T", "--format", "tsv", *common).stdout.decode().splitlines()
    assert [line.split("\t")[:3] for line in lines[1:]] == [
        ["sequence_1", "1", "M"], ["sequence_1", "2", "<mask>"], ["sequence_1", "3", "T"]]  # fmt: skip
    found = [line.split("\t")[3:] for line in lines[1:]]
    np.testing.assert_array_equal(np.array(found, np.float32), model.predict(["M<mask>T"])[0].logits)


@pytest.mark.parametrize(
    ("command", "output", "said"),
    [
        (["encode", "MKT"], "x.parquet", ".csv"),
        (["encode", "MKT"], "x.h5", ".npz"),
        (["encode", "MKT"], "x", "no ending"),
        (["encode", "MKT"], "new/", "no name of a file"),
        (["encode", "MKT"], ".", "no name of a file"),
        (["encode", "MKT", "--format", "json"], "x.npz", "contradict"),
        (["encode", "MKT", "--include", "contacts"], "x.csv", "row per residue"),
        (["encode", "MKT", "--include", "mean", "logits"], "x.tsv.gz", "row per residue"),
        (["predict", "M<mask>T"], "x.png", ".json"),
        (["log-prob", "MKT"], "x.xlsx", ".tsv"),
        (["contacts", "MKT"], "c.pdf", ".png"),
        (["contacts", "MKT", "GLV"], "c.png", "2 pictures"),
        (["scan", "MKT"], "s.npz", ".json"),
        (["embed", str(EXAMPLES)], "-", ".parquet"),
    ],
)
def test_what_the_output_names_is_written_or_refused(
    tmp_path: Path, command: list[str], output: str, said: str
) -> None:
    """Before anything is computed or loaded: the weights do not exist."""
    done = numpyesm(*command, "-o", output, "--weights", "synthetic:esm2-8m", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.decode()
    assert b"SYNTHETIC" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX names")
def test_outputs_that_are_streams_or_cannot_be_written(weights: str, tmp_path: Path) -> None:
    common = ("--weights", weights, "--backend", "numpy")
    done = numpyesm("encode", "MKT", "-o", "/dev/stdout", *common)
    assert results(done) == results(numpyesm("encode", "MKT", *common))
    (tmp_path / "file").write_text("")
    done = numpyesm("encode", "MKT", "-o", str(tmp_path / "file/x.npz"), "--weights", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert b"file/x.npz cannot be written" in done.stderr  # and not that the weights are missing


def test_picture_without_matplotlib_names_the_extra(weights: str, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('blocked')")
    done = numpyesm("contacts", "MKT", "-o", str(tmp_path / "m.png"), "--weights", weights, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert b"numpyesm[plot]" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("encode", "MK7"), 1, "position 3"),
        (("encode", "MKt"), 1, "lower case"),
        (("encode", "MKT:MKT"), 1, "between chains"),
        (("encode", "MK.T"), 1, "a stop codon or a gap"),
        (("encode", "no-such-file.fasta"), 1, "no file 'no-such-file.fasta'"),
        (("encode", ""), 1, "no file"),
        (("encode", "MK<mask>"), 1, "predict"),
        (("predict", "MKT"), 1, "no <mask>"),
        (("encode", "A" * 2049), 1, "at most 2048"),
        (("encode", "MKT", "--layers", "9"), 2, "6 layers"),
        (("encode", "MKT", "--include", "all"), 2, "invalid choice"),
        (("encode",), 2, "required"),
        (("encode", "MKT", "--threads", "0"), 2, "threads=0"),
        (("dance",), 2, "invalid choice"),
        ((), 2, "required"),
    ],
)
def test_wrong_use_and_bad_input(weights: str, arguments: tuple[str, ...], code: int, message: str) -> None:
    extra = ("--weights", weights) if len(arguments) > 1 else ()
    done = numpyesm(*arguments, *extra)
    assert (done.returncode, done.stdout) == (code, b"")
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_bad_record_is_named(weights: str) -> None:
    done = numpyesm("encode", "-", "--weights", weights, stdin=b">good\nMKT\n>sp|P1|BAD x\nMKJ\n")
    assert done.returncode == 1
    assert "record 2 (sp|P1|BAD)" in done.stderr.decode()
    assert "'J' at position 3" in done.stderr.decode()


def test_notes_on_stderr(weights: str) -> None:
    """Once a command for each kind; the results are there all the same."""
    done = numpyesm(
        "encode", "-", "--weights", weights, stdin=b">a\nATGGCCAAAGTTTAG\n>b\nMKT\n>c\nATGGCCAAAGTTTAA\n>d\nM-T\n"
    )
    assert len(results(done)) == 4
    notes = [line.split(" (")[0] for line in done.stderr.decode().splitlines() if "(first: " in line]
    assert notes == ["numpyesm: warning: 2 sequences", "numpyesm: warning: 1 sequence"]


@pytest.mark.parametrize(
    ("command", "letters"), [("encode", "MKTA"), ("log-prob", "MK-A"), ("predict", "MK<mask>A"), ("contacts", "MKTA")]
)
def test_ids(weights: str, command: str, letters: str) -> None:
    """And notes are seen at each of them."""
    text = f">sp|P12345|AATM_RABIT x\n{letters}\n>\n{letters}\n".encode()
    for ids, first in ((), "sp|P12345|AATM_RABIT"), (("--ids", "accession"), "P12345"):
        done = numpyesm(command, "-", "--weights", weights, "--format", "json", *ids, stdin=text)
        assert [result["id"] for result in results(done)] == [first, "sequence_2"]
        assert ("with gaps (-)" in done.stderr.decode()) == ("-" in letters)


def test_traceback_only_with_debug(weights: str) -> None:
    assert b"Traceback" in numpyesm("encode", "MK7", "--debug", "--weights", weights).stderr


def test_without_weights_the_ways_out_are_named(tmp_path: Path) -> None:
    done = numpyesm("encode", "MKT", cwd=tmp_path, NUMPYESM_WEIGHTS=str(tmp_path / "gone.safetensors"))
    assert done.returncode == 1
    assert b"gone.safetensors" in done.stderr
    if not list((Path(__file__).parents[1] / "weights").glob("esm2*")):
        done = numpyesm("encode", "MKT", cwd=tmp_path, HF_HOME=str(tmp_path), TORCH_HOME=str(tmp_path))
        assert done.returncode == 1
        for way in (b"numpyesm fetch", b"NUMPYESM_WEIGHTS", b"weights/", b"synthetic", b"fbaipublicfiles"):
            assert way in done.stderr


def test_convert_says_what_it_made_and_leaves_nothing_half_written(weights: str, tmp_path: Path) -> None:
    done = numpyesm("convert", weights, "-o", str(tmp_path / "half.safetensors"), "--dtype", "fp16")
    assert done.returncode == 0
    assert done.stdout.decode().strip() == str(tmp_path / "half.safetensors")
    assert "esm2-8m" in done.stderr.decode()
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 not really a zip")
    for source in ("bad.pt", "missing.pt", "."):
        done = numpyesm("convert", source, "-o", str(tmp_path / "out" / "x.safetensors"), cwd=tmp_path)
        assert done.returncode == 1, source
        assert done.stderr.decode().count("\n") == 1
        assert not list(tmp_path.rglob("x.safetensors*"))


def test_hostile_pickle_does_nothing(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model": {"x": Payload()}, "cfg": Payload()}, tmp_path / "evil.pt")
    done = numpyesm("convert", "evil.pt", "-o", str(tmp_path / "x.safetensors"), cwd=tmp_path)
    assert done.returncode == 1
    assert not (tmp_path / "owned").exists()
    with open(tmp_path / "plain.pkl", "wb") as file:
        pickle.dump(Payload(), file)
    assert numpyesm("convert", "plain.pkl", "-o", str(tmp_path / "x.safetensors"), cwd=tmp_path).returncode == 1
    assert not (tmp_path / "owned").exists()


def test_info_and_verify(weights: str, tmp_path: Path) -> None:
    done = numpyesm("info", "--weights", weights, cwd=tmp_path)
    assert done.returncode == 0
    for part in ("esm2-8m: 6 layers", "NUMPYESM_WEIGHTS", "threads"):
        assert part in done.stdout.decode()
    done = numpyesm("verify", "--weights", weights)
    assert done.returncode == 1
    assert "synthetic weights cannot reproduce" in done.stderr.decode()
    done = numpyesm("verify", "--weights", "synthetic:esm2-150m")
    assert done.returncode == 2
    assert "reference numbers for esm2-8m and esm2-35m only" in done.stderr.decode()
    done = numpyesm("verify", "--weights", "synthetic")
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout.decode()


def test_verify_finds_a_flipped_bit(weights: str, tmp_path: Path) -> None:
    data = bytearray(Path(weights).read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    done = numpyesm("verify", "--weights", str(tmp_path / "bad.safetensors"))
    assert done.returncode == 1
    assert "corrupted" in done.stderr.decode()


def test_demo_shows_everything_and_says_synthetic(tmp_path: Path) -> None:
    if list((Path(__file__).parents[1] / "weights").glob("esm2*")):
        pytest.skip("official weights are in weights/")
    done = numpyesm("demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert "SYNTHETIC WEIGHTS" in done.stderr.decode()
    out = done.stdout.decode()
    for part in ("Embeddings of 4 proteins", "What stands at position", "Contact map", "residues/s", "SYNTHETIC"):
        assert part in out
    assert (tmp_path / "demo-output" / "contacts.txt").stat().st_size > 1000
    assert len(list(read_fasta(EXAMPLES))) == 15


def test_broken_pipe_is_quiet(weights: str) -> None:
    command = f"{sys.executable} -m numpyesm encode {EXAMPLES} --include per_token --weights {weights} | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert done.stdout.startswith(b'{"results"')
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_ends_within_seconds(tmp_path: Path) -> None:
    (tmp_path / "long.fasta").write_text("".join(f">{i}\n{random_sequence(2000, i)}\n" for i in range(40)))
    process = subprocess.Popen(
        [sys.executable, "-m", "numpyesm", "encode", str(tmp_path / "long.fasta"), "-o", str(tmp_path / "x.json"),
         "--weights", "synthetic:esm2-35m", "--backend", "numpy"],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stderr is not None
    assert b"interrupted" in process.stderr.read()
    assert not (tmp_path / "x.json").exists()
