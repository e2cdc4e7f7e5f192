"""What a process loads and how much memory it takes: measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from numpyesm.weights import convert

# numpy 1 loads numpy.random at once, and Cython leaves its name behind.
LIGHT = {"numpy", "numpyesm", "cython_runtime"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_loaded() -> None:
    """By the import: NumPy and the standard library; by computing, and by fair-esm's look-alike: nothing more."""
    # Editable installs put finders of their own into sys.modules.
    code = """
import sys, json, warnings
warnings.simplefilter("ignore")
before = set(sys.modules)
import numpyesm
print(json.dumps(list({name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))))
model = numpyesm.ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
model.encode(["MKT"], include=["mean", "contacts", "logits"])
import numpyesm.compat.fair_esm, numpyesm.compat.extract
print(json.dumps(list({name.split(".")[0] for name in sys.modules})))
"""
    imported, used = map(json.loads, run(code).splitlines())
    assert {name for name in imported if not name.startswith("_")} <= LIGHT
    assert {"safetensors", "huggingface_hub", "numba", "torch", "scipy", "matplotlib", "httpx"}.isdisjoint(used)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_of_contacts(tmp_path: Path) -> None:
    """MB of the whole process, 8M weights from a canonical file; means are in test_small_memory.py."""
    path = convert("synthetic:esm2-8m", tmp_path / "w.safetensors").path
    code = f"""
import re, warnings
warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(path)!r}, backend="numpy", threads=2)
model.encode(['M' + 'AKTLVSERID' * 204 + 'AKTLVSE'], include=['contacts'])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
    peak = float(run(code))
    assert 60 < peak < 500
