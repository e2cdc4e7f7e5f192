"""Compiled kernels in fresh processes: the library built ahead of time, Numba's cache, warm-up, Ctrl-C, what fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, call

import pytest

pytest.importorskip("numba")

from numpyesm.cli import main
from numpyesm.errors import InvalidOption, MissingExtra
from numpyesm.kernels import build
from numpyesm.kernels.compiled import isa as simd
from numpyesm.kernels.compiled.code import ARGUMENTS, SOURCES, needed, symbol
from numpyesm.kernels.compiled.isa import host_isa, host_levels, levels
from numpyesm.kernels.compiled.library import abi, find_library, library_name
from numpyesm.kernels.numba_ import cache
from numpyesm.options import PRECISIONS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

# What the C library gives; memcpy and its kind are what LLVM makes of loops.
LIBC = {"memcpy", "memset", "memmove", "sched_yield", "usleep"}
CLONES = {"_ITM_registerTMCloneTable", "_ITM_deregisterTMCloneTable"}
RUNTIME = {"__cxa_finalize", "__gmon_start__", "_init", "_fini", *CLONES}

MODEL = """
import sys
from numpyesm import ESM2
from numpyesm.config import PRESETS, ModelConfig
from numpyesm.weights.synthetic import random_checkpoint
checkpoint = random_checkpoint(ModelConfig(1, 80, 20, 320))
"""
WHICH = f"""{MODEL}
model = ESM2(checkpoint)
print(model.backend, {{"numba", "llvmlite"}} & set(sys.modules), model)
"""
DIGEST = f"""{MODEL}
import hashlib
sequences = [("ACDEFGHIKLMNPQRSTVWY" * 35)[:n] for n in (1, 2, 33, 64, 65, 130, 700)]
everything = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]
for shape in (ModelConfig(2, 320, 20, 1280), ModelConfig(1, 30, 3, 50)):
    for precision in sys.argv[1:]:
        model = ESM2(random_checkpoint(shape, seed=2), backend="compiled", precision=precision, threads=2)
        digest = hashlib.sha256()
        for result in model.encode(sequences, [0, -1], everything):
            for value in result.to_arrays().values():
                digest.update(value.tobytes())
        print(shape.embed_dim, precision, digest.hexdigest())
print(model)
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python that knows nothing of this one's settings, and no library of kernels unless it is told of one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMPYESM_", "NUMBA_CACHE"))}
    settings = {"PYTHONPATH": str(ROOT), "NUMPYESM_KERNELS": "none", "NUMPYESM_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=kept | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=550)
    assert process.returncode == code, err
    return out, err


def without_numba(folder: Path) -> str:
    """A PYTHONPATH on which Numba is installed and fails."""
    (folder / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.0 or less')")
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.fixture(scope="module")
def library() -> Path:
    """The library that this environment has."""
    code = find_library()
    if isinstance(code, str):
        pytest.skip(f"{code}: make test builds one where there is a C compiler")
    assert code.file is not None
    return code.file


@pytest.fixture(scope="module")
def numba_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where Numba keeps what several of these tests compile."""
    return str(tmp_path_factory.mktemp("numba"))


def test_several_processes_fill_one_cache(numba_cache: str, tmp_path: Path) -> None:
    """And the warm-up command, without a C compiler, adds the rest: what is compiled then is all that is needed."""
    code = """
from numpyesm.kernels.numba_ import layer, runner
from numpyesm.kernels.numba_.cache import compile_kernel
compile_kernel("lm_head"), compile_kernel("run_phases")
"""
    for process in [start("-c", code, NUMBA_CACHE_DIR=numba_cache), start("-c", code, NUMBA_CACHE_DIR=numba_cache)]:
        finish(process)
    command = ["-m", "numpyesm", "warmup", "--precision", "fp32", "--cache", numba_cache]
    out, err = finish(start(*command, PATH=str(tmp_path)))
    assert "numpyesm: compiling kernels" in err
    assert numba_cache in out
    (folder,) = Path(numba_cache).iterdir()
    assert host_isa().name in folder.name  # each of the instruction sets has its own
    assert (folder / "fp32.ready").exists()
    _, err = finish(start("-c", DIGEST, "fp32", NUMBA_CACHE_DIR=numba_cache))
    assert "compiling" not in err


def test_same_numbers_as_numba_bit_for_bit(library: Path, numba_cache: str) -> None:
    """At every level of this machine; Numba compiles for all of them at once, which takes minutes."""

    def at_level(level: str) -> None:
        # fp32 is the same code whether products in bf16 are spelled out or not there.
        precisions = PRECISIONS[1:] if levels()[level].spelled_out else PRECISIONS
        settings = {"NUMPYESM_ISA": level, "NUMBA_CACHE_DIR": numba_cache}
        codes = (str(library), "none")
        (ahead, _), (jit, _) = (
            finish(start("-c", DIGEST, *precisions, **settings, NUMPYESM_KERNELS=named)) for named in codes
        )
        *found, origin = ahead.splitlines()
        *expected, jit_origin = jit.splitlines()
        assert (str(library) in origin, "Numba" in jit_origin) == (True, True)
        assert found == expected, level

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(at_level, host_levels()))


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("nm"), reason="nm of a Linux library")
def test_symbols_are_the_kernels_and_a_few_of_libc(library: Path) -> None:
    """Nothing of Python or Numba is asked for, and nothing but the entries is given."""
    listed = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {kind: {line.split()[-1].split("@")[0] for line in listed if line.split()[-2] == kind} for kind in "UT"}
    assert names["U"] <= LIBC | RUNTIME
    built = [isa for isa in levels().values() if symbol(isa, "lm_head") in names["T"]]
    assert {isa.name for isa in built} >= set(host_levels())
    entries = {symbol(isa, name) for isa in built for name in ARGUMENTS if isa.bf16 or not name.endswith("bf16")}
    assert names["T"] - RUNTIME == entries
    assert library.stat().st_size < 3e6 / len(levels()) * len(built)


def test_a_library_that_fits_and_others(library: Path, tmp_path: Path) -> None:
    """It runs where Numba does not. Another that was named is an error; that was found, passed over with a warning."""
    path = without_numba(tmp_path)  # or it would compile now
    out, _ = finish(start("-c", WHICH, PYTHONPATH=path, NUMPYESM_KERNELS=os.path.relpath(library.parent)))
    assert out.startswith("compiled set()")
    assert f"library {library}" in out
    other = library.read_bytes().replace(abi().encode(), abi().replace(abi()[2:6], "zzzz").encode())
    for name, content, reason in [
        ("other.so", other, "was built from other sources than this numpyesm"),
        ("text.so", b"no library", "is no library of kernels for this machine"),
        ("half.so", other[: len(other) // 2], "is incomplete"),
        ("missing.so", b"", "there is no file"),
    ]:
        file = tmp_path / name
        if content:
            file.write_bytes(content)
        _, err = finish(start("-c", WHICH, NUMPYESM_KERNELS=str(file)), code=1)
        assert f"InvalidOption: NUMPYESM_KERNELS={file}: " in err
        assert reason in err
    package = tmp_path / "numpyesm_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other.so").rename(package / library_name())
    out, err = finish(start("-c", WHICH, PYTHONPATH=path, NUMPYESM_KERNELS="", NUMPYESM_CACHE=str(tmp_path)))
    assert out.startswith("numpy")
    assert "the compiled kernels are not used" in err


@pytest.mark.skipif(build.linker() is None, reason="no C compiler")
def test_warmup_builds_a_library_that_is_used(tmp_path: Path) -> None:
    level = {"NUMPYESM_ISA": "plain"}  # whose kernels are compiled fastest
    out, _ = finish(start("-m", "numpyesm", "warmup", NUMPYESM_CACHE=str(tmp_path), **level))
    (made,) = tmp_path.rglob(library_name())
    assert out.strip() == str(made)
    assert not list(made.parent.glob(".build-*"))
    out, _ = finish(start("-c", WHICH, NUMPYESM_KERNELS=str(made.parent), **level))
    assert f"library {made}" in out


def test_warmup_compiles_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all precisions that the CPU has where none is named."""
    warmup = Mock(return_value=Path("folder"))
    monkeypatch.setattr("numpyesm.kernels.warmup.warmup", warmup)
    assert [main(["warmup", *options]) for options in ([], ["--precision", "fp32"], ["--cache", "there"])] == [0] * 3
    assert main(["warmup", "--backend", "numpy"]) == 0
    asked = (None, None), (["fp32"], None), (None, "there")
    assert warmup.mock_calls == [call(precisions, cache_dir=folder) for precisions, folder in asked]


def test_building_needs_numba_and_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildFailed, match="no C compiler"):
        build.build(tmp_path, ["plain"])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"numpyesm\[fast\]"):
        build.build(tmp_path, ["plain"])
    with pytest.raises(InvalidOption, match=r"'sse9' is unknown; there are .*all, host or best"):
        build.check_levels("sse9")
    assert build.check_levels("plain, plain") == ["plain"]
    for wrong in ('"unclosed', "nosuchcc"):
        monkeypatch.setenv("CC", wrong)
        with pytest.raises(build.BuildFailed, match=f"CC={wrong}: "):
            build.linker()
    assert list(tmp_path.iterdir()) == []


def test_every_source_is_in_the_checksum_and_every_kernel_is_needed_by_some_precision_of_some_level() -> None:
    sources = {f"numba_/{path.name}" for path in Path(cache.__file__).parent.glob("[a-z_]*.py")}
    assert sources == {name for name in SOURCES if name.startswith("numba_/")}
    used = {name for isa in levels().values() for precision in PRECISIONS for name in needed(isa, precision)}
    assert used == set(ARGUMENTS)


@pytest.mark.skipif(build.linker() is None, reason="no C compiler")
def test_wheel_of_the_library(tmp_path: Path) -> None:
    """Its files lie where auditwheel and an installer want machine code."""
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT / "packaging/kernels")]
    finish(start("-m", "pip", "wheel", *options, NUMPYESM_KERNEL_LEVELS="plain"))
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert {f"numpyesm_kernels/{name}" for name in ("__init__.py", library_name())} <= {*archive.namelist()}


def test_bf16_products_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's cores that have AMX, which the system may withhold, take longer for `vdpbf16ps` than for float32."""
    x86 = {level.name: level for level in simd._LEVELS["x86_64"]}
    monkeypatch.setattr(simd, "levels", lambda: x86)
    monkeypatch.setattr(simd, "tiles_granted", lambda: False)
    monkeypatch.setattr(simd, "host_levels", simd.host_levels.__wrapped__)  # what this machine has stays cached
    monkeypatch.delenv("NUMPYESM_ISA", raising=False)
    zen4 = frozenset(x86["avx512-bf16"].needs)
    for features, best in (zen4, "avx512-bf16"), (zen4 | {"avx512fp16", "amx-tile", "amx-bf16"}, "avx512"):
        monkeypatch.setattr(simd, "host_features", lambda found=features: found)
        assert next(iter(simd.wanted_levels.__wrapped__())) == best


def test_unknown_level(tmp_path: Path) -> None:
    """Whatever there is to run: here only NumPy."""
    _, err = finish(start("-c", WHICH, NUMPYESM_ISA="sse9", PYTHONPATH=without_numba(tmp_path)), code=1)
    assert f"InvalidOption: NUMPYESM_ISA=sse9: this CPU has {', '.join(host_levels())}" in err


def test_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Falls back to the temporary folder; without one `auto` is NumPy, and `compiled` compiles anew in each process."""
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "below")
    code = "from numpyesm.kernels.numba_.cache import cache_folder; print(cache_folder())"
    out, _ = finish(start("-c", code, NUMBA_CACHE_DIR=blocked, TMPDIR=str(tmp_path)))
    assert out.startswith(str(tmp_path / "numpyesm-"))

    read_only = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"
    auto = f"""{read_only}{MODEL}
import warnings
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


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_a_pass_under_way(numba_cache: str) -> None:
    """Sent after a tenth of a pass, by its CPU time; the model is usable afterwards."""
    code = f"""{MODEL}
import os, signal, threading, time
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
    out, _ = finish(start("-c", code, NUMBA_CACHE_DIR=numba_cache))
    assert len(out.split()) == 2
    assert all(float(share) < 0.7 for share in out.split()), out


@pytest.mark.parametrize("broken", ["import", "switched off"])
def test_numba_that_is_installed_and_does_not_work(broken: str, tmp_path: Path) -> None:
    """`auto` goes on with NumPy and says so; who asks for compiled kernels or int8 is told why not."""
    path = {"PYTHONPATH": without_numba(tmp_path)} if broken == "import" else {"NUMBA_DISABLE_JIT": "1"}
    code = f"""{MODEL}
from numpyesm import NumpyesmError
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
