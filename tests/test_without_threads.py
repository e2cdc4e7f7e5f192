"""Where Python has no threads, no mmap, no subprocesses: Pyodide (WebAssembly in a browser), and odd sandboxes.

NumPy for Pyodide is on no registry that the tests may ask, so its limits are put on an ordinary Python: the modules
that it lacks cannot be imported, threads cannot start, files cannot be mapped. `safetensors` is needed there too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from numpyesm import ESM2

ROOT = Path(__file__).parents[1]

# What Pyodide 0.29.5 said under Node: the modules from fcntl to dbm are absent, a thread raises "can't start new
# thread", a process OSError 138; no affinity, no /proc. It has ctypes and maps files, but other builds do not.
LIMITS = """
import sys, warnings, threading, subprocess, mmap, os, builtins, _thread
warnings.simplefilter("ignore")
import numpy, numpy.lib.stride_tricks, numpy.random  # NumPy itself is built for the place
ABSENT = {"fcntl", "resource", "_multiprocessing", "termios", "pty", "tty", "grp", "pwd", "ssl", "_ssl", "lzma",
          "_lzma", "sqlite3", "curses", "_curses", "readline", "tkinter", "syslog", "dbm", "ctypes", "_ctypes",
          "multiprocessing", "numba", "huggingface_hub", "requests", "httpx"}
for name in [*sys.modules]:
    if name.split(".")[0] in ABSENT:
        del sys.modules[name]
sys.modules.update(dict.fromkeys(ABSENT))
def refuse(error):
    def refused(*args, **kwargs):
        raise error
    return refused
threading.Thread.start = _thread.start_new_thread = refuse(RuntimeError("can't start new thread"))
subprocess.Popen.__init__ = os.fork = refuse(OSError(138, "emscripten does not support processes."))
mmap.mmap = type("NoMap", (mmap.mmap,), {"__new__": refuse(OSError(19, "No such device"))})
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
real_open = open
def open_without_proc(file, *args, **kwargs):
    return real_open("/nowhere" if str(file).startswith(("/proc", "/sys")) else file, *args, **kwargs)
builtins.open = open_without_proc
"""

# Everything in one process, which prints what it found.
CODE = """
import json, pkgutil, importlib, numpyesm
from numpyesm import ESM2, MissingExtra
skipped = ("numba_", "service", "cli.serve", "cli.embed", "bulk", "compat", "hub", "sklearn", "ray", "serve")
for module in pkgutil.walk_packages(numpyesm.__path__, "numpyesm.", onerror=lambda name: None):
    if not any(part in module.name for part in skipped) and module.name != "numpyesm.__main__":
        importlib.import_module(module.name)
found = []
for options in ({}, {"threads": 4}, {"max_memory": "500M"}):
    model = ESM2.from_pretrained(sys.argv[1], **options)
    assert model.backend == "numpy"
    result = model.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    found.append([result.embeddings[3].tolist(), result.contacts.tolist(), result.logits.tolist(),
                  model.predict(["MK<mask>F"])[0].logits.tolist(), float(model.log_prob(["MKT"])[0])])
try:
    ESM2.from_pretrained(sys.argv[1], backend="numba")
except MissingExtra as error:
    assert "pip install" in str(error)  # asked for by name, it is an error of ours
else:
    raise AssertionError("there is no Numba")
print(json.dumps(found))
"""


def test_the_numpy_path_gives_the_same_numbers(small_file: str, loaded: ESM2) -> None:
    """Every module of it can be imported; any number of threads or a limit of memory may be asked for."""
    done = subprocess.run([sys.executable, "-c", LIMITS + CODE, small_file], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = loaded.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    masked, scores = loaded.predict(["MK<mask>F"])[0].logits, loaded.log_prob(["MKT"])
    expected = [result.embeddings[3], result.contacts, result.logits, masked, scores[0]]
    for found in json.loads(done.stdout.splitlines()[-1]):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.float64(a), b, rtol=2e-5, atol=2e-5)
