"""Small machines: narrow weights stay narrow, `max_memory` is kept, maps are shared; sandboxes without threads."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ALL, ROUNDING, SMALL, assert_same, random_sequence

from numpyesm import ESM2, InvalidOption, NotEnoughMemory
from numpyesm.batch import BLOCK_ROWS, Batch
from numpyesm.config import PRESETS
from numpyesm.kernels.narrow import NarrowMatrix
from numpyesm.memory import MemoryBudget, Sizes, format_memory, memory_limit, parse_memory
from numpyesm.threads import default_threads
from numpyesm.weights import save_canonical
from numpyesm.weights.checkpoint import MATRICES, Checkpoint
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import PRECISION_DTYPES, StoredTensor

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


GROUPS = {  # a limit on the inner group or on one around it, as Slurm and systemd set them
    "2": {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/cpu.max": "150000 100000\n",
          "sys/fs/cgroup/job/step/memory.max": "1048576\n", "sys/fs/cgroup/job/step/memory.current": "4096\n"},
    "1": {"proc/self/cgroup": "3:memory:/job\n2:cpu,cpuacct:/job/step\n",
          "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": "1048576\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "4096\n"},
}  # fmt: skip


@linux
@pytest.mark.parametrize("version", GROUPS)
def test_limits_of_control_groups(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def read_text(path: Path) -> str:
        if str(path)[1:] not in GROUPS[version]:
            raise FileNotFoundError(path)
        return GROUPS[version][str(path)[1:]]

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("NUMPYESM_THREADS", raising=False)
    assert (default_threads(), memory_limit()) == (2, 1 << 20)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """35M in every storage, each number rounded by itself."""
    folder = tmp_path_factory.mktemp("weights")
    checkpoint = random_checkpoint(PRESETS["esm2-35m"])
    paths = {stored: folder / f"{stored}.safetensors" for stored in ("fp32", "fp16", "int8")}
    for stored, path in paths.items():
        save_canonical(path, checkpoint, precision=stored)
    return paths


def python(code: str, *, limit: str = "") -> str:
    """What `code` prints in a fresh process, under a `ulimit`."""
    command = [sys.executable, "-c", "import warnings; warnings.simplefilter('ignore')\n" + code]
    if limit:
        command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A model, and what /proc says of the process in MB.
MEASURED = """
import re, numpyesm
model = numpyesm.ESM2.from_pretrained({path!r}, backend="numpy", threads=2{options})
def measured(name, file="status"):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/" + file).read())[1]) / 1024
"""


def test_every_finite_half_precision_number_is_widened_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    np.testing.assert_array_equal(NarrowMatrix(StoredTensor(bits, "F16"))[:], bits.astype(np.float32))  # NaN, inf too
    finite = np.where(np.isfinite(bits), bits, np.float16(1))
    np.testing.assert_array_equal(NarrowMatrix(StoredTensor(finite, "F16"))[:], finite.astype(np.float32))


@pytest.mark.parametrize("stored", ["fp16", "bf16", "int8"])
def test_results_are_those_of_widened_weights(stored: str) -> None:
    narrow = {
        name: tensor.stored_as(PRECISION_DTYPES[stored] if name.split(".")[-2] in MATRICES else "F32")
        for name, tensor in random_checkpoint(SMALL, seed=1).tensors.items()
    }
    wide = {name: StoredTensor(tensor.astype()) for name, tensor in narrow.items()}
    found, expected = (ESM2(Checkpoint(SMALL, kept, "test"), backend="numpy", threads=2) for kept in (narrow, wide))
    sequences = [random_sequence(n) for n in (5, 70, 300)]
    assert_same(found.encode(sequences, [0, 1, -1], ALL), expected.encode(sequences, [0, 1, -1], ALL), within=ROUNDING)


@linux
@pytest.mark.parametrize(("stored", "most"), [("fp32", 260), ("fp16", 160), ("int8", 160)])
@pytest.mark.slow
def test_peak_of_a_mean_of_512(weights: dict[str, Path], stored: str, most: int) -> None:
    """And 512 MiB of address space are enough."""
    code = MEASURED.format(path=str(weights[stored]), options="")
    code += f"model.encode([{random_sequence(512)!r}])\nprint(measured('VmHWM'))"
    assert 50 < float(python(code, limit=f"-v {512 * 1024}")) < most


def encode(sequences: list[str], include: list[str]) -> str:
    return f"model.encode({sequences!r}, include={include!r})"


LOOK_ALIKE = "fair_esm.ESM2(model).outputs"
# A call, and what its refusal says.
CALLS = {
    "mean of many": (encode([random_sequence(n) for n in range(20, 300, 14)], ["mean"]), ""),
    "contacts of 1400": (encode([random_sequence(1400)], ["contacts"]), ""),
    "everything": (encode([random_sequence(700)] * 3, ALL), ""),
    "maps and contacts": (f"{LOOK_ALIKE}(TOKENS, attentions=True, contacts=True)", "predict_contacts does without"),
    "maps": (f"{LOOK_ALIKE}(TOKENS, attentions=True)", "attention maps are"),
    "representations": (f"{LOOK_ALIKE}(TOKENS, repr_layers=range(13))", ""),
    "contacts": (f"{LOOK_ALIKE}(TOKENS, contacts=True)", ""),
    "padding inside": (f"TOKENS[:, 100] = 1; {LOOK_ALIKE}(TOKENS[:1, :300], attentions=True, contacts=True)", ""),
}


@linux
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.slow
def test_the_least_memory_that_is_accepted_is_kept(weights: dict[str, Path], call: str) -> None:
    """Refused before anything is allocated; whatever the budget says a call takes is enough, and is not exceeded."""
    run, said = CALLS[call]
    code = f"""{MEASURED.format(path=str(weights["int8"]), options=", max_memory='4G'")}
from dataclasses import replace
import numpy, tracemalloc, numpyesm.compat.fair_esm as fair_esm
budget, TOKENS = model.passes.budget, numpy.full((3, 500), 5)
tracemalloc.start()
try:
    model.passes.budget = replace(budget, limit=budget.fixed)
    {run}
except numpyesm.NotEnoughMemory as error:
    text, allocated = str(error), tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
least = int(re.search(r"takes about (\\d+) MiB", text)[1]) + 1
model.passes.budget = replace(budget, limit=least << 20)
{run}
print(least, measured("VmHWM"), allocated < 1 << 20, {said!r} in text)
"""
    least, used, *rest = python(code).split()
    assert 0.6 * float(least) < float(used) < float(least)
    assert rest == ["True", "True"]


@pytest.mark.slow
@linux
def test_processes_share_the_weights(weights: dict[str, Path]) -> None:
    """Nothing of the size of the weights is the process's own: the rest are pages of the file, which all share."""
    code = MEASURED.format(path=str(weights["fp32"]), options=", max_memory='1G'") + 'model.encode(["MKTAYIAK"])\n'
    code += 'print(measured("Private_Dirty", "smaps_rollup"), measured("Rss", "smaps_rollup"))'
    private, resident = map(float, python(code).split())
    assert private < 0.5 * weights["fp32"].stat().st_size / (1 << 20) < 0.5 * resident


def test_sizes_are_read() -> None:
    sizes = {
        "512M": 512 << 20, "512MiB": 512 << 20, " 512 mib ": 512 << 20, "400MB": 400_000_000, "1.5G": 3 << 29,
        "2kb": 2000, "2k": 2048, "1T": 1 << 40, 1000: 1000, "7": 7, "7B": 7, format_memory(300 << 20): 300 << 20,
    }  # fmt: skip
    assert {text: parse_memory(text) for text in sizes} == sizes
    for wrong in ("", "M", "-1", "0", 0, -5, "12X", "1e9", "nan", True, None, 1.5, "9" * 40):
        with pytest.raises(InvalidOption, match="max_memory"):
            parse_memory(wrong)


def test_less_memory_gives_smaller_blocks_and_passes_and_at_last_an_error() -> None:
    def sizes(mebibytes: int) -> Sizes:
        budget = MemoryBudget(mebibytes << 20, 100 << 20, PRESETS["esm2-35m"], 4)
        return budget.sizes(0, [300] * 100, {"mean"}, 4096)

    plenty, some, little = sizes(1 << 20), sizes(190), sizes(130)
    assert plenty == Sizes(4096, BLOCK_ROWS, 4)
    assert 302 <= some.rows_per_pass < 4096
    assert 300 <= little.rows_per_pass < some.rows_per_pass
    assert little.threads is not None
    assert (little.threads, little.block_rows) < (4, BLOCK_ROWS)
    with pytest.raises(NotEnoughMemory, match="fewer outputs"):
        sizes(101)


def test_blocks_have_the_rows_that_are_asked_for() -> None:
    batch = Batch.pack([np.zeros(1000, np.uint8)])
    assert max(block.stop - block.start for block in batch.blocks(1, 64)) <= 96
    assert max(block.stop - block.start for block in batch.blocks(1)) > 128


@pytest.mark.slow
def test_a_limit_is_pickled_and_the_backend_follows_it(small_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMPYESM_KERNELS", "none")
    monkeypatch.setattr("numpyesm.memory.resident_memory", lambda: 60 << 20)  # whatever tests ran here before
    model = ESM2.from_pretrained(small_file, max_memory="350M")
    assert model.backend == "numpy"
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert again.passes.budget.limit == model.passes.budget.limit == 350 << 20


@pytest.mark.slow
@linux
@pytest.mark.parametrize("limit", ["-v 524288", "-d 524288"])
def test_with_numba_installed_a_small_address_space_takes_numpy(weights: dict[str, Path], limit: str) -> None:
    pytest.importorskip("numba")
    code = f"import numpyesm; model = numpyesm.ESM2.from_pretrained({str(weights['fp32'])!r})"
    code += "; model.encode(['MKT']); print(model.backend)"
    assert python(code, limit=limit) == "numpy\n"


# -- where Python has no threads, no mmap, no subprocesses -----------------------------------------------------------

# NumPy for Pyodide (WebAssembly in a browser) is on no registry that the tests may ask, so its limits are put on an
# ordinary Python: modules cannot be imported, threads cannot start, files cannot be mapped. `safetensors` is needed.
# What Pyodide 0.29.5 said under Node: the modules from fcntl to dbm are absent, a thread raises "can't start new
# thread", a process OSError 138; no affinity, no /proc. It has ctypes and maps files, but other builds do not.
LIMITS = """
import sys, threading, subprocess, mmap, os, builtins, _thread
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
from numpyesm import ESM2, InvalidOption, MissingExtra
skipped = ("numba_", "service", "cli.serve", "cli.embed", "bulk", "compat", "hub", "sklearn", "ray", "serve")
for module in pkgutil.walk_packages(numpyesm.__path__, "numpyesm.", onerror=lambda name: None):
    if not any(part in module.name for part in skipped) and module.name != "numpyesm.__main__":
        importlib.import_module(module.name)
found = []
for options in ({}, {"threads": 4}, {"max_memory": "500M"}):
    model = ESM2.from_pretrained(PATH, **options)
    assert model.backend == "numpy"
    result = model.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    found.append([result.embeddings[3].tolist(), result.contacts.tolist(), result.logits.tolist(),
                  model.predict(["MK<mask>F"])[0].logits.tolist(), float(model.log_prob(["MKT"])[0])])
for options, expected in (({"backend": "numba"}, MissingExtra), ({"precision": "bf16"}, InvalidOption)):
    try:
        ESM2.from_pretrained(PATH, **options)
    except expected as error:  # asked for by name, it is an error of ours
        assert all(part in str(error) for part in ("Numba is not installed", "pip install", "numpyesm[fast]"))
    else:
        raise AssertionError("there is no Numba")
print(json.dumps(found))
"""


def test_without_threads_the_numpy_path_gives_the_same_numbers(small_file: str, loaded: ESM2) -> None:
    """Every module of it can be imported; any number of threads or a limit of memory may be asked for."""
    printed = python(f"PATH = {small_file!r}\n{LIMITS}{CODE}")
    result = loaded.encode(["MKTFFVLVLLLSGALAAPVA" * 12], include=["mean", "contacts", "logits"])[0]
    masked, scores = loaded.predict(["MK<mask>F"])[0].logits, loaded.log_prob(["MKT"])
    expected = [result.embeddings[3], result.contacts, result.logits, masked, scores[0]]
    for found in json.loads(printed.splitlines()[-1]):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(np.float64(a), b, rtol=2e-5, atol=2e-5)
