"""`--setup`: the peers' virtual environments. What cannot be installed is said and left out; the rest goes on."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from .engines import ESM_CPP_VENV, PEERS_VENV, venv_python

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# One line, one `pip install`: a peer that has no wheel here does not take the others with it.
PEERS = (
    ("torch==2.13.0", "numpy"),
    ("fair-esm==2.0.0",),
    ("transformers>=5,<6", "safetensors"),
    ("onnxruntime", "onnx"),
    ("openvino",),
    ("nncf",),
    ("matplotlib",),
)
ESM_CPP = (("esm-cpp", "numpy<2"),)


def set_up() -> list[str]:
    """Make or complete both environments; returns what could not be installed."""
    index = ["--extra-index-url", TORCH_CPU_INDEX] if _reachable(TORCH_CPU_INDEX) else []
    missing = []
    for folder, groups in ((PEERS_VENV, PEERS), (ESM_CPP_VENV, ESM_CPP)):
        python = venv_python(folder)
        if not python.exists():
            venv.create(folder, with_pip=True)
        for group in groups:
            extra = index if group[0].startswith("torch") else []
            if not _install(python, group, extra):
                missing.append(f"{' '.join(group)} (in {folder.name})")
    for what in missing:
        print(f"could not install {what}: the benchmark will name it as missing", file=sys.stderr)
    return missing


def _install(python: Path, packages: tuple[str, ...], extra: list[str]) -> bool:
    print(f"{python.parents[1].name}: {' '.join(packages)}", file=sys.stderr, flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *extra, *packages]
    return subprocess.run(command, check=False).returncode == 0


def _reachable(url: str) -> bool:
    """Whether the index of CPU-only builds answers; PyPI's own torch works too, at some gigabytes more."""
    try:
        with urlopen(Request(url + "/torch/", method="HEAD"), timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError, ValueError):
        return False
