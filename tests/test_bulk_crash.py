"""Killed, interrupted or out of disk at any moment: the same command resumes, and the output is the same.

On a Ray cluster of this machine too.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import SMALL, assert_same, rows, small_model, write_fasta

from numpyesm import ESM2
from numpyesm.bulk import Progress, Summary, embed_fasta, job
from numpyesm.bulk.journal import Journal
from numpyesm.bulk.ray_engine import check_ray
from numpyesm.cli import main
from numpyesm.errors import BulkError
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

pytest.importorskip("pyarrow")
pytest.importorskip("h5py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
    pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning"),
]

COUNT, DUPLICATES, REJECTED = 60, 20, 2
WRITES_ALL = COUNT + DUPLICATES + REJECTED + 10  # steps of a run until it computes
# What a run does to the disk for good.
DISK_STEPS = [f"os.{name}" for name in ("fsync", "replace", "mkdir", "rmdir", "unlink", "rename")]
DISK_STEPS += [f"numpyesm.bulk.journal.Journal.{name}" for name in ("add_record", "finish_reading", "commit")]
INTERRUPT, KILL = (partial(signal.raise_signal, number) for number in (signal.SIGINT, signal.SIGKILL))


def run(place: Path, out: Path, **options: Any) -> Summary:
    """`embed_fasta` in this process, as `run_and` has it."""
    model = ESM2.from_pretrained(options.pop("weights", place / "small.safetensors"), backend="numpy", threads=1)
    options = {"include": ["mean", "per_token"], "tokens_per_batch": 300} | options
    return embed_fasta(options.pop("inputs", place / "in.fasta"), out, model, **options)


def run_and(
    act: Callable[[], object], place: Path, out: Path, at: int = 1, steps: list[str] = DISK_STEPS
) -> tuple[int, str]:
    """Exit code (negative: the signal) of a process that does what `_embed` says, and its stderr and stdout.

    It is a fork of one that has imported everything and has no threads, so that its start takes no time.
    """
    words = [
        *("embed", str(place / "in.fasta"), "-o", str(out), "--weights", str(place / "small.safetensors")),
        *("--include", "mean", "per_token", "--backend", "numpy", "--threads", "1", "--tokens-per-batch", "300"),
    ]
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_bulk_crash", "numpyesm.bulk.job", "pytest", "pyarrow.parquet", "h5py", "filelock"]
    )
    process = context.Process(target=_embed, args=(place / "log", words, at, act, steps))
    process.start()
    process.join(100)
    process.kill()
    process.join()
    return process.exitcode, (place / "log").read_text()


def _embed(log: Path, words: list[str], at: int, act: Callable[[], object], steps: list[str]) -> None:
    """`numpyesm embed`, which acts after the n-th of its steps."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    calls = itertools.count(1)

    def acting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return function(*arguments, **keywords)
            finally:
                if next(calls) == at:
                    act()

        return call

    for step in steps:
        mock.patch(step, acting(pkgutil.resolve_name(step))).start()
    job.COMMIT_SECONDS, job.COMMIT_SHARE = 0, 1e9
    sys.exit(main(words))


def limit_files(size: int) -> None:
    """No file may grow beyond a size: as a full disk, but it takes no rights."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.fixture(scope="module")
def place(small_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an input with duplicates and two records that cannot be embedded, and the results of quiet runs."""
    folder = tmp_path_factory.mktemp("crash")
    shutil.copy(small_file, folder / "small.safetensors")
    fasta = write_fasta(folder / "in.fasta", COUNT, duplicates=DUPLICATES)
    fasta.write_text(fasta.read_text() + ">bad1\nMKJ\n>bad2\n\n")
    for name in ("out.parquet", "out.h5", "out"):
        assert run(folder, folder / name).rejected == REJECTED
        assert len(rows(folder / name)) == COUNT + DUPLICATES
    return folder


def check(place: Path, out: Path) -> None:
    """The output is that of a quiet run, and nothing else is left."""
    assert_same(rows(out), rows(place / out.name))
    if out.suffix == ".parquet":
        assert out.read_bytes() == (place / out.name).read_bytes()
    assert out.with_name("out.rejected.tsv").read_text() == (place / "out.rejected.tsv").read_text()
    assert {entry.name for entry in out.parent.iterdir()} == {out.name, "out.rejected.tsv"}


def has_read(out: Path) -> bool:
    """Whether the run has all of its input, so that the next one does not start over."""
    folder = out.with_name(out.name + ".partial")
    if not (folder / "journal.sqlite").exists():
        return out.exists()
    with closing(Journal(folder)) as journal:
        return journal.fingerprint is not None


@pytest.mark.parametrize(("name", "step"), [("out.parquet", 2), ("out.h5", 4), ("out", 4)])
def test_killed_at_many_points_of_the_way(place: Path, tmp_path: Path, name: str, step: int) -> None:
    """Each run is killed at its n-th step and resumes where the one before was: nothing lost, doubled or torn."""
    out = tmp_path / name
    # While reading, and about its end; then a few steps further each time, through computing and writing.
    reading, later = iter([3, 50, *range(82, 100)]), iter(range(2, 100, step))
    killed = 0
    while run_and(KILL, place, out, next(later if has_read(out) else reading))[0] == -9:
        killed += 1
    assert killed >= 8
    assert run(place, out).already_complete
    check(place, out)


HDF5_WRITES = ["numpyesm.bulk.writers.hdf5.UnfailingFile.write"]


@pytest.mark.parametrize(
    ("number", "code", "name", "at", "steps"),
    [
        (signal.SIGINT, 130, "out.parquet", WRITES_ALL + 10, DISK_STEPS),
        (signal.SIGTERM, 143, "out.parquet", WRITES_ALL + 10, DISK_STEPS),
        (signal.SIGINT, 130, "out.h5", 1, HDF5_WRITES),  # the library itself would crash, or leave tracebacks
        (signal.SIGINT, 130, "out.h5", 100, HDF5_WRITES),
    ],
)
def test_a_signal_keeps_what_is_done(
    place: Path, tmp_path: Path, number: signal.Signals, code: int, name: str, at: int, steps: list[str]
) -> None:
    out = tmp_path / name
    found, said = run_and(partial(signal.raise_signal, number), place, out, at, steps)
    assert (found, said) == (code, "numpyesm: interrupted\n" if code == 130 else "")
    assert not out.exists()
    computed = run(place, out).computed
    assert 0 < computed < COUNT if steps is DISK_STEPS else computed == 0
    check(place, out)


class Acting(Progress):
    """Does something once so many sequences are computed."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._after, self._act = after, act

    def advance(self, step: Any) -> None:
        super().advance(step)
        if self.done.sequences == self._after:
            self._act()


def interrupted(place: Path, out: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(place, out, progress=Acting(after, INTERRUPT))


def test_resuming_computes_only_the_rest(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, progress, notes = tmp_path / "out.parquet", Progress(), []
    interrupted(place, out, 15)
    interrupted(place, out, 40)
    other = write_fasta(tmp_path / "other.fasta", 3)
    with pytest.raises(BulkError, match="the input has changed"):
        run(place, out, inputs=other)
    other.unlink()
    with pytest.raises(BulkError, match=r'interrupted run of another kind \(dtype "fp32" instead of "fp16"\)'):
        run(place, out, dtype="fp16")
    monkeypatch.setattr(progress, "note", notes.append)
    assert run(place, out, progress=progress).computed == COUNT - 40
    assert "resuming" in notes[0]
    check(place, out)


WRITING = ["numpyesm.bulk.progress.BarProgress.writing"]


@pytest.mark.parametrize(
    ("name", "size", "steps", "file"),
    [
        ("out.parquet", 300 << 10, DISK_STEPS, "journal.sqlite"),
        ("out.parquet", 1000, WRITING, "output"),
        ("out.h5", 1000, WRITING, "output"),  # the library crashes when it cannot write while it closes a data set
        ("out.h5", 300 << 10, WRITING, "output"),
        ("out.h5", -1, WRITING, "output"),  # a byte is missing
        ("out", 10 << 10, WRITING, "output"),
        ("out", 5000, WRITING, "output"),  # its list of names
    ],
)
def test_a_full_disk(place: Path, tmp_path: Path, name: str, size: int, steps: list[str], file: str) -> None:
    """A limit on the size of a file takes its place: that needs no rights. One line says which file, and what to do."""
    out = tmp_path / name
    limit = size if size > 0 else (place / name).stat().st_size + size
    code, said = run_and(partial(limit_files, limit), place, out, steps=steps)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith(f"numpyesm: error: {out}.partial/{file} cannot be written (")
    assert "the same command resumes once there is space" in said
    assert not out.exists()
    assert not (tmp_path / f"{out.name}.partial" / "output").exists()  # room for others
    run(place, out)
    check(place, out)


DAMAGES = {
    "the letters": "UPDATE sequences SET letters = 'W' || substr(letters, 2) "
    "WHERE number NOT IN (SELECT number FROM done)",
    "the numbers": "UPDATE numbers SET data = zeroblob(length(data)) WHERE number = (SELECT min(number) FROM numbers)",
    "whose numbers they are": "CREATE TEMP TABLE copy AS SELECT * FROM numbers; UPDATE numbers SET data = ("
    "SELECT data FROM copy ORDER BY number DESC LIMIT 1) WHERE number = (SELECT min(number) FROM numbers)",
    "an id": "UPDATE records SET id = 'other' WHERE position = 3",
    "no database": None,
}


@pytest.fixture(scope="module")
def half_done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    interrupted(place, folder / "out.parquet", 30)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(place: Path, half_done: Path, tmp_path: Path, damage: str) -> None:
    """Whatever was changed in what an interrupted run left: an error that names the file, not a wrong number."""
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.partial" / "journal.sqlite"
    statements = DAMAGES[damage]
    if statements is None:
        journal.write_bytes(b"not a database at all" * 100)
    else:
        with closing(sqlite3.connect(journal)) as db:
            db.executescript(statements)
    with pytest.raises(BulkError, match=r"journal\.sqlite .*--restart"):
        run(place, out)
    assert not out.exists()
    run(place, out, restart=True)
    check(place, out)


def test_a_batch_is_committed_when_it_is_done(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the first result of the next one, which may take minutes."""
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0)
    commit, done = Journal.commit, set()
    monkeypatch.setattr(Journal, "commit", lambda self: (commit(self), done.add(self.totals(done=True).sequences)))
    run(place, tmp_path / "out.parquet", tokens_per_batch=10**6)
    assert done <= {0, COUNT}


def test_weights_that_are_overwritten_during_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops, and keeps what it had. (What replaces a file does no harm, see test_files.py.)"""
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(job, "COMMIT_SHARE", 1e9)
    weights, other, out = (tmp_path / name for name in ("w.safetensors", "other.safetensors", "out.parquet"))
    save_canonical(other, replace(random_checkpoint(SMALL, seed=2), synthetic=False))
    shutil.copyfile(place / "small.safetensors", weights)
    again = partial(run, place, out, weights=weights)
    with pytest.raises(BulkError, match=rf"{weights} was overwritten during the run"):
        again(progress=Acting(20, lambda: shutil.copyfile(other, weights)))
    with pytest.raises(BulkError, match=r"another kind \(weights sha256"):
        again()
    shutil.copyfile(place / "small.safetensors", weights)
    assert 0 < again().computed < COUNT
    assert_same(rows(out), rows(place / "out.parquet"))


# -- Ray: the local engine's output, also if a worker is killed on the way -----------------------------------------


on_ray = pytest.mark.skipif(sys.platform != "linux" or find_spec("ray") is None, reason="needs Ray, reads /proc")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that is there already; more CPUs than the machine may have: two actors whatever it is."""
    ray = check_ray(None, None)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def below(ancestor: int) -> dict[int, str]:
    """All processes below one, and what they are called."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == ancestor:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
                found |= below(int(stat.parent.name))
    return found


def kill_one_of_two() -> None:
    """Kill a worker, once both have started."""
    while len(pool := [pid for pid, name in below(os.getpid()).items() if "ray::_Worker" in name]) < 2:
        pass
    os.kill(pool[0], signal.SIGKILL)


@on_ray
@pytest.mark.usefixtures("cluster")
def test_two_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 90, duplicates=20)
    source.write_text(source.read_text() + ">bad\nMKJ\n")
    model = small_model(backend="numpy", threads=1)
    ray: dict[str, Any] = {"engine": "ray", "workers": 2, "threads": 1, "progress": Acting(1, kill_one_of_two)}
    for engine, options in (("ray", ray), ("local", {})):
        # One name in two folders: a table's metadata name its list of rejected records.
        done = embed_fasta(source, tmp_path / engine / "out.parquet", model, tokens_per_batch=300, **options)
        assert (done.computed, done.sequences, done.rejected) == (90, 90, 1)
        assert {path.name for path in (tmp_path / engine).iterdir()} == {"out.parquet", "out.rejected.tsv"}
    for name in ("out.parquet", "out.rejected.tsv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@on_ray
@pytest.mark.usefixtures("cluster")
def test_an_error_in_a_worker_is_the_run_s_error(tmp_path: Path) -> None:
    """The message of the local engine, although it happens in another process."""
    checkpoint = random_checkpoint(SMALL, seed=1)
    tensors = dict(checkpoint.tensors)
    tensors["final_norm.bias"] = StoredTensor(tensors["final_norm.bias"].raw + np.float32(1e6))
    model = ESM2(replace(checkpoint, tensors=tensors), backend="numpy", threads=1)
    source = write_fasta(tmp_path / "in.fasta", 10)
    for engine in ("local", "ray"):
        with pytest.raises(BulkError, match=r"^mean_3 has 1e\+06, beyond float16: use dtype fp32$"):
            embed_fasta(source, tmp_path / "o.parquet", model, dtype="fp16", engine=engine)


@on_ray
def test_interrupted_on_ray_and_finished_here(tmp_path: Path) -> None:
    """Both engines resume from the same journal; Ctrl-C leaves no process behind; Ray's own talk is not heard."""
    source = write_fasta(tmp_path / "in.fasta", 60, longest=300, seed=3)
    weights, out = "synthetic:esm2-8m", tmp_path / "out.parquet"
    options = f"--weights {weights} --backend numpy --threads 1 --tokens-per-batch 600 --engine ray --workers 1"
    command = [sys.executable, "-m", "numpyesm", "embed", source, "-o", out, *options.split(), "--json-progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:  # a line of Ray's is no JSON
        if json.loads(line).get("records", 0) > 8:
            break
    started = below(process.pid)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert [json.loads(line)["event"] for line in stderr.splitlines()][-1] == "error"
    deadline = time.monotonic() + 30
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    model = ESM2.from_pretrained(weights, backend="numpy", threads=1)
    assert 0 < embed_fasta(source, out, model, tokens_per_batch=600).computed < 60
    embed_fasta(source, tmp_path / "fresh.parquet", model, tokens_per_batch=600)
    assert out.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()
