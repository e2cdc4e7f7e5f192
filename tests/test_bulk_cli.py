"""`numpyesm embed` as a user runs it: what goes to stderr, exit codes, standard input, and the examples."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bulk_runs import LAST, assert_same, rows, write_fasta
from conftest import Done, assert_close

from numpyesm.cli.parser import build_parser

pytest.importorskip("pyarrow")

EXAMPLES = Path(__file__).parents[1] / "examples"


def events(done: Done) -> list[dict[str, Any]]:
    """The JSON lines of a run; every line must be one."""
    return [json.loads(line) for line in done.err.splitlines()]


@pytest.mark.slow
def test_quiet_when_not_a_terminal_and_stdin(run: Callable[..., Done], tmp_path: Path) -> None:
    data = write_fasta(tmp_path / "in.fasta", 30).read_bytes()
    assert run("embed", "in.fasta", "-o", "a.parquet") == (0, b"", "")
    assert run("embed", "-", "-o", "b.parquet", stdin=gzip.compress(data)) == (0, b"", "")
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "a.parquet", "b.parquet"}
    again = run("embed", "in.fasta", "-o", "a.parquet")
    assert (again.code, "complete already" in again.err) == (0, True)


def test_every_line_is_json_for_schedulers(run: Callable[..., Done], tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 30, duplicates=5)
    source.write_text(source.read_text() + ">bad\nMKJ\n>dna\n" + "ACGT" * 20 + "\n")
    command = ("embed", "in.fasta", "-o", "out/a.parquet", "--json-progress")
    done = run(*command)
    assert done.code == 1  # one record was rejected
    found = events(done)
    assert [event["event"] for event in found if event["event"] != "progress"] == ["warning", "writing", "done"]
    progress = [event for event in found if event["event"] == "progress"]
    assert progress[-1]["records"] == progress[-1]["records_total"] == 36
    assert progress[-1]["residues_per_second"] > 0
    assert progress[-1]["seconds_left"] == 0
    assert found[-1]["rejected"] == 1
    assert found[-1]["rejected_file"].endswith("out/a.rejected.tsv")
    for more, code in ((["--strict", "--overwrite"], 1), (["--layers", "9"], 2)):
        failed = run(*command, *more)
        assert (failed.code, events(failed)[-1]["event"]) == (code, "error")
    assert len(rows(tmp_path / "out/a.parquet")) == 36


def test_a_bar_on_a_terminal(run: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    write_fasta(tmp_path / "in.fasta", 60)
    assert run("embed", "in.fasta", "-o", "a.parquet").code == 0
    assert "residues/s" in terminal.getvalue()
    assert "60 records in" in terminal.getvalue()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("-o x.parquet", 2, "required"),
        ("in.fasta", 2, "required"),
        ("in.fasta -o x.parquet --max-memory 2G --engine ray", 2, "--max-memory works with the local engine only"),
        ("gone.fasta -o x.parquet", 1, "gone.fasta"),
        ("empty.fasta -o x.parquet", 1, "empty.fasta: no sequences"),
        (". -o x.parquet", 1, "folder"),
        ("in.fasta -o in.fasta/x.parquet", 1, "in.fasta"),
    ],
)
def test_wrong_use(run: Callable[..., Done], tmp_path: Path, arguments: str, code: int, message: str) -> None:
    write_fasta(tmp_path / "in.fasta", 2)
    write_fasta(tmp_path / "empty.fasta", 0)
    done = run("embed", *arguments.split())
    assert done.code == code, done.err
    assert message in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "empty.fasta"}


def test_options_reach_the_output(run: Callable[..., Done], tmp_path: Path) -> None:
    write_fasta(tmp_path / "in.fasta", 5)
    common = ("embed", "in.fasta", "--layers", "0", "-1", "--dtype", "fp16", "--tokens-per-batch")
    done = run(*common, "50", "-o", "all", "--threads", "1", "--include", "per_residue", "contacts")
    assert done.code == 0, done.err
    row = rows(tmp_path / "all")[0]
    assert {"per_token_0", f"per_token_{LAST}", "contacts"} < set(row)
    assert (row["contacts"].shape, row["contacts"].dtype) == ((row["length"],) * 2, "float16")
    assert run(*common, "5000", "-o", "again", "--include", "contacts", "per_token").code == 0
    assert_same(tmp_path / "all", tmp_path / "again", 1e-3)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.slow
def test_the_slurm_example(run: Callable[..., Done], small_file: str, tmp_path: Path) -> None:
    """Each task of the array as Slurm would start it; together they are the whole."""
    source = write_fasta(tmp_path / "in.fasta", 40, duplicates=10)
    source.write_text(source.read_text() + ">bad\nJ\n")  # rejected: its task succeeds all the same
    program = tmp_path / "bin" / "numpyesm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m numpyesm "$@" --backend numpy\n')
    program.chmod(0o755)
    variables = {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "1", "WEIGHTS": small_file}
    variables["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    script = ["bash", EXAMPLES / "slurm" / "embed_array.sh", source, tmp_path / "parts", "2"]
    for task in ("1", "2"):
        environment = os.environ | variables | {"SLURM_ARRAY_TASK_ID": task}
        done = subprocess.run(script, env=environment, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr.decode()
    assert len(list((tmp_path / "parts").glob("*.rejected.tsv"))) == 1
    run("embed", "in.fasta", "-o", "whole.parquet")
    parts = [row for path in (tmp_path / "parts").glob("*.parquet") for row in rows(path)]
    for part, expected in zip(
        sorted(parts, key=lambda row: row["record"]), rows(tmp_path / "whole.parquet"), strict=True
    ):
        assert (part["record"], part["id"]) == (expected["record"], expected["id"])
        assert_close(part[f"mean_{LAST}"], expected[f"mean_{LAST}"])


def test_the_nextflow_example_uses_options_that_exist() -> None:
    text = (EXAMPLES / "nextflow" / "embed.nf").read_text()
    found = re.search(r"numpyesm (embed .*?--json-progress)", text, re.DOTALL)
    assert found is not None
    line = re.sub(r"\$\{[^}]*\}", "3", found[1].replace("\\\\\n", " "))
    arguments = build_parser().parse_args(shlex.split(line))
    assert (arguments.shard, arguments.output) == ("3/3", "part-3.parquet")
