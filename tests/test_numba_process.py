"""Compiled kernels in fresh processes: forced instruction sets, the cache on disk, start-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")


from numpyesm.kernels.compiled.isa import host_isa, host_levels
from numpyesm.kernels.numba_ import cache

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow  # each test compiles in processes of its own

ENCODE = """
import sys, warnings
warnings.simplefilter("ignore")
from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
precision = sys.argv[1] if len(sys.argv) > 1 else "fp32"
model = ESM2(random_checkpoint(ModelConfig(1, 80, 20, 320)), backend="numba", precision=precision, threads=2)
print(float(model.encode(["MKTAYIAKQR"])[0].embeddings[1].sum()))
"""
# What `tempfile` does on a read-only root.
NO_TEMPORARY_FOLDER = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"


def start(*arguments: str, code: str = ENCODE, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMPYESM_ISA", "NUMBA_CACHE_DIR")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "NUMPYESM_KERNELS": "none"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_importing_numpyesm_does_not_import_numba() -> None:
    finish(start(code="import numpyesm, sys; assert not {'numba', 'llvmlite'} & sys.modules.keys()"))


def test_unknown_level() -> None:
    process = start(NUMPYESM_ISA="sse9")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"InvalidOption: NUMPYESM_ISA=sse9: this CPU has {', '.join(host_levels())}" in err


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    processes = [start(NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    found = [finish(process) for process in processes]
    assert len({out for out, _ in found}) == 1
    assert any("numpyesm: compiling kernels" in err for _, err in found)
    out, err = finish(start(NUMBA_CACHE_DIR=str(tmp_path)))
    assert out == found[0][0]
    assert "compiling" not in err
    # Each of the instruction sets has its own folder.
    assert [host_isa().name in folder.name for folder in tmp_path.iterdir()] == [True]


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Falls back to the temporary folder, and to memory where there is none."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    code = "from numpyesm.kernels.numba_.cache import cache_folder; print(cache_folder())"
    out, _ = finish(start(code=code, NUMBA_CACHE_DIR=str(blocked / "below"), TMPDIR=str(tmp_path)))
    assert out.startswith(str(tmp_path / "numpyesm-"))
    out, _ = finish(start(code=NO_TEMPORARY_FOLDER + code, NUMBA_CACHE_DIR=str(blocked / "below")))
    assert out == "None\n"


def test_without_any_folder_auto_is_numpy_and_compiled_runs_from_memory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    folder = str(blocked / "below")
    _, err = finish(start(code=NO_TEMPORARY_FOLDER + ENCODE, NUMBA_CACHE_DIR=folder))
    assert "compiling" in err
    encode = ENCODE.replace('backend="numba"', 'backend="auto"').replace('"ignore"', '"always"')
    code = NO_TEMPORARY_FOLDER + encode + "print(model.backend)\n"
    out, err = finish(start(code=code, NUMBA_CACHE_DIR=folder))
    assert out.split()[-1] == "numpy"
    assert "no folder can be written to keep compiled kernels in" in err
    assert "compiling" not in err


def test_filled_read_only_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, temporary = tmp_path / "filled", tmp_path / "tmp"
    (filled / cache._key()).mkdir(parents=True)
    (filled / cache._key() / "fp32.ready").touch()
    (filled / cache._key()).chmod(0o555)
    temporary.mkdir(mode=0o700)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(filled))
    monkeypatch.setattr(cache, "_temporary_folder", lambda: temporary)
    usable = cache._usable
    monkeypatch.setattr(cache, "_usable", lambda folder: filled not in folder.parents and usable(folder))
    found = cache.cache_folder.__wrapped__()
    assert found == temporary / cache._key()
    assert (found / "fp32.ready").exists()
    assert found.stat().st_mode & 0o200, "Numba does not read what it cannot write to"


@pytest.mark.skipif(os.name != "posix", reason="a PATH without compilers")
def test_warmup_without_a_compiler_fills_numbas_cache(tmp_path: Path) -> None:
    code = "import sys; from numpyesm.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ("warmup", "--precision", "fp32", "--cache", str(tmp_path / "cache"))
    out, _ = finish(start(*arguments, code=code, PATH=str(tmp_path)))
    assert out.startswith(str(tmp_path / "cache"))
    _, err = finish(start(NUMBA_CACHE_DIR=str(tmp_path / "cache")))
    assert "compiling" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_stops_a_pass_under_way(threads: int) -> None:
    """A pass of many seconds in compiled code; the model is usable afterwards."""
    code = f"""
import sys, time, warnings
warnings.simplefilter("ignore")
from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
model = ESM2(random_checkpoint(ModelConfig(60, 480, 20, 1920)), backend="numba", threads={threads})
model.encode(["MK"])
print("ready", flush=True)
try:
    model.encode(["MKTAYIAKQR" * 200] * 8)
    print("not interrupted")
except KeyboardInterrupt:
    print(time.time())
assert abs(float(model.encode(["MK"])[0].embeddings[60].sum())) > 0
"""
    process = start(code=code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    sent = time.time()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert float(out) - sent < 5  # a second on a machine that does nothing else


@pytest.mark.parametrize("broken", ["import", "switched off"])
def test_numba_that_is_installed_and_does_not_work(broken: str, tmp_path: Path) -> None:
    """`auto` goes on with NumPy and says so; who asks for numba or int8 is told why not."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} if broken == "import" else {"NUMBA_DISABLE_JIT": "1"}
    code = """
import warnings
from numpyesm import ESM2, NumpyesmError
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
checkpoint = random_checkpoint(ModelConfig(1, 80, 20, 320))
print(ESM2(checkpoint).backend)
for options in ({"backend": "numba"}, {"precision": "int8"}):
    try:
        ESM2(checkpoint, **options)
    except NumpyesmError as error:
        print(error)
"""
    out, err = finish(start(code=code, **path))
    assert out.splitlines()[0] == "numpy"
    assert out.count("the compiled backend cannot be used") == 2
    assert "using the slower NumPy backend" in err
    if broken == "import":
        assert "Numba needs NumPy 1.0 or less" in out
        assert "Numba needs NumPy 1.0 or less" in err
