"""What a process loads and how much memory it takes: measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

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
@pytest.mark.parametrize(
    ("work", "limit"),
    [
        ("model.encode(['M' + 'AKTLVSERID' * 10], include=['mean'])", 300),
        ("model.encode(['M' + 'AKTLVSERID' * 204 + 'AKTLVSE'], include=['contacts'])", 700),
    ],
    ids=["mean-101", "contacts-2048"],
)
def test_peak_memory(work: str, limit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """MB of the whole process, 35M float32 weights from a canonical file."""
    from numpyesm.weights import convert

    path = convert("synthetic:esm2-35m", tmp_path_factory.mktemp("weights") / "w.safetensors").path
    code = f"""
import re, warnings
warnings.simplefilter("ignore")
import numpyesm
model = numpyesm.ESM2.from_pretrained({str(path)!r}, backend="numpy", threads=2)
{work}
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""
    peak = float(run(code))
    assert 60 < peak < limit
