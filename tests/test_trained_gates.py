"""The gates of bf16 and int8 on trained weights and real proteins of 21 to 659 residues, six of them under 40.

Judged in float64 on the last layer: the cosine of every residue's embedding and of every protein's mean. The file runs
once for the host's best instruction set, and in another process for the best that treats bf16 in the other way.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import trained_weights
from conftest import cosines

from numpyesm import ESM2
from numpyesm.kernels.compiled.isa import host_isa, host_levels
from numpyesm.weights.conversion import convert

pytest.importorskip("torch")

pytestmark = [pytest.mark.trained_weights, pytest.mark.slow]

# Smallest cosine of a residue, its first percentile, smallest cosine of a mean.
GATES = {"bf16": (0.9993, 0.9998, 0.9999), "int8": (0.997, 0.9985, 0.9993)}
LAST = trained_weights.LAYERS
FOLDER = "NUMPYESM_TEST_GATES"  # where the run at another level finds what the first one has made

Vectors = tuple[np.ndarray, np.ndarray]  # of one protein: the mean (D,), and residues (L, D)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk as transformers wrote it, and converted to every precision; a run at another level takes them over."""
    if made_before := os.environ.get(FOLDER):
        return Path(made_before)
    folder = trained_weights.write_hugging_face(tmp_path_factory.mktemp("trained"))
    for dtype in ("fp32", *GATES):
        convert(folder, folder / f"{dtype}.safetensors", dtype=dtype)
    return folder


def encode(path: Path, backend: str, precision: str) -> list[Vectors]:
    model = ESM2.from_pretrained(path, backend=backend, precision=precision)
    results = model.encode(list(trained_weights.real_proteins().values()), [LAST], ["mean", "per_token"])
    return [(result.embeddings[LAST], result.per_token_embeddings[LAST]) for result in results]


@pytest.fixture(scope="module")
def exact(folder: Path) -> list[Vectors]:
    kept = folder / "exact.npz"
    if not kept.exists():
        np.savez(kept, *itertools.chain.from_iterable(encode(folder / "fp32.safetensors", "numpy", "fp64")))
    with np.load(kept) as arrays:
        values = list(arrays.values())
    return list(zip(values[::2], values[1::2], strict=True))


def assert_in_gates(found: list[Vectors], exact: list[Vectors], precision: str) -> None:
    pairs = list(zip(found, exact, strict=True))
    means = [cosines(a, b) for (a, _), (b, _) in pairs]
    residues = np.concatenate([cosines(a, b) for (_, a), (_, b) in pairs])
    values = residues.min(), np.quantile(residues, 0.01), min(means)
    print(f"{precision}: smallest {values[0]:.5f}, 1st percentile {values[1]:.5f}, mean {values[2]:.5f}")
    assert all(value >= gate for value, gate in zip(values, GATES[precision], strict=True)), values


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")
@pytest.mark.parametrize("source", ["converted", "fp32.safetensors", ""])
@pytest.mark.parametrize("precision", GATES)
def test_compiled(folder: Path, exact: list[Vectors], precision: str, source: str) -> None:
    """From a file in this precision, from one in float32, and from the checkpoint itself."""
    path = folder / (f"{precision}.safetensors" if source == "converted" else source)
    assert_in_gates(encode(path, "compiled", precision), exact, precision)


@pytest.mark.parametrize("precision", GATES)
def test_narrow_files_on_numpy(folder: Path, exact: list[Vectors], precision: str) -> None:
    assert_in_gates(encode(folder / f"{precision}.safetensors", "numpy", "fp32"), exact, precision)


def test_other_way_of_bf16(folder: Path, exact: list[Vectors]) -> None:
    pytest.importorskip("numba")
    if os.environ.get("NUMPYESM_ISA"):
        pytest.skip("this is the run at another level")
    others = [name for name, isa in host_levels().items() if isa.bf16 != host_isa().bf16]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "", "-k", "compiled"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = {**os.environ, "NUMPYESM_ISA": others[0], FOLDER: str(folder)}
    done = subprocess.run(command, env=environment, cwd=trained_weights.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
