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


def test_importing_loads_numpy_and_the_standard_library_only() -> None:
    # Editable installs put finders of their own into sys.modules.
    code = """
import sys, json
before = set(sys.modules)
import numpyesm
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(n for n in names - set(sys.stdlib_module_names) if not n.startswith("_"))))
"""
    assert set(json.loads(run(code))) <= LIGHT


def test_encoding_loads_nothing_more() -> None:
    code = """
import sys, json, warnings
warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy")
model.encode(["MKT"], include=["mean", "contacts", "logits"])
others = {"safetensors", "huggingface_hub", "numba", "torch", "scipy", "matplotlib", "requests", "httpx"}
print(json.dumps(sorted(others & {name.split(".")[0] for name in sys.modules})))
"""
    assert json.loads(run(code)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_contacts(tmp_path: Path) -> None:
    """MB of the whole process, 35M float32 weights from a canonical file; means are in test_small_memory.py."""
    path = convert("synthetic:esm2-35m", tmp_path / "w.safetensors").path
    code = f"""
import re, warnings
warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(path)!r}, backend="numpy", threads=2)
model.encode(['M' + 'AKTLVSERID' * 204 + 'AKTLVSE'], include=['contacts'])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
    peak = float(run(code))
    assert 60 < peak < 700
