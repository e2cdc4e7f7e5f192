"""The library of kernels compiled ahead of time: what it needs from others; that it is Numba's code bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from numpyesm.errors import InvalidOption, MissingExtra
from numpyesm.kernels import build
from numpyesm.kernels.compiled.code import ARGUMENTS, needed, symbol
from numpyesm.kernels.compiled.isa import host_levels, levels
from numpyesm.kernels.compiled.library import abi, library_code, library_name
from numpyesm.options import PRECISIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What the C library gives; memcpy and its kind are what LLVM makes of loops.
LIBC = {"memcpy", "memset", "memmove", "sched_yield", "usleep"}
RUNTIME = {
    "__cxa_finalize",
    "__gmon_start__",
    "_ITM_deregisterTMCloneTable",
    "_ITM_registerTMCloneTable",
    "_init",
    "_fini",
}

DIGEST = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
found = {}
letters = "ACDEFGHIKLMNPQRSTVWY"
sequences = ["".join(letters[i * i * n % 20] for i in range(n)) for n in (1, 2, 33, 64, 65, 130, 700)]
everything = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]
for shape in (ModelConfig(2, 320, 20, 1280), ModelConfig(1, 30, 3, 50)):
    for precision in sys.argv[1:]:
        model = ESM2(random_checkpoint(shape, seed=2), backend="compiled", precision=precision, threads=2)
        digest = hashlib.sha256()
        for r in model.encode(sequences, [0, -1], everything):
            for value in (*r.embeddings.values(), *r.per_token_embeddings.values(), r.contacts, r.logits, r.attentions):
                digest.update(np.ascontiguousarray(value).tobytes())
        found[f"{shape.embed_dim} {precision}"] = digest.hexdigest()
print(json.dumps([repr(model), found]))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that this environment has."""
    code = library_code()
    if code is None:
        pytest.skip("no library of kernels that fits is installed: make test builds it where there is a C compiler")
    assert code.file is not None
    return code.file


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMPYESM_")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "NUMPYESM_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("nm"), reason="nm of a Linux library")
def test_symbols_are_the_kernels_and_a_few_of_libc(library: Path) -> None:
    """Nothing of Python or Numba is asked for, and nothing but the entries is given."""
    listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {
        kind: {line.split()[-1].split("@")[0] for line in listed if line.split()[-2] in kind} for kind in ("U", "T")
    }
    assert names["U"] <= LIBC | RUNTIME
    built = [isa for isa in levels().values() if symbol(isa, "lm_head") in names["T"]]
    assert {isa.name for isa in built} >= set(host_levels())
    entries = {symbol(isa, name) for isa in built for name in ARGUMENTS if isa.bf16 or not name.endswith("bf16")}
    assert names["T"] - RUNTIME == entries
    assert library.stat().st_size < 3e6 / len(levels()) * len(built)


def test_same_numbers_as_numba_bit_for_bit(library: Path) -> None:
    """At every level of this machine; Numba compiles for all of them at once, which takes minutes."""
    pytest.importorskip("numba")

    def at_level(level: str) -> None:
        # fp32 is the same code whether products in bf16 are spelled out or not there.
        precisions = PRECISIONS[1:] if levels()[level].spelled_out else PRECISIONS
        codes = (str(library), "none")
        ahead, jit = (run(DIGEST, *precisions, NUMPYESM_ISA=level, NUMPYESM_KERNELS=named) for named in codes)
        assert ahead.returncode == jit.returncode == 0, ahead.stderr + jit.stderr
        (origin, found), (jit_origin, expected) = json.loads(ahead.stdout), json.loads(jit.stdout)
        assert (str(library) in origin, "Numba" in jit_origin) == (True, True)
        assert found == expected, level

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(at_level, host_levels()))


MODEL = """
import sys
from numpyesm import ESM2
model = ESM2.from_pretrained("synthetic:esm2-8m", backend=sys.argv[1])
print(model.backend, {"numba", "llvmlite"} & set(sys.modules), model)
"""


def test_it_runs_where_numba_is_not_installed(library: Path, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('not here')")
    done = run(MODEL, "auto", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", NUMPYESM_KERNELS=str(library.parent))
    assert done.stdout.startswith("compiled set()"), done.stderr
    assert f"library {library}" in done.stdout


def test_a_library_that_does_not_fit(library: Path, tmp_path: Path) -> None:
    """What was named is an error; what was found is passed over with a warning."""
    cases = {"other.so": library.read_bytes().replace(abi().encode(), abi().replace(abi()[2:6], "zzzz").encode())}
    cases |= {"text.so": b"no library", "missing.so": b""}
    for name, content in cases.items():
        if content:
            (tmp_path / name).write_bytes(content)
    for name, reason in [
        ("other.so", "was built from other sources than this numpyesm"),
        ("text.so", "is no library of kernels for this machine"),
        ("missing.so", "there is no file"),
    ]:
        done = run(MODEL, "auto", NUMPYESM_KERNELS=str(tmp_path / name))
        assert done.returncode == 1
        assert f"InvalidOption: NUMPYESM_KERNELS={tmp_path / name}: " in done.stderr
        assert reason in done.stderr
    package = tmp_path / "numpyesm_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other.so").rename(package / library_name())
    (tmp_path / "numba.py").write_text("raise ImportError('not here')")  # or it would compile now
    done = run(MODEL, "auto", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", NUMPYESM_CACHE=str(tmp_path))
    assert done.returncode == 0
    assert done.stdout.startswith("numpy"), done.stderr
    assert "the compiled kernels are not used" in done.stderr


@pytest.mark.skipif(build.linker() is None, reason="no C compiler")
def test_warmup_builds_a_library_that_is_used(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    code = "import sys; from numpyesm.cli import main; sys.exit(main(sys.argv[1:]))"
    warm = {"NUMPYESM_KERNELS": "none", "NUMPYESM_CACHE": str(tmp_path)}
    done = run(code, "warmup", **warm)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.rglob(library_name())
    assert done.stdout.strip() == str(made)
    assert not list(made.parent.glob(".build-*"))
    found = run(MODEL, "auto", PYTHONPATH=str(ROOT), NUMPYESM_KERNELS=str(made.parent))
    assert f"library {made}" in found.stdout, found.stderr


def test_building_needs_numba_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildFailed, match="no C compiler"):
        build.build(tmp_path, ["plain"])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"numpyesm\[fast\]"):
        build.build(tmp_path, ["plain"])
    with pytest.raises(InvalidOption, match="'sse9' is unknown; there are"):
        build.check_levels("sse9")
    assert list(tmp_path.iterdir()) == []


def test_every_kernel_is_needed_by_some_precision_of_some_level() -> None:
    used = {name for isa in levels().values() for precision in PRECISIONS for name in needed(isa, precision)}
    assert used == set(ARGUMENTS)
