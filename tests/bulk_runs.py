"""Runs of `numpyesm embed` for the tests: inputs, outputs read back in plain form, and processes that come to grief."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import pkgutil
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from conftest import SMALL, assert_close, random_sequence

DIM = SMALL.embed_dim
LAST = SMALL.num_layers
# What a run does to the disk for good.
DISK_STEPS = [f"os.{name}" for name in ("fsync", "replace", "mkdir", "rmdir", "unlink", "rename")]
DISK_STEPS += [f"numpyesm.bulk.journal.Journal.{name}" for name in ("add_record", "finish_reading", "commit")]


def fasta(path: Path, *records: tuple[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


def write_fasta(path: Path, count: int, *, seed: int = 0, longest: int = 120, duplicates: int = 0) -> Path:
    """`count` records of mixed lengths, and so many more that repeat earlier sequences under other names."""
    rng = random.Random(seed)
    records = [(f"P{i}", random_sequence(rng.randint(1, longest), seed * 100003 + i)) for i in range(count)]
    records += [(f"D{i}", rng.choice(records)[1]) for i in range(duplicates)]
    rng.shuffle(records)
    return fasta(path, *((f"{name} protein {name}", sequence) for name, sequence in records))


def rows(path: Path) -> list[dict[str, Any]]:
    """All of an output, record by record: texts, counts, and arrays by their names, whatever the format."""
    if path.is_dir():
        with open(path / "index.tsv", newline="") as index:
            return [row | dict(np.load(path / row["file"])) for row in csv.DictReader(index, delimiter="\t")]
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            datasets = {key: item for key, item in file.items() if isinstance(item, h5py.Dataset)}
            groups = {name: item for name, item in file.items() if name not in datasets}
            found = []
            for key, item in datasets.items():
                main = {f"per_token_{LAST}" if item.ndim == 2 else f"mean_{LAST}": item[...], "key": key}
                beside = {name: group[key][...] for name, group in groups.items()}
                found.append(main | beside | dict(item.attrs) | {"id": item.attrs["original_id"]})
        return sorted(found, key=lambda row: row["record"])
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(path).to_pylist()
    for row in found:
        for name in [name for name in row if f"{name}_shape" in row]:
            row[name] = np.reshape(row[name], row.pop(f"{name}_shape"))
    return found


def assert_same(one: Path, other: Path, within: float = 0.0) -> None:
    """Two outputs hold the same, their numbers to a share of their scale."""
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first.keys() == second.keys()
        for key, value in second.items():
            if np.asarray(value).dtype.kind == "f":
                assert_close(first[key], value, within)
            else:
                assert first[key] == value


# -- in a process of its own: a fork of one that has imported everything and has no threads, so that its start takes no
# time --------------------------------------------------------------------------------------------------------------


def embed_in_a_child(log: Path, *arguments: Any) -> tuple[int, str]:
    """Exit code (negative: the signal) of a process that does what `_embed` says, and its stderr and stdout."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bulk_runs", "numpyesm.bulk.job", "pyarrow.parquet", "h5py", "filelock"])
    process = context.Process(target=_embed, args=(log, *arguments))
    process.start()
    process.join(100)
    process.kill()
    process.join()
    return process.exitcode, log.read_text()


def _embed(log: Path, words: list[str], at: int, act: Callable[[], object], steps: Sequence[str], after: bool) -> None:
    """`numpyesm embed`, which acts just before, or just after, the n-th of its steps."""
    from numpyesm.bulk import job
    from numpyesm.cli import main

    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    calls = itertools.count(1)

    def acting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            now = next(calls) == at
            if now and not after:
                act()
            try:
                return function(*arguments, **keywords)
            finally:
                if now and after:
                    act()

        return call

    for step in steps:
        mock.patch(step, acting(pkgutil.resolve_name(step))).start()
    job.COMMIT_SECONDS, job.COMMIT_SHARE = 0, 1e9
    sys.exit(main(["embed", *words]))


def signal_itself(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def limit_files(size: int) -> None:
    """No file may grow beyond a size: as a full disk, but it takes no rights."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
