"""Where Python has no threads, no mmap, no subprocesses: Pyodide (WebAssembly in a browser), and odd sandboxes.

NumPy for Pyodide is on no registry that the tests may ask, so its limits are put on an ordinary Python: the modules
that it lacks cannot be imported, threads cannot start, files cannot be mapped. `safetensors` is needed there too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from numpyesm import ESM2, SyntheticWeightsWarning
from numpyesm.weights import convert

ROOT = Path(__file__).parents[1]

# What Pyodide 0.29.5 said under Node: the modules from fcntl to dbm are absent, a thread raises "can't start new
# thread", a process OSError 138; no affinity, no /proc. It has ctypes and maps files, but other builds do not.
LIMITS = """
import sys, warnings, threading, subprocess, mmap, os
warnings.simplefilter("ignore")
import numpy, numpy.lib.stride_tricks, numpy.random  # NumPy itself is built for the place
ABSENT = {"fcntl", "resource", "_multiprocessing", "termios", "pty", "tty", "grp", "pwd", "ssl", "_ssl", "lzma",
          "_lzma", "sqlite3", "curses", "_curses", "readline", "tkinter", "syslog", "dbm", "ctypes", "_ctypes",
          "multiprocessing", "numba", "huggingface_hub", "requests", "httpx"}
for name in list(sys.modules):
    if name.split(".")[0] in ABSENT:
        del sys.modules[name]
class Lacking:
    finders = list(sys.meta_path)
    def find_spec(self, name, path=None, target=None):
        if name in ABSENT or name.split(".")[0] in ABSENT:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
sys.meta_path[:] = [Lacking()]
def refuse(*args, **kwargs):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
import _thread
_thread.start_new_thread = refuse
def no_process(*args, **kwargs):
    raise OSError(138, "emscripten does not support processes.")
subprocess.Popen.__init__ = no_process
os.fork = no_process
class NoMap(mmap.mmap):
    def __new__(cls, *args, **kwargs):
        raise OSError(19, "No such device")
mmap.mmap = NoMap
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
real_open = open
import builtins
def open_without_proc(file, *args, **kwargs):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real_open(file, *args, **kwargs)
builtins.open = open_without_proc
"""


def run(code: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", LIMITS + code], capture_output=True, text=True, timeout=200, cwd=ROOT, env=None
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return convert("synthetic:esm2-8m", tmp_path_factory.mktemp("weights") / "w.safetensors").path


def test_every_module_of_the_numpy_path_can_be_imported() -> None:
    code = """
import json, pkgutil, importlib, numpyesm
skipped = ("numba_", "service", "cli.serve", "cli.embed", "bulk", "compat", "hub", "sklearn", "ray", "serve")
for module in pkgutil.walk_packages(numpyesm.__path__, "numpyesm.", onerror=lambda name: None):
    if not any(part in module.name for part in skipped) and module.name != "numpyesm.__main__":
        importlib.import_module(module.name)
print(json.dumps(sorted({"numba", "ctypes", "multiprocessing", "ssl"} & set(sys.modules))))
"""
    assert run(code) == []


@pytest.mark.parametrize(("source", "threads"), [("file", None), ("synthetic", 4)])
def test_a_forward_pass_gives_the_same_numbers(weights, source, threads) -> None:
    spec = str(weights) if source == "file" else "synthetic:esm2-8m"
    code = f"""
import json
from numpyesm import ESM2
model = ESM2.from_pretrained({spec!r}, threads={threads})
assert model.backend == "numpy"
result = model.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
masked = model.predict(["MK<mask>F"])[0]
print(json.dumps([result.embeddings[6].tolist(), result.contacts.tolist(), result.logits.tolist(),
                  masked.logits.tolist(), float(model.log_prob(["MKT"])[0])]))
"""
    found = run(code)
    with pytest.warns(SyntheticWeightsWarning):
        model = ESM2.from_pretrained(str(weights), backend="numpy", threads=1)
    expected = model.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    logits, scores = model.predict(["MK<mask>F"])[0].logits, model.log_prob(["MKT"])
    for a, b in zip(
        found, [expected.embeddings[6], expected.contacts, expected.logits, logits, scores[0]], strict=True
    ):
        np.testing.assert_allclose(np.float64(a), b, rtol=2e-5, atol=2e-5)


def test_max_memory_works_without_proc(weights) -> None:
    code = f"""
import json
from numpyesm import ESM2
model = ESM2.from_pretrained({str(weights)!r}, max_memory="500M")
print(json.dumps(len(model.encode(["MKT"])[0].embeddings[6])))
"""
    assert run(code) == 320


def test_numba_is_missing_with_a_name() -> None:
    """numba is asked for by name: an error of ours, not a traceback from inside."""
    code = """
import json
from numpyesm import ESM2, MissingExtra
try:
    ESM2.from_pretrained("synthetic:esm2-8m", backend="numba")
except MissingExtra as error:
    print(json.dumps(str(error)))
"""
    assert "pip install" in str(run(code))


def test_the_wheel_is_pure_python(tmp_path) -> None:
    """One wheel for every platform, Pyodide's micropip included."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    new_enough = "import setuptools; assert int(setuptools.__version__.split('.')[0]) >= 77"
    if subprocess.run([sys.executable, "-c", new_enough], capture_output=True).returncode:
        pip.remove("--no-build-isolation")
    done = subprocess.run([*pip, str(ROOT)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith((".so", ".pyd", ".dylib", ".nbi", ".nbc"))]
        assert "numpyesm/serverless/function.py" in archive.namelist()
        assert b"Root-Is-Purelib: true" in archive.read(
            next(n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        )
