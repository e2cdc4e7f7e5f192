"""Runs of `numpyesm embed` for the tests: inputs, and outputs read back in plain form."""

from __future__ import annotations

import csv
import random
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
