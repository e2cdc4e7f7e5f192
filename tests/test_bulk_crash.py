"""Killed, interrupted or out of disk at any moment: the same command goes on, and the result is the same."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from bulk_runs import assert_same, command, embed, environment, rows, small_weights, write_fasta

from numpyesm.config import PRESETS
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.synthetic import random_checkpoint

resource = pytest.importorskip("resource")  # not on Windows
pytest.importorskip("pyarrow")
pytest.importorskip("h5py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ["parquet", "h5", "folder"]
COUNT, DUPLICATES, REJECTED = 60, 20, 2


def output(folder: Path, form: str) -> Path:
    return folder / ("out" if form == "folder" else f"out.{form}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an input with duplicates and two records that cannot be embedded, and the result of a quiet run."""
    folder = tmp_path_factory.mktemp("crash")
    small_weights(folder)
    fasta = write_fasta(folder / "in.fasta", COUNT, duplicates=DUPLICATES)
    fasta.write_text(fasta.read_text() + ">bad1\nMKJ\n>bad2\n\n")
    for form in FORMATS:
        done = embed(*arguments(folder, output(folder, form)))
        assert done.returncode == 1, done.stderr.decode()
        assert len(rows(output(folder, form))) == COUNT + DUPLICATES
    return folder


def arguments(place: Path, out: Path) -> list[object]:
    return [
        *(place / "in.fasta", "-o", out, "--weights", place / "small.safetensors", "--include", "mean", "per_token"),
        *("--backend", "numpy", "--threads", 1, "--tokens-per-batch", 300),
    ]


def check(place: Path, out: Path, form: str) -> None:
    assert_same(out, output(place, form))
    rejected = out.with_name("out.rejected.tsv").read_text()
    assert rejected == (place / "out.rejected.tsv").read_text()
    assert rejected.count("\n") == 1 + REJECTED
    left = {entry.name for entry in out.parent.iterdir()}
    assert left == {out.name, "out.rejected.tsv"}


# Kills its own process just before, or just after, the n-th call of anything that touches the disk for good.
_CRASHING = """
import os, signal, sys, pathlib, itertools
calls = itertools.count(1)
at, after = int(sys.argv.pop(1)), sys.argv.pop(1) == "after"

def crashing(function):
    def call(*arguments, **keywords):
        now = next(calls) == at
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*arguments, **keywords)
        finally:
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
    return call

import numpyesm.bulk.job as job, numpyesm.bulk.journal as journal, numpyesm.bulk.writers.folder as folder
for name in ("fsync", "replace", "mkdir", "rmdir", "unlink", "rename"):
    setattr(os, name, crashing(getattr(os, name)))
job.COMMIT_SECONDS, job.COMMIT_SHARE = 0, 1e9
J = journal.Journal
for name in ("add_record", "finish_reading", "commit", "put"):
    setattr(J, name, crashing(getattr(J, name)))
from numpyesm.cli import main
sys.exit(main(["embed", *sys.argv[1:]]))
"""


def crash(place: Path, out: Path, at: int, when: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _CRASHING, str(at), when, *map(str, arguments(place, out))],
        env=environment(),
        capture_output=True,
        timeout=100,
    )
    return done.returncode


def has_read(out: Path) -> bool:
    """Whether the run has all of its input, so that the next one does not begin anew."""
    journal = out.with_name(out.name + ".partial") / "journal.sqlite"
    if not journal.exists():
        return out.exists()
    with closing(sqlite3.connect(f"file:{journal}?nolock=1", uri=True)) as db:
        tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'about'").fetchone()[0]
        return bool(tables and db.execute("SELECT count(*) FROM about WHERE key = 'input'").fetchone()[0])


@pytest.mark.parametrize("form", FORMATS)
def test_killed_at_many_points_of_the_way(place: Path, tmp_path: Path, form: str) -> None:
    """Each run is killed at its n-th step and goes on where the one before was: nothing lost, doubled or torn."""
    out = output(tmp_path, form)
    # While reading, and about its end; then a step or two further each time, through computing and writing.
    reading, later = iter([3, 50, *range(82, 100)]), iter(range(2, 100, 2 if form == "parquet" else 3))
    killed = 0
    while True:
        at = next(later if has_read(out) else reading)
        if crash(place, out, at, "before" if killed % 2 else "after") != -signal.SIGKILL:
            break
        killed += 1
    assert killed >= 10
    done = embed(*arguments(place, out))
    assert done.returncode == 1  # two records were rejected
    assert b"complete already" in done.stderr
    check(place, out, form)


def test_killed_by_the_clock(place: Path, tmp_path: Path) -> None:
    """`kill -9` from outside at random moments of real runs, until one gets through."""
    rng = random.Random(5)
    out = output(tmp_path, "parquet")
    for attempt in range(40):
        process = subprocess.Popen(command(*arguments(place, out)), env=environment(), stderr=subprocess.PIPE)
        try:
            _, stderr = process.communicate(timeout=rng.uniform(0.3, 1.3) if attempt < 8 else 100)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    assert process.returncode == 1, stderr.decode()
    again = embed(*arguments(place, out))
    assert again.returncode == 1
    assert b"complete already" in again.stderr
    check(place, out, "parquet")


def slow_arguments(place: Path, folder: Path, name: str = "out.parquet") -> list[object]:
    """Some seconds of work on a small machine."""
    fasta = folder / "slow.fasta"
    if not fasta.exists():
        write_fasta(fasta, 120, seed=7, longest=500)
    return [
        *(fasta, "-o", folder / name, "--weights", "synthetic:esm2-8m", "--backend", "numpy"),
        *("--tokens-per-batch", 400, "--json-progress"),
    ]


def begun(place: Path, folder: Path) -> subprocess.Popen[bytes]:
    """A slow run that has computed and kept something."""
    process = subprocess.Popen(command(*slow_arguments(place, folder)), env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == "progress" and event["records"] > 8:
            return process
    raise AssertionError("the run ended early")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_done(place: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = begun(place, tmp_path)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert b"Traceback" not in stderr
    assert not (tmp_path / "out.parquet").exists()

    # The same command now: says that it goes on, and one at a time.
    process = begun(place, tmp_path)
    try:
        second = embed(*slow_arguments(place, tmp_path))
        assert second.returncode == 1
        assert f"process {process.pid} on" in second.stderr.decode()
    finally:
        process.kill()
        process.communicate()
    fasta = tmp_path / "slow.fasta"
    fasta.write_text(fasta.read_text() + ">one_more\nMKT\n")
    changed = embed(*slow_arguments(place, tmp_path))
    assert changed.returncode == 1
    assert b"the input has changed" in changed.stderr
    other = embed(*slow_arguments(place, tmp_path), "--layers", "2")
    assert other.returncode == 1
    assert b"interrupted run of another kind (repr_layers [6] instead of [2])" in other.stderr
    assert (tmp_path / "out.parquet.partial").is_dir()  # nothing of it was lost by asking


def test_resuming_computes_only_the_rest(place: Path, tmp_path: Path) -> None:
    process = begun(place, tmp_path)
    process.kill()
    process.communicate()
    done = embed(*slow_arguments(place, tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert found[-1]["event"] == "done"
    assert 0 < found[-1]["computed"] < found[-1]["sequences"] == 120
    assert any(e["event"] == "note" and "resuming" in e["message"] for e in found)
    fresh = embed(*slow_arguments(place, tmp_path, "fresh.parquet"))
    assert fresh.returncode == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; skipped where it cannot be made (see the test with a limit on files)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("form", FORMATS)
def test_full_disk(place: Path, small_disk: Path, form: str) -> None:
    """Room is given bit by bit; each run says that there is no room, and the last one has the same result."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(900 << 10))
    out = small_disk / output(place, form).name
    failures = 0
    for room in (900, 850, 780, 700, 560, 400, 0):
        os.truncate(ballast, room << 10)
        if not room:
            ballast.unlink()
            subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        done = embed(*arguments(place, out))
        text = done.stderr.decode()
        assert "Traceback" not in text
        if "rejected" in text:
            break
        assert done.returncode == 1
        # The file that could not be written, and what to do.
        assert re.search(rf"{re.escape(str(out))}\.partial\S* cannot be written", text), text
        assert "the same command resumes once there is space" in text
        assert not out.exists()
        failures += 1
    assert failures >= 3
    ballast.unlink(missing_ok=True)
    check(place, out, form)


def test_files_that_must_not_grow(place: Path, tmp_path: Path) -> None:
    """As a full disk, by the limit on the size of a file: needs no rights."""
    out = output(tmp_path, "parquet")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))

    done = subprocess.run(
        command(*arguments(place, out)), env=environment(), capture_output=True, preexec_fn=limit, timeout=100
    )
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"the same command resumes" in done.stderr
    assert not out.exists()
    assert embed(*arguments(place, out)).returncode == 1
    check(place, out, "parquet")


WRITE_HDF5 = """
import itertools, os, resource, signal, sys
from pathlib import Path
from conftest import SMALL
from numpyesm.bulk.journal import Row
from numpyesm.bulk.layout import Layout
from numpyesm.bulk.settings import Settings
from numpyesm.bulk.writers.hdf5 import Hdf5Writer
from numpyesm.options import Outputs

layout = Layout(Settings(Outputs(("per_token", "contacts"), (3,))), SMALL)
rows = (Row(i, f"P{i}", "", 60, bytes(32), bytes(layout.num_bytes(60))) for i in range(1, 301))
path, about = Path(sys.argv[1]), {"model": "esm2-8m"}
"""
UNDER_A_LIMIT = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    Hdf5Writer().write(rows, layout, about, path)
except OSError as error:
    sys.exit(error.errno)
"""
INTERRUPTED = """
from numpyesm.bulk.writers.unfailing import UnfailingFile
write = UnfailingFile.write
calls = itertools.count(1)
def interrupted(self, data):
    if next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGINT)
    return write(self, data)
UnfailingFile.write = interrupted
try:
    Hdf5Writer().write(rows, layout, about, path)
except KeyboardInterrupt:
    sys.exit(130 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1)
"""


def write_hdf5(code: str, *arguments: object) -> tuple[int, bytes]:
    """Exit code and output of the writer in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_HDF5 + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])),
        timeout=100,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("size", [500, 300_000, 3_000_000, 9_000_000])
def test_hdf5_bears_a_full_disk_anywhere(tmp_path: Path, size: int) -> None:
    """The library itself crashes, or leaves tracebacks, when it cannot write while it closes a data set."""
    assert write_hdf5(UNDER_A_LIMIT, tmp_path / "out.h5", size) == (errno.EFBIG, b"")


@pytest.mark.parametrize("write", [1, 100])
def test_hdf5_bears_an_interrupt_while_it_writes(tmp_path: Path, write: int) -> None:
    assert write_hdf5(INTERRUPTED, tmp_path / "out.h5", write) == (130, b"")


DAMAGES = {
    "the letters": "UPDATE sequences SET letters = 'W' || substr(letters, 2) "
    "WHERE number NOT IN (SELECT number FROM done)",
    "the numbers": "UPDATE numbers SET data = zeroblob(length(data)) WHERE number = (SELECT min(number) FROM numbers)",
    "whose numbers they are": "CREATE TEMP TABLE copy AS SELECT * FROM numbers; UPDATE numbers SET data = ("
    "SELECT data FROM copy ORDER BY number DESC LIMIT 1) WHERE number = (SELECT min(number) FROM numbers)",
    "an id": "UPDATE records SET id = 'other' WHERE position = 3",
    "the order": "UPDATE records SET number = (SELECT number FROM records WHERE position = 1) WHERE position = 2",
    "a hash": "UPDATE sequences SET digest = x'00' WHERE number = 2",
}


@pytest.fixture(scope="module")
def half_done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    process = begun(place, folder)
    process.kill()
    process.communicate()
    return folder


@pytest.mark.parametrize("damage", [*DAMAGES, "no database"])
def test_damage_is_found(place: Path, half_done: Path, tmp_path: Path, damage: str) -> None:
    """Whatever was changed in what an interrupted run left: an error that names the file, not a wrong number."""
    shutil.copytree(half_done, tmp_path / "copy")
    journal = tmp_path / "copy" / "out.parquet.partial" / "journal.sqlite"
    if damage == "no database":
        journal.write_bytes(b"not a database at all" * 100)
    else:
        with closing(sqlite3.connect(journal)) as db:
            db.executescript(DAMAGES[damage])
    done = embed(*slow_arguments(place, tmp_path / "copy"))
    assert done.returncode == 1, done.stderr.decode()
    message = json.loads(done.stderr.splitlines()[-1])["message"]
    assert "journal.sqlite" in message
    assert "--restart" in message
    assert not (tmp_path / "copy" / "out.parquet").exists()


def overwrite(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)


@pytest.mark.parametrize("way", ["overwritten", "replaced"])
def test_weights_that_change_during_a_run(tmp_path: Path, way: str) -> None:
    """Overwritten in place: stops, and keeps what it had. Replaced: the old file is still mapped, and all is right."""
    weights, other, backup = (tmp_path / f"{name}.safetensors" for name in ("w", "other", "backup"))
    for path, seed in ((weights, 0), (other, 1)):
        save_canonical(path, random_checkpoint(PRESETS["esm2-8m"], seed=seed))
    shutil.copy(weights, backup)
    fasta = write_fasta(tmp_path / "in.fasta", 120, seed=7, longest=500)

    def options(name: str, path: Path = weights) -> list[object]:
        return [fasta, "-o", tmp_path / name, "--weights", path, "--backend", "numpy", "--tokens-per-batch", 400,
                "--json-progress"]  # fmt: skip

    process = subprocess.Popen(command(*options("out.parquet")), env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(json.loads(line))
        if lines[-1].get("records", 0) > 8:
            overwrite(weights, other.read_bytes()) if way == "overwritten" else os.replace(other, weights)
            break
    _, rest = process.communicate(timeout=100)
    last = json.loads(rest.splitlines()[-1])
    if way == "replaced":
        assert (process.returncode, last["event"]) == (0, "done")
    else:
        assert process.returncode == 1
        assert f"{weights} was overwritten during the run" in last["message"]
        changed = embed(*options("out.parquet"))
        assert changed.returncode == 1
        assert b"another kind (weights sha256" in changed.stderr
        overwrite(weights, backup.read_bytes())
        done = embed(*options("out.parquet"))
        assert done.returncode == 0, done.stderr.decode()
        assert 0 < json.loads(done.stderr.splitlines()[-1])["computed"] < 120
    assert embed(*options("fresh.parquet", backup)).returncode == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "fresh.parquet").read_bytes()
