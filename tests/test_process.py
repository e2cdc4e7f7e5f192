"""What a process loads, measured in a fresh one. How much memory it takes is in test_small_memory.py."""

from __future__ import annotations

import json
import subprocess
import sys

# numpy 1 loads numpy.random at once, and Cython leaves its name behind.
LIGHT = {"numpy", "numpyesm", "cython_runtime"}


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    imported, used = map(json.loads, done.stdout.splitlines())
    assert {name for name in imported if not name.startswith("_")} <= LIGHT
    assert {"safetensors", "huggingface_hub", "numba", "torch", "scipy", "matplotlib", "httpx"}.isdisjoint(used)
