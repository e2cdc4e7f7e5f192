"""`numpyesm embed` as a user runs it: what goes to stderr, exit codes, standard input."""

from __future__ import annotations

import gzip
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bulk_runs import LAST, assert_same, command, embed, environment, events, rows, small_weights, write_fasta
from conftest import Done, assert_close

from numpyesm.cli.parser import build_parser

pytest.importorskip("pyarrow")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_weights(tmp_path_factory.mktemp("weights"))


def test_quiet_when_not_a_terminal_and_stdin(weights: Path, tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 30)
    common = ("--weights", weights, "--backend", "numpy")
    done = embed(source, "-o", tmp_path / "a.parquet", *common)
    assert done.returncode == 0
    assert done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert "SYNTHETIC" in lines[0]
    for name, data in (("b.parquet", source.read_bytes()), ("c.parquet", gzip.compress(source.read_bytes()))):
        assert embed("-", "-o", tmp_path / name, *common, stdin=data).returncode == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "a.parquet").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "a.parquet", "b.parquet", "c.parquet"}
    again = embed(source, "-o", tmp_path / "a.parquet", *common)
    assert again.returncode == 0
    assert b"complete already" in again.stderr


def test_every_line_is_json_for_schedulers(weights: Path, tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 30, duplicates=5)
    source.write_text(source.read_text() + ">bad\nMKJ\n")
    arguments = (source, "-o", tmp_path / "out/a.parquet", "--weights", weights, "--json-progress")
    done = embed(*arguments, "--backend", "numpy")
    assert done.returncode == 1  # one record was rejected
    found = events(done.stderr)
    assert found[0]["event"] == "warning"
    progress = [event for event in found if event["event"] == "progress"]
    assert progress[-1]["records"] == progress[-1]["records_total"] == 35
    assert progress[-1]["residues_per_second"] > 0
    assert progress[-1]["seconds_left"] == 0
    assert found[-1]["event"] == "done"
    assert found[-1]["rejected"] == 1
    assert found[-1]["rejected_file"].endswith("out/a.rejected.tsv")
    for more, code in ((["--strict", "--overwrite"], 1), (["--layers", "9"], 2)):
        failed = embed(*arguments, *more, "--backend", "numpy")
        assert failed.returncode == code
        assert events(failed.stderr)[-1]["event"] == "error"
    assert len(rows(tmp_path / "out/a.parquet")) == 35


def test_the_limit_of_memory_is_obeyed(run: Callable[..., Done], tmp_path: Path) -> None:
    write_fasta(tmp_path / "in.fasta", 3)
    command = ("embed", "in.fasta", "-o", "a.parquet", "--overwrite", "--max-memory")
    for limit, code in ((("20M",), 1), (("lots",), 2), (("2G", "--engine", "ray"), 2)):
        failed = run(*command, *limit)
        assert failed.code == code
        assert re.search("max.memory", failed.err)
        assert not (tmp_path / "a.parquet").exists()
    assert run(*command, "9G").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_bar_on_a_terminal(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    import pty

    source = write_fasta(tmp_path / "in.fasta", 60)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(source, "-o", tmp_path / "a.parquet", "--weights", weights, "--backend", "numpy"),
        stderr=theirs,
        env=environment(TERM="xterm", COLUMNS="120"),
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "residues/s" in text
    assert "60 records in" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "x.parquet"], 2, "required"),
        (["in.fasta"], 2, "required"),
        (["in.fasta", "-o", "x.csv"], 2, "expected .parquet"),
        (["in.fasta", "-o", "in.fasta"], 2, "expected .parquet"),
        (["in.fasta", "-o", "x.parquet", "--shard", "3/2"], 2, "shard"),
        (["in.fasta", "-o", "x.parquet", "--tokens-per-batch", "0"], 2, "tokens_per_batch"),
        (["in.fasta", "-o", "x.parquet", "--workers", "2"], 2, "ray"),
        (["in.fasta", "-o", "x.parquet", "--long", "cut"], 2, "invalid choice"),
        (["gone.fasta", "-o", "x.parquet"], 1, "gone.fasta"),
        ([".", "-o", "x.parquet"], 1, "folder"),
        (["in.fasta", "-o", "in.fasta/x.parquet"], 1, "in.fasta"),
    ],
)
def test_wrong_use(run: Callable[..., Done], tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    write_fasta(tmp_path / "in.fasta", 2)
    done = run("embed", *arguments)
    assert done.code == code, done.err
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


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
def test_the_slurm_example(weights: Path, tmp_path: Path) -> None:
    """Each task of the array as Slurm would start it; together they are the whole."""
    source = write_fasta(tmp_path / "in.fasta", 40, duplicates=10)
    source.write_text(source.read_text() + ">bad\nJ\n")  # rejected: its task succeeds all the same
    program = tmp_path / "bin" / "numpyesm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m numpyesm "$@" --backend numpy\n')
    program.chmod(0o755)
    for task in (1, 2, 3):
        variables = environment(
            SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT="1", SLURM_CPUS_PER_TASK="1", WEIGHTS=str(weights),
            PATH=f"{program.parent}:{os.environ['PATH']}",
        )  # fmt: skip
        script = ["bash", str(EXAMPLES / "slurm" / "embed_array.sh"), str(source), str(tmp_path / "parts"), "3"]
        done = subprocess.run(script, env=variables, capture_output=True, timeout=100)
        assert done.returncode == 0, done.stderr.decode()
    assert len(list((tmp_path / "parts").glob("*.rejected.tsv"))) == 1
    embed(source, "-o", tmp_path / "whole.parquet", "--weights", weights, "--backend", "numpy")
    parts = [row for path in (tmp_path / "parts").glob("*.parquet") for row in rows(path)]
    whole = rows(tmp_path / "whole.parquet")
    for part, expected in zip(sorted(parts, key=lambda row: row["record"]), whole, strict=True):
        assert (part["record"], part["id"]) == (expected["record"], expected["id"])
        assert_close(part[f"mean_{LAST}"], expected[f"mean_{LAST}"])


def test_the_nextflow_example_uses_options_that_exist() -> None:
    text = (EXAMPLES / "nextflow" / "embed.nf").read_text()
    found = re.search(r"numpyesm (embed .*?--json-progress)", text, re.DOTALL)
    assert found is not None
    line = re.sub(r"\$\{[^}]*\}", "3", found[1].replace("\\\\\n", " "))
    arguments = build_parser().parse_args(shlex.split(line))
    assert arguments.shard == "3/3"
    assert arguments.output == "part-3.parquet"
