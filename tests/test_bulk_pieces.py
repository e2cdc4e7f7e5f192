"""Parts of bulk embedding on their own: packing, windows, shards, layout, names, and the journal."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpyesm import ESM2, InvalidOption
from numpyesm.bulk.lock import FolderLock
from numpyesm.bulk.settings import Settings, Shard
from numpyesm.bulk.writers import free_name, output_format, tsv_line
from numpyesm.bulk.writers.hdf5 import hdf5_name
from numpyesm.config import PRESETS
from numpyesm.errors import BulkError
from numpyesm.files import safe_stem
from numpyesm.options import Outputs
from numpyesm.streaming.batches import cuts
from numpyesm.streaming.packing import LOOK_AHEAD_BATCHES, check_budget, pack, token_budget


@given(st.lists(st.integers(1, 3000), max_size=200), st.integers(1, 5000))
def test_packing_loses_and_doubles_nothing(lengths: list[int], budget: int) -> None:
    items = list(enumerate(lengths))
    batches = list(pack(items, lambda item: item[1], budget))
    assert sorted(item for batch in batches for item in batch) == items
    assert all(batch for batch in batches)
    assert all(len(batch) == 1 or sum(n + 2 for _, n in batch) <= budget for batch in batches)


def test_packing_fills_batches_and_reads_no_further_than_it_must() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.lognormal(5.7, 0.7, 5000).clip(30, 2000)]
    batches = [sum(n + 2 for n in batch) for batch in pack(lengths, lambda n: n, 4096)]
    assert np.mean(batches) > 0.85 * 4096
    taken = 0

    def counted() -> object:
        nonlocal taken
        for length in lengths:
            taken += length + 2
            yield length

    next(pack(counted(), lambda n: n, 4096))  # type: ignore[arg-type]
    assert taken <= LOOK_AHEAD_BATCHES * 4096 + 2002


MEAN = Outputs(("mean",), (12,))


def test_budget_follows_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["esm2-35m"]
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 64 << 30)
    assert token_budget(config, 1, MEAN) == token_budget(config, 2, MEAN) == 4096
    assert token_budget(config, 16, MEAN) == 32768
    assert token_budget(config, 1000, MEAN) == 65536
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 1 << 30)
    assert 2050 <= token_budget(config, 16, MEAN) < 32768
    assert token_budget(config, 16, Outputs(("contacts",))) < token_budget(config, 16, MEAN)
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 0)
    assert token_budget(config, 16, MEAN) == 2050
    for wrong in (0, -1, 1.5, "4096", True):
        with pytest.raises(InvalidOption, match="tokens_per_batch"):
            check_budget(wrong)


@given(st.integers(1, 40000), st.integers(0, 1024))
def test_windows_cover_everything_and_overlap(length: int, overlap: int) -> None:
    windows = cuts(length, overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    assert all(stop - start == min(length, 2048) for start, stop in windows)
    assert all(a[1] - b[0] >= overlap for a, b in itertools.pairwise(windows))
    if length > 2048:
        assert len(windows) == -(-(length - overlap) // (2048 - overlap))  # no more than it takes


def test_shards_are_a_partition_and_keep_twins_together() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(1000)]
    taken = [[Shard(i, 7).takes(digest) for i in range(1, 8)] for digest in digests]
    assert all(sum(row) == 1 for row in taken)
    assert all(80 < sum(column) < 220 for column in zip(*taken, strict=True))
    assert Shard.parse("3/8") == Shard(3, 8)
    assert Shard.parse(None).takes(digests[0])
    for wrong in ("0/3", "4/3", "1/0", "1", "a/b", "1/2/3", "-1/2", "1 / 2", ""):
        with pytest.raises(InvalidOption, match="shard"):
            Shard.parse(wrong)


def test_numbers_beyond_float16_are_refused(model: ESM2) -> None:
    settings = Settings(model.config, Outputs(("mean", "contacts"), (0, 3)), dtype="fp16")
    (result,) = model.encode(["MKTAYI"], [0, 3], ["mean", "contacts"])
    assert len(settings.pack(result)) == settings.num_bytes(6) == 2 * (2 * 80 + 36)
    assert result.embeddings is not None
    result.embeddings[0][3] = 70000
    with pytest.raises(BulkError, match="mean_0 has 70000, beyond float16"):
        settings.pack(result)


def test_names() -> None:
    for id, key, file in (
        ("P12345", "P12345", "P12345"),
        ("sp|P1|X_HUMAN", "sp|P1|X_HUMAN", "sp_P1_X_HUMAN"),
        ("a/b", "a%2Fb", "a_b"),
        ("../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "etc_passwd"),
        (".", "%2E", "record"),
        ("..", "%2E%2E", "record"),
        ("100%", "100%25", "100"),
        ("-rf", "-rf", "_-rf"),
        ("CON", "CON", "_CON"),
        ("nul.1", "nul.1", "_nul.1"),
        ("é\0ß", "é%00ß", "record"),
        ("x" * 300, "x" * 300, "x" * 120),
    ):
        assert (hdf5_name(id), safe_stem(id)) == (key, file)


def test_taken_names_are_numbered() -> None:
    taken: set[str] = set()
    for _ in range(100):
        taken.add(free_name(taken.__contains__, "x", "#"))
    assert taken == {"x", *(f"x#{i}" for i in range(2, 101))}


def test_table_lines_hold_whatever_stands_in_a_header() -> None:
    assert tsv_line(1, "a\tb\r\nc", "d\u2028e") == "1\ta b  c\td e\n"


def test_output_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.h5").mkdir()
    forms = {"a.parquet": "parquet", "a.PQ": "parquet", "b.h5": "hdf5", "c.hdf5": "hdf5", "d/": "folder", "d": "folder",
             "v1.2/": "folder", "folder.h5": "folder"}  # fmt: skip
    assert {output: output_format(output) for output in forms} == forms
    for other in ("", "-", "a.csv", "a.npz", "a.parquet.gz", "file", "file/"):
        with pytest.raises(InvalidOption, match=r"\.parquet, \.h5 or a folder"):
            output_format(other)


def test_one_holder_of_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "x.partial"
    with FolderLock(folder):
        with pytest.raises(BulkError, match=f"another run.*process {os.getpid()} on"), FolderLock(folder):
            pass
        (folder / "journal.sqlite").write_bytes(b"")
        (folder / "output").mkdir()
    assert folder.exists()
    with FolderLock(folder) as lock:
        lock.empty()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("nowhere")])
def test_something_else_where_the_folder_would_be(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x.partial")
    with pytest.raises(FileExistsError), FolderLock(tmp_path / "x.partial"):
        pass


def test_locks_are_exclusive_while_folders_come_and_go(tmp_path: Path) -> None:
    """Many runs that end and begin at once: never two inside, and nothing goes wrong but that one is refused."""
    inside = threading.Lock()

    def run(_: int) -> None:
        with suppress(BulkError), FolderLock(tmp_path / "x.partial"):
            assert inside.acquire(blocking=False)
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(run, range(400)))) == 400
