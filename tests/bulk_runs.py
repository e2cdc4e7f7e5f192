"""Runs of `numpyesm embed` for the tests: a small model in a file, inputs, and outputs read back in plain form."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL, assert_close, random_sequence

DIM = SMALL.embed_dim
LAST = SMALL.num_layers


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


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "numpyesm", "embed", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NUMPYESM", "HF_"))}
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return clean | {"HF_HUB_OFFLINE": "1", "NUMPYESM_CACHE": "/nonexistent", "PYTHONPATH": path} | more


def events(stderr: str) -> list[dict[str, Any]]:
    """The JSON lines of a run; every line must be one."""
    return [json.loads(line) for line in stderr.splitlines()]


def rows(path: Path) -> list[dict[str, Any]]:
    """All of an output, record by record, in plain Python and NumPy, whatever its format."""
    if path.is_dir():
        names = [line.split("\t") for line in (path / "index.tsv").read_text().splitlines()[1:]]
        out = []
        for record, _, name, length, _, digest in names:
            with np.load(path / name, allow_pickle=False) as arrays:
                one = {key: arrays[key] for key in arrays}
            out.append({**one, "id": str(one["id"]), "description": str(one["description"]), "length": int(length),
                        "record": int(record), "sequence_hash": digest})  # fmt: skip
        return out
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path) as file:
            out = [
                {"values": dataset[...], "key": key, **dict(dataset.attrs)}
                for key, dataset in file.items()
                if isinstance(dataset, h5py.Dataset)
            ]
        return sorted(out, key=lambda row: row["record"])
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def assert_same(one: Path, other: Path, within: float = 0.0) -> None:
    """Two outputs hold the same, their numbers to a share of their scale."""
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first.keys() == second.keys()
        for key, value in second.items():
            if isinstance(value, np.ndarray | list):
                assert_close(first[key], value, within)
            else:
                assert first[key] == value
