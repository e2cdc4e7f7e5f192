"""Compiled kernels in fresh processes: the cache on disk, warm-up, instruction sets, Ctrl-C, a Numba that fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numpyesm.cli import main
from numpyesm.kernels.compiled.isa import host_isa, host_levels
from numpyesm.kernels.numba_ import cache

ROOT = Path(__file__).parents[1]

slow = pytest.mark.slow  # starts processes, some of which compile

MODEL = """
import warnings
warnings.simplefilter("ignore")
from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
checkpoint = random_checkpoint(ModelConfig(1, 80, 20, 320))
"""
ENCODE = f"""{MODEL}
model = ESM2(checkpoint, backend="compiled", threads=2)
print(float(model.encode(["MKTAYIAKQR"])[0].embeddings[1].sum()))
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMPYESM_ISA", "NUMBA_CACHE_DIR")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "NUMPYESM_KERNELS": "none"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=550)
    assert process.returncode == code, err
    return out, err


@slow
def test_unknown_level() -> None:
    _, err = finish(start("-c", ENCODE, NUMPYESM_ISA="sse9"), code=1)
    assert f"InvalidOption: NUMPYESM_ISA=sse9: this CPU has {', '.join(host_levels())}" in err


@slow
def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    """And the warm-up command, without a C compiler, adds the rest: what is compiled then is all that is needed."""
    code = """
from numpyesm.kernels.numba_ import layer, runner
from numpyesm.kernels.numba_.cache import compile_kernel
compile_kernel("lm_head"), compile_kernel("run_phases")
"""
    for process in [start("-c", code, NUMBA_CACHE_DIR=str(tmp_path)), start("-c", code, NUMBA_CACHE_DIR=str(tmp_path))]:
        finish(process)
    command = ["-m", "numpyesm", "warmup", "--precision", "fp32", "--cache", str(tmp_path)]
    out, err = finish(start(*command, PATH=str(tmp_path)))
    assert "numpyesm: compiling kernels" in err
    assert str(tmp_path) in out
    (folder,) = tmp_path.iterdir()
    assert host_isa().name in folder.name  # each of the instruction sets has its own
    assert (folder / "fp32.ready").exists()
    _, err = finish(start("-c", ENCODE, NUMBA_CACHE_DIR=str(tmp_path)))
    assert "compiling" not in err


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

    monkeypatch.setattr("numpyesm.kernels.warmup.warmup", compile_kernels)
    assert main(["warmup", *arguments]) == 0
    assert asked == [expected]


@slow
def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Falls back to the temporary folder; without one `auto` is NumPy, and `compiled` compiles anew in each process."""
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "below")
    code = "from numpyesm.kernels.numba_.cache import cache_folder; print(cache_folder())"
    out, _ = finish(start("-c", code, NUMBA_CACHE_DIR=blocked, TMPDIR=str(tmp_path)))
    assert out.startswith(str(tmp_path / "numpyesm-"))

    read_only = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"
    auto = f"""{read_only}{MODEL}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    assert ESM2(checkpoint).backend == "numpy"
assert any("no folder can be written to keep compiled kernels in" in str(one.message) for one in told)
from numpyesm.kernels.numba_ import layer
from numpyesm.kernels.numba_.cache import cache_folder, compile_kernel
assert cache_folder() is None
assert compile_kernel("lm_head").library.get_pointer_to_function(compile_kernel("lm_head").fndesc.llvm_func_name)"""
    finish(start("-c", auto, NUMBA_CACHE_DIR=blocked))


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


@slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_a_pass_under_way() -> None:
    """Sent after a tenth of a pass, by its CPU time; the model is usable afterwards."""
    code = f"""{MODEL}
import os, signal, threading, time
from numpyesm.config import PRESETS
checkpoint = random_checkpoint(PRESETS["esm2-8m"])
batch = ["MKTAYIAKQR" * 200] * 2
used = time.process_time
for threads in (1, 2):
    model = ESM2(checkpoint, backend="compiled", threads=threads)
    expected = model.encode(["MK"])[0].embeddings[6].sum()
    begun = used()
    model.encode(batch)
    whole = used() - begun
    begun = used()
    def interrupt():
        while used() < begun + whole / 10:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        model.encode(batch)
        print("not interrupted")
    except KeyboardInterrupt:
        print((used() - begun) / whole)
    assert model.encode(["MK"])[0].embeddings[6].sum() == expected
"""
    out, _ = finish(start("-c", code))
    assert len(out.split()) == 2
    assert all(float(share) < 0.7 for share in out.split()), out


@slow
@pytest.mark.parametrize("broken", ["import", "switched off"])
def test_numba_that_is_installed_and_does_not_work(broken: str, tmp_path: Path) -> None:
    """`auto` goes on with NumPy and says so; who asks for compiled kernels or int8 is told why not."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"} if broken == "import" else {"NUMBA_DISABLE_JIT": "1"}
    code = f"""{MODEL}
from numpyesm import NumpyesmError
warnings.simplefilter("always")
print(ESM2(checkpoint).backend)
for options in ({{"backend": "compiled"}}, {{"precision": "int8"}}):
    try:
        ESM2(checkpoint, **options)
    except NumpyesmError as error:
        print(error)
"""
    out, err = finish(start("-c", code, **path))
    assert out.splitlines()[0] == "numpy"
    assert out.count("the compiled backend cannot be used") == 2
    assert "using the slower NumPy backend" in err
    if broken == "import":
        assert "Numba needs NumPy 1.0 or less" in out
        assert "Numba needs NumPy 1.0 or less" in err
        _, err = finish(start("-m", "numpyesm", "warmup", **path), code=1)
        assert "Numba needs NumPy 1.0 or less" in err
