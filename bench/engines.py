"""Who takes part: each engine in each precision, its Python environment, and the weights file it opens."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "bench" / ".cache"
RESULTS = ROOT / "bench" / "results"
PEERS_VENV = ROOT / ".venv-bench"
ESM_CPP_VENV = ROOT / ".venv-bench-esm-cpp"

OURS = "numpyesm"
REFERENCE = "fair-esm-fp32"


@dataclass(frozen=True)
class Engine:
    """One row of the comparison."""

    family: str
    precision: str
    file: str  # what it opens, relative to the folder of weights
    environment: str  # own (the interpreter that runs the benchmark), peers or esm-cpp
    backend: str = ""  # of numpyesm; of openvino, `mixed` if what is not int8 runs in bf16, its default, not in fp32

    @property
    def name(self) -> str:  # openvino-bf16, numpyesm-compiled-fp32
        return "-".join(part for part in (self.family, self.backend, self.precision) if part)

    @property
    def ours(self) -> bool:
        return self.family == OURS


ENGINES = (
    Engine(OURS, "fp32", "canonical.safetensors", "own", "numpy"),
    Engine(OURS, "fp32", "canonical.safetensors", "own", "compiled"),
    Engine(OURS, "bf16", "canonical-bf16.safetensors", "own", "compiled"),
    Engine(OURS, "int8", "canonical-int8.safetensors", "own", "compiled"),
    Engine("fair-esm", "fp32", "fair-esm.pt", "peers"),
    Engine("transformers", "fp32", "hf", "peers"),
    Engine("transformers", "bf16", "hf", "peers"),
    Engine("onnxruntime", "fp32", "model.onnx", "peers"),
    Engine("onnxruntime", "int8", "model-int8.onnx", "peers"),
    Engine("openvino", "fp32", "model.onnx", "peers"),
    Engine("openvino", "bf16", "model.onnx", "peers"),
    Engine("openvino", "int8", "openvino-int8.xml", "peers"),
    Engine("openvino", "int8", "openvino-int8.xml", "peers", "mixed"),
    Engine("esm-cpp", "fp32", "hf/model.safetensors", "esm-cpp"),
    Engine("esm-cpp", "int8", "hf/model.safetensors", "esm-cpp"),
)
BY_NAME = {engine.name: engine for engine in ENGINES}


def select(names: list[str] | None) -> list[Engine]:
    """Return engines by name or family, all for None; ValueError for an unknown one."""
    known = {key for engine in ENGINES for key in (engine.name, engine.family)}
    for name in names or ():
        if name not in known:
            raise ValueError(f"engine {name!r} is unknown; there are {', '.join(BY_NAME)}")
    return [engine for engine in ENGINES if names is None or {engine.name, engine.family} & set(names)]


# One `pip install` per line: a peer that has no wheel here does not take the others with it.
PACKAGES = {
    PEERS_VENV: (
        ("torch==2.13.0", "numpy"),
        ("fair-esm==2.0.0",),
        ("transformers>=5,<6", "safetensors"),
        ("onnxruntime", "onnx"),
        ("openvino",),
        ("nncf",),
    ),
    ESM_CPP_VENV: (("esm-cpp", "numpy<2"),),
}


def interpreters() -> dict[str, Path]:
    """The interpreter of each environment: `set_up`'s, or else the current one, which may have everything."""
    own = Path(sys.executable)
    made = {"peers": _python(PEERS_VENV), "esm-cpp": _python(ESM_CPP_VENV)}
    return {"own": own} | {name: python if python.exists() else own for name, python in made.items()}


def set_up() -> None:
    """Make or complete the peers' environments; what cannot be installed is named as missing later."""
    for folder, groups in PACKAGES.items():
        if not _python(folder).exists():
            venv.create(folder, with_pip=True)
        for group in groups:
            print(f"{folder.name}: {' '.join(group)}", file=sys.stderr, flush=True)
            subprocess.run([str(_python(folder)), "-m", "pip", "install", "--quiet", *group], check=False)


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
