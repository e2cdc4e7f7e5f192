"""Where Python has no threads, no mmap, no subprocesses: Pyodide (WebAssembly in a browser), and odd sandboxes.

NumPy for Pyodide is on no registry that the tests may ask, so its limits are put on an ordinary Python: the modules
that it lacks cannot be imported, threads cannot start, files cannot be mapped. `safetensors` is needed there too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm import ESM2

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


# Everything in one process; each line that it prints is an answer.
CODE = """
import json, pkgutil, importlib, numpyesm
from numpyesm import ESM2, MissingExtra
skipped = ("numba_", "service", "cli.serve", "cli.embed", "bulk", "compat", "hub", "sklearn", "ray", "serve")
for module in pkgutil.walk_packages(numpyesm.__path__, "numpyesm.", onerror=lambda name: None):
    if not any(part in module.name for part in skipped) and module.name != "numpyesm.__main__":
        importlib.import_module(module.name)
answers = {"imported": sorted({"numba", "ctypes", "multiprocessing", "ssl"} & set(sys.modules))}
for name, options in (("file", {}), ("four threads", {"threads": 4}), ("limit", {"max_memory": "500M"})):
    model = ESM2.from_pretrained(sys.argv[1], **options)
    assert model.backend == "numpy"
    result = model.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    answers[name] = [result.embeddings[3].tolist(), result.contacts.tolist(), result.logits.tolist(),
                     model.predict(["MK<mask>F"])[0].logits.tolist(), float(model.log_prob(["MKT"])[0])]
try:
    ESM2.from_pretrained(sys.argv[1], backend="numba")
except MissingExtra as error:
    answers["numba"] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(small_file: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", LIMITS + CODE, small_file], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_module_of_the_numpy_path_can_be_imported(answers: dict[str, Any]) -> None:
    assert answers["imported"] == []


@pytest.mark.slow
def test_a_forward_pass_gives_the_same_numbers(answers: dict[str, Any], loaded: ESM2) -> None:
    result = loaded.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    masked, scores = loaded.predict(["MK<mask>F"])[0].logits, loaded.log_prob(["MKT"])
    expected = [result.embeddings[3], result.contacts, result.logits, masked, scores[0]]
    for name in ("file", "four threads", "limit"):
        for a, b in zip(answers[name], expected, strict=True):
            np.testing.assert_allclose(np.float64(a), b, rtol=2e-5, atol=2e-5)


def test_numba_is_missing_with_a_name(answers: dict[str, Any]) -> None:
    """Asked for by name, it is an error of ours, not a traceback from inside."""
    assert "pip install" in answers["numba"]
