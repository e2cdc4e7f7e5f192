"""int8 files and the numba backend: the stored bytes are used as they are; and the warm-up command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numpyesm import ESM2, InvalidOption
from numpyesm.cli import main
from numpyesm.weights import convert

pytest.importorskip("numba")

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")


def test_int8_file_gives_what_quantising_at_load_gives(tmp_path: Path) -> None:
    full = convert("synthetic:esm2-8m:3", tmp_path / "full.safetensors").path
    narrow = convert("synthetic:esm2-8m:3", tmp_path / "narrow.safetensors", dtype="int8").path
    try:
        a, b = (ESM2.from_pretrained(path, backend="numba", precision="int8") for path in (full, narrow))
    except InvalidOption as error:
        pytest.skip(str(error))
    sequences = ["MKTAYIAKQR", "W"]
    for x, y in zip(a.encode(sequences), b.encode(sequences), strict=True):
        np.testing.assert_array_equal(x.embeddings[6], y.embeddings[6])


def test_warmup_fills_the_named_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "numpyesm", "warmup", "--cache", str(tmp_path / "cache")],
        capture_output=True,
        env=os.environ | {"NUMBA_CACHE_DIR": ""},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert str(tmp_path / "cache") in done.stdout.decode()
    assert list((tmp_path / "cache").rglob("*.nbc"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], (None, None)), (["--precision", "fp32"], (["fp32"], None)), (["--cache", "there"], (None, "there"))],
)
def test_warmup_compiles_the_precision_that_is_asked_for(
    arguments: list[str], expected: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that the CPU has where none is."""
    asked = []

    def compile_kernels(precisions: object = None, cache_dir: object = None) -> Path:
        asked.append((precisions, cache_dir))
        return Path("folder")

    monkeypatch.setattr("numpyesm.kernels.numba_.warmup.warmup", compile_kernels)
    assert main(["warmup", *arguments]) == 0
    assert asked == [expected]


def test_warmup_says_why_numba_fails(tmp_path: Path) -> None:
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text("raise ImportError('made for another machine')")
    done = subprocess.run(
        [sys.executable, "-m", "numpyesm", "warmup"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"},
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "numpyesm: error: warmup compiles kernels, and Numba fails here: made for another machine\n"
    )
