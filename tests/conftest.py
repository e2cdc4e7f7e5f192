"""Shared by the tests: small synthetic models, protein-like sequences, the command line, and outputs read back."""

from __future__ import annotations

import csv
import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import trained_weights

from numpyesm import ESM2, SyntheticWeightsWarning
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.cli import main
from numpyesm.config import ModelConfig
from numpyesm.reference import forward
from numpyesm.weights import save_canonical
from numpyesm.weights.synthetic import random_checkpoint

# torch's threads wait for one another by spinning: where several test processes share the CPUs, small models take up to
# fifty times as long. It reads this when it is imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell that starts the tests in the background makes them, and all that they start, deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Small, but with every part of the real thing: several layers, 20 heads, some contact coefficients zero.
SMALL = ModelConfig(num_layers=3, embed_dim=80, num_heads=20, ffn_dim=320)
DIM = SMALL.embed_dim
LAST = SMALL.num_layers

BACKENDS = [
    "numpy",
    pytest.param("compiled", marks=pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")),
]

# What batch mates may change. On AVX2, OpenBLAS sums a row in an order that depends on its place in the batch.
ROUNDING = 5e-6


def assert_close(found: object, expected: object, within: float = ROUNDING) -> None:
    """Equal arrays, to a share of their scale, which is taken to be at least 1."""
    array = np.asarray(expected)
    scale = max(1.0, np.nanmax(np.abs(array), initial=0.0))
    np.testing.assert_allclose(np.asarray(found), array, rtol=0, atol=within * scale)


ALL = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]


def assert_same(found: Any, expected: Any, within: float = 0.0) -> None:
    """Lists of equal results, or of equal `rows`, every number of them, to a share of the scale."""
    for a, b in zip(found, expected, strict=True):
        ours, theirs = (one if isinstance(one, dict) else one.to_arrays() for one in (a, b))
        assert ours.keys() == theirs.keys()
        for name, values in theirs.items():
            if np.asarray(values).dtype.kind == "f":
                assert_close(ours[name], values, within)
            else:
                assert ours[name] == values


def largest(a: Any, b: Any) -> float:
    """Largest absolute difference, in float64."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


# DESIGN.md's rule for float32: root mean square error against torch's own, and largest error as a share of the scale.
TIMES_TORCHS_ERROR, SHARE_OF_SCALE = 3.0, 2e-5


def assert_float32_rule(name: str, found: Any, exact: Any, torchs: Any = None) -> None:
    """Judge an output, or several arrays of it together, which torch has computed in float32, too, or has not."""
    ours, truth = (np.concatenate([np.ravel(a) for a in side]).astype(np.float64) for side in (found, exact))
    scale, largest = np.abs(truth).max(), np.abs(ours - truth).max()
    assert largest <= SHARE_OF_SCALE * scale, f"{name}: {largest / scale:.1e} of the scale"
    if torchs is not None:
        theirs = np.concatenate([np.ravel(a) for a in torchs])
        error, allowed = (np.sqrt(np.mean((values - truth) ** 2)) for values in (ours, theirs))
        # Below one rounding of the largest number there is no error to compare.
        rounding = np.finfo(np.float32).eps / 2 * scale
        assert error <= max(TIMES_TORCHS_ERROR * allowed, rounding), f"{name}: {error:.2e}, torch has {allowed:.2e}"


def outputs_of_reference(weights: dict[str, Any], tokens: Any) -> dict[str, Any]:
    """What `numpyesm.reference` makes of a sequence, named as `EncodeResult.to_arrays` does."""
    found = forward(tokens, **weights)
    outputs = {"logits": found["logits"][1:-1, 4:24], "attentions": found["attentions"][:, 1:-1]}
    for layer, rows in enumerate(found["representations"]):
        residues = rows[1:-1]
        outputs |= {f"mean_{layer}": residues.mean(0), f"per_token_{layer}": residues, f"bos_{layer}": rows[0]}
    return outputs | {"contacts": found["contacts"]}


def random_sequence(length: int, seed: int = 0, letters: str = "".join(AMINO_ACIDS)) -> str:
    return "".join(random.Random(f"{length} {seed}").choices(letters, k=length))


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


def small_model(config: ModelConfig = SMALL, **options: object) -> ESM2:
    with pytest.warns(SyntheticWeightsWarning, match="mean nothing"):
        return ESM2(random_checkpoint(config, seed=1), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def model() -> ESM2:
    """A small model on the NumPy backend."""
    return small_model(backend="numpy", threads=2)


@pytest.fixture(scope="session")
def tiny() -> ESM2:
    """As small as can be, for sequences of thousands of residues."""
    return small_model(ModelConfig(1, 16, 2, 32), backend="numpy", threads=1)


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small model as a canonical file that is not flagged synthetic, so that stderr stays quiet."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_canonical(path, replace(random_checkpoint(SMALL, seed=1), synthetic=False))
    return str(path)


@pytest.fixture(scope="session")
def loaded(small_file: str) -> ESM2:
    """That file, loaded as the command line does."""
    return ESM2.from_pretrained(small_file, backend="numpy")


@pytest.fixture(scope="module")
def quick_calibration() -> Iterator[None]:
    """Conversions take their mean inputs from two short peptides: for tests in which those numbers do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpyesm.weights.rounding.calibration_sequences", lambda: ["MKTAYIAKQR", "GLDALQITV"])
        yield


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: bytes
    err: str


@pytest.fixture
def run(small_file: str, capfdbinary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command line in this process, in an empty folder, away from the network.

    With the small model and NumPy, unless the arguments name others or it is run `bare`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMPYESM_WEIGHTS", raising=False)
    monkeypatch.setenv("NUMPYESM_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("NUMPYESM_OFFLINE", "1")

    def call(*arguments: str, stdin: bytes = b"", bare: bool = False) -> Done:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        usual = {} if bare or not arguments else {"--weights": small_file, "--backend": "numpy"}
        defaults = [word for option, value in usual.items() if option not in arguments for word in (option, value)]
        capfdbinary.readouterr()
        try:
            code = main([*arguments, *defaults])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capfdbinary.readouterr()
        return Done(code, out, err.decode())

    return call


# Files that take a minute or more. With `make test`, no worker should be left with one of these at the end.
LONGEST = ["kernel_library", "numba_kernels", "trained", "small_memory", "service_process", "page", "bulk_crash"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; skip tests of weights that are not on this machine, without asking the network."""
    from numpyesm.weights import find_local

    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
    missing = {}
    if find_local("esm2-35m") is None:
        missing["official_weights"] = "official ESM-2 35M weights are not on this machine (numpyesm fetch)"
    if trained_weights.folder() is None:
        missing["trained_weights"] = trained_weights.HOW_TO_GET
    for item in items:
        for marker in missing.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: compressed ones hold the time, and all workers must see the same names."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None
