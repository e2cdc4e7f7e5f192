"""`python -m bench.cold`: what an engine costs before it is of use: time to the first result, memory, disk.

Cold start is from starting the process to the mean embedding of 100 residues, weights opened on the way; the files are
in memory and compiled code is in its cache, because every engine has run once before. Engines take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .client import child_environment
from .engines import CACHE, RESULTS, ROOT, Engine, Environments, select
from .fresh import cold_start
from .machine import machine_info
from .weights import make_weights
from .workloads import random_sequence

ENGINE_NAMES = (
    "numpyesm-numpy-fp32",
    "numpyesm-numba-fp32",
    "numpyesm-numba-int8",
    "fair-esm-fp32",
    "onnxruntime-fp32",
    "openvino-fp32",
    "esm-cpp-fp32",
)
HANDLER = "numpyesm-lambda-"

# What `pip install` is told to get: its distributions, and the environment they are measured in.
STACKS = {
    "numpyesm without the Hub": (("numpy", "safetensors"), "own"),
    "numpyesm": (("numpy", "safetensors", "huggingface-hub"), "own"),
    "numpyesm[fast]": (("numpy", "safetensors", "huggingface-hub", "numba"), "own"),
    "fair-esm": (("fair-esm", "torch", "numpy"), "peers"),
    "transformers": (("transformers", "torch", "numpy"), "peers"),
    "onnxruntime": (("onnxruntime", "numpy"), "peers"),
    "openvino": (("openvino", "numpy"), "peers"),
    "esm-cpp": (("esm-cpp", "numpy"), "esm-cpp"),
}

_LAMBDA = """
import json, sys
sys.path.insert(0, sys.argv[2])
from numpyesm.serverless import handler
path = "/api/v3/esm2-35m/encode/"
answer = handler({"version": "2.0", "rawPath": path, "headers": {"content-type": "application/json"},
                  "requestContext": {"http": {"method": "POST", "path": path}},
                  "body": json.dumps({"items": [{"sequence": sys.argv[1]}]})})
assert answer["statusCode"] == 200, answer
status = open("/proc/self/status").read()
print(json.dumps({"peak_mb": int(status.split("VmHWM:")[1].split()[0]) / 1024}), flush=True)
"""

# Files of distributions and of all that they need, byte code not counted; runs in the stack's own environment.
_SIZES = """
import importlib.metadata as metadata, json, os, re, sys
def name_of(requirement):
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
def wanted(requirement):
    marker = requirement.partition(";")[2]
    if not marker:
        return True
    try:
        from packaging.markers import Marker
    except ImportError:
        from pip._vendor.packaging.markers import Marker
    return Marker(marker).evaluate({"extra": ""})
sizes, todo = {}, list(sys.argv[1:])
while todo:
    name = todo.pop()
    if name in sizes:
        continue
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        sizes[name] = None
        continue
    files = [str(found.locate_file(f)) for f in found.files or () if not str(f).endswith(".pyc")]
    sizes[name] = sum(os.path.getsize(f) for f in files if os.path.isfile(f))
    todo += [name_of(r) for r in found.requires or () if wanted(r)]
print(json.dumps(sizes))
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write `cold.json` and `cold.md`."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(ENGINE_NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (%(default)s)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the weights of every engine are kept")
    parser.add_argument("--peers-python", type=Path)
    parser.add_argument("--esm-cpp-python", type=Path)
    options = parser.parse_args(arguments)
    environments = Environments.find(options.peers_python, options.esm_cpp_python)
    engines = select(options.engines)
    folder, problems = make_weights("esm2-35m", 0, engines, environments, options.cache)
    starts = cold_start(engines, environments, folder, options.threads, options.repeats + 1)
    for dtype in ("fp32", "fp16", "int8"):
        starts[f"{HANDLER}{dtype}"] = lambda_start(folder, dtype, options.threads, options.repeats + 1)
    report: dict[str, Any] = {
        "machine": machine_info(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "problems": problems,
        "starts": {name: without_first(cell) for name, cell in starts.items()},
        "sizes": {name: install_size(roots, where, environments) for name, (roots, where) in STACKS.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cold.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    (options.output / "cold.md").write_text(text)
    print(text, end="")
    return 0


def lambda_start(folder: Path, dtype: str, threads: int, repeats: int) -> dict[str, Any]:
    """The handler from starting Python to the answer to its first event, as a fresh container has it."""
    task = folder / f"lambda-{dtype}"
    if not (task / "weights").is_dir():
        from numpyesm.weights import convert

        convert(folder / "canonical.safetensors", task / "weights" / "weights.safetensors", dtype=dtype)
    environment = child_environment(threads) | {
        "AWS_LAMBDA_FUNCTION_NAME": "bench",
        "LAMBDA_TASK_ROOT": str(task),
        "NUMPYESM_BACKEND": "numpy",
        "NUMPYESM_THREADS": str(threads),
    }
    cell: dict[str, Any] = {"seconds": [], "peak_mb": []}
    for _ in range(repeats):
        command = [sys.executable, "-c", _LAMBDA, random_sequence(100, 1), str(ROOT)]
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            lines = []
            while line := process.stdout.readline():  # two of its log, then ours
                lines.append(line)
                seconds = time.perf_counter() - start
        if process.returncode:
            return {"missing": "the handler failed"}
        cell["seconds"].append(seconds)
        cell["peak_mb"].append(json.loads(lines[-1])["peak_mb"])
    return cell


def without_first(cell: dict[str, Any]) -> dict[str, Any]:
    """The samples but the first, which fills the caches, and what is said of them."""
    if "missing" in cell or len(cell["seconds"]) < 2:
        return {"missing": cell.get("missing", "no sample")}
    seconds, peak = cell["seconds"][1:], cell["peak_mb"][1:]
    return {"seconds": seconds, "median": median(seconds), "best": min(seconds), "peak_mb": median(peak)}


def install_size(roots: Sequence[str], where: str, environments: Environments) -> dict[str, int | None]:
    """Bytes of each distribution that a stack installs, in its environment; None for one that is not there."""
    engine = Engine("", "", "", where)
    done = subprocess.run(
        [str(environments.python(engine)), "-c", _SIZES, *roots], capture_output=True, text=True, check=True
    )
    sizes: dict[str, int | None] = json.loads(done.stdout)
    if roots[0] == "numpy":  # ours
        package = ROOT / "numpyesm"
        files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        sizes["numpyesm"] = sum(path.stat().st_size for path in files)
    return sizes


def table(report: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    lines = ["| process to first result, 100 residues | median s | best s | peak MB |", "| --- | --- | --- | --- |"]
    for name, cell in sorted(report["starts"].items(), key=lambda entry: entry[1].get("median", 1e9)):
        if "missing" in cell:
            lines.append(f"| {name} | {cell['missing'][:80]} | | |")
        else:
            lines.append(f"| {name} | {cell['median']:.3f} | {cell['best']:.3f} | {cell['peak_mb']:.0f} |")
    lines += ["", "| installed, without weights and byte code | MB | the largest |", "| --- | --- | --- |"]
    for name, sizes in report["sizes"].items():
        there = {k: v for k, v in sizes.items() if v is not None}
        absent = [k for k, v in sizes.items() if v is None]
        largest = sorted(there.items(), key=lambda entry: -entry[1])[:5]
        shown = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in largest)
        gone = f" (not installed here: {', '.join(absent)})" if absent else ""
        lines.append(f"| {name} | {sum(there.values()) / 1e6:.1f} | {shown}{gone} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
