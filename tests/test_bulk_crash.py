"""Killed, interrupted or out of disk at any moment: the same command resumes, and the output is the same."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bulk_children import embed_and_crash, embed_under_a_limit, in_a_child, write_hdf5
from bulk_runs import assert_same, rows, write_fasta
from conftest import SMALL

from numpyesm import ESM2
from numpyesm.bulk import Progress, Summary, embed_fasta, job
from numpyesm.errors import BulkError
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.synthetic import random_checkpoint

pytest.importorskip("pyarrow")
pytest.importorskip("h5py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]

FORMATS = ["parquet", "h5", "folder"]
COUNT, DUPLICATES, REJECTED = 60, 20, 2
WRITES_ALL = COUNT + DUPLICATES + REJECTED + 10  # steps of a run until it computes


def output(folder: Path, form: str) -> Path:
    return folder / ("out" if form == "folder" else f"out.{form}")


def run(place: Path, out: Path, **options: Any) -> Summary:
    """`embed_fasta` in this process, as `arguments` have it."""
    model = ESM2.from_pretrained(options.pop("weights", place / "small.safetensors"), backend="numpy", threads=1)
    options = {"include": ["mean", "per_token"], "tokens_per_batch": 300} | options
    return embed_fasta(options.pop("inputs", place / "in.fasta"), out, model, **options)


def arguments(place: Path, out: Path) -> list[str]:
    return [
        *(str(place / "in.fasta"), "-o", str(out), "--weights", str(place / "small.safetensors")),
        *("--include", "mean", "per_token", "--backend", "numpy", "--threads", "1", "--tokens-per-batch", "300"),
    ]


@pytest.fixture(scope="module")
def place(small_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, an input with duplicates and two records that cannot be embedded, and the results of quiet runs."""
    folder = tmp_path_factory.mktemp("crash")
    shutil.copy(small_file, folder / "small.safetensors")
    fasta = write_fasta(folder / "in.fasta", COUNT, duplicates=DUPLICATES)
    fasta.write_text(fasta.read_text() + ">bad1\nMKJ\n>bad2\n\n")
    for form in FORMATS:
        assert run(folder, output(folder, form)).rejected == REJECTED
        assert len(rows(output(folder, form))) == COUNT + DUPLICATES
    return folder


def check(place: Path, out: Path, form: str) -> None:
    assert_same(out, output(place, form))
    if form == "parquet":
        assert out.read_bytes() == output(place, form).read_bytes()
    rejected = out.with_name("out.rejected.tsv").read_text()
    assert rejected == (place / "out.rejected.tsv").read_text()
    assert rejected.count("\n") == 1 + REJECTED
    assert {entry.name for entry in out.parent.iterdir()} == {out.name, "out.rejected.tsv"}


# -- stopped ------------------------------------------------------------------------------------------------------


def crash(place: Path, out: Path, at: int, when: str, number: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    return in_a_child(place / "log", embed_and_crash, arguments(place, out), at, when == "after", number)


def has_read(out: Path) -> bool:
    """Whether the run has all of its input, so that the next one does not start over."""
    journal = out.with_name(out.name + ".partial") / "journal.sqlite"
    if not journal.exists():
        return out.exists()
    with closing(sqlite3.connect(f"file:{journal}?nolock=1", uri=True)) as db:
        tables = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'about'").fetchone()[0]
        return bool(tables and db.execute("SELECT count(*) FROM about WHERE key = 'input'").fetchone()[0])


@pytest.mark.parametrize(("form", "step"), [("parquet", 2), ("h5", 4), ("folder", 4)])
def test_killed_at_many_points_of_the_way(place: Path, tmp_path: Path, form: str, step: int) -> None:
    """Each run is killed at its n-th step and resumes where the one before was: nothing lost, doubled or torn."""
    out = output(tmp_path, form)
    # While reading, and about its end; then a few steps further each time, through computing and writing.
    reading, later = iter([3, 50, *range(82, 100)]), iter(range(2, 100, step))
    killed = 0
    while crash(
        place, out, next(later if has_read(out) else reading), "before" if killed % 2 else "after"
    )[0] == -signal.SIGKILL:  # fmt: skip
        killed += 1
    assert killed >= 8
    assert run(place, out).already_complete
    check(place, out, form)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done(place: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = output(tmp_path, "parquet")
    found, said = crash(place, out, WRITES_ALL + 10, "after", number)
    assert (found, "Traceback" in said) == (code, False)
    assert not out.exists()
    assert 0 < run(place, out).computed < COUNT
    check(place, out, "parquet")


class Acting(Progress):
    """Does something once so many sequences are computed, and collects notes."""

    def __init__(self, after: int = -1, act: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._after, self._act = after, act
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def advance(self, step: Any) -> None:
        super().advance(step)
        if self.done.sequences == self._after:
            self._act()


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(place: Path, out: Path, after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(place, out, progress=Acting(after, interrupt))


def test_resuming_computes_only_the_rest(place: Path, tmp_path: Path) -> None:
    out, progress = output(tmp_path, "parquet"), Acting()
    interrupted(place, out, 15)
    interrupted(place, out, 40)
    other = write_fasta(tmp_path / "other.fasta", 3)
    with pytest.raises(BulkError, match="the input has changed"):
        run(place, out, inputs=other)
    other.unlink()
    with pytest.raises(BulkError, match=r'interrupted run of another kind \(dtype "fp32" instead of "fp16"\)'):
        run(place, out, dtype="fp16")
    assert run(place, out, progress=progress).computed == COUNT - 40
    assert "resuming" in progress.notes[0]
    check(place, out, "parquet")


# -- a full disk --------------------------------------------------------------------------------------------------


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
    for room in (900, 850, 700, 560, 400):
        os.truncate(ballast, room << 10)
        # The file that could not be written, and what to do.
        with pytest.raises(OSError, match=rf"{re.escape(str(out))}\.partial\S* cannot be written") as told:
            run(place, out)
        assert "the same command resumes once there is space" in str(told.value)
        assert not out.exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run(place, out)
    check(place, out, form)


def test_files_that_must_not_grow(place: Path, tmp_path: Path) -> None:
    """As a full disk, by the limit on the size of a file: needs no rights."""
    out = output(tmp_path, "parquet")
    code, said = in_a_child(tmp_path / "log", embed_under_a_limit, arguments(place, out), 300 << 10)
    (tmp_path / "log").unlink()
    assert (code, "Traceback" in said, "the same command resumes" in said) == (1, False, True)
    assert not out.exists()
    run(place, out)
    check(place, out, "parquet")


@pytest.mark.parametrize(
    ("trouble", "at", "code"),
    [
        ("limit", 500, errno.EFBIG),
        ("limit", 300_000, errno.EFBIG),
        ("limit", 9_000_000, errno.EFBIG),
        ("interrupt", 1, 130),
        ("interrupt", 100, 130),
    ],
)
def test_hdf5_bears_a_full_disk_and_an_interrupt_anywhere(tmp_path: Path, trouble: str, at: int, code: int) -> None:
    """The library itself crashes, or leaves tracebacks, when it cannot write while it closes a data set."""
    assert in_a_child(tmp_path / "log", write_hdf5, tmp_path / "out.h5", trouble, at) == (code, "")


# -- changed ------------------------------------------------------------------------------------------------------

DAMAGES = {
    "the letters": "UPDATE sequences SET letters = 'W' || substr(letters, 2) "
    "WHERE number NOT IN (SELECT number FROM done)",
    "the numbers": "UPDATE numbers SET data = zeroblob(length(data)) WHERE number = (SELECT min(number) FROM numbers)",
    "whose numbers they are": "CREATE TEMP TABLE copy AS SELECT * FROM numbers; UPDATE numbers SET data = ("
    "SELECT data FROM copy ORDER BY number DESC LIMIT 1) WHERE number = (SELECT min(number) FROM numbers)",
    "an id": "UPDATE records SET id = 'other' WHERE position = 3",
    "the order": "UPDATE records SET number = (SELECT number FROM records WHERE position = 1) WHERE position = 2",
    "a hash": "UPDATE sequences SET digest = x'00' WHERE number = 2",
    "no database": None,
}


@pytest.fixture(scope="module")
def half_done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    interrupted(place, output(folder, "parquet"), 30)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(place: Path, half_done: Path, tmp_path: Path, damage: str) -> None:
    """Whatever was changed in what an interrupted run left: an error that names the file, not a wrong number."""
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    out = output(tmp_path, "parquet")
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
    check(place, out, "parquet")


@pytest.mark.parametrize("way", ["overwritten", "replaced"])
def test_weights_that_change_during_a_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Overwritten in place: stops, and keeps what it had. Replaced: the old file is still mapped, and all is right."""
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(job, "COMMIT_SHARE", 1e9)
    weights, other = tmp_path / "w.safetensors", tmp_path / "other.safetensors"
    save_canonical(other, replace(random_checkpoint(SMALL, seed=2), synthetic=False))
    original, changed = (place / "small.safetensors").read_bytes(), other.read_bytes()
    weights.write_bytes(original)

    def overwrite(data: bytes) -> None:
        with open(weights, "r+b") as file:
            file.write(data)

    def change() -> None:
        overwrite(changed) if way == "overwritten" else os.replace(other, weights)

    out, progress = tmp_path / "out.parquet", Acting(20, change)
    if way == "replaced":
        assert run(place, out, weights=weights, progress=progress).computed == COUNT
    else:
        with pytest.raises(BulkError, match=rf"{weights} was overwritten during the run"):
            run(place, out, weights=weights, progress=progress)
        with pytest.raises(BulkError, match=r"another kind \(weights sha256"):
            run(place, out, weights=weights)
        overwrite(original)
        assert 0 < run(place, out, weights=weights).computed < COUNT
    assert_same(out, output(place, "parquet"))
