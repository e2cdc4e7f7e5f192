"""Who takes part: every engine in every precision, in which environment it runs and which weights file it opens."""

from __future__ import annotations

import sys
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
    """One column of the comparison.

    Attributes
    ----------
    family : str
        `numpyesm`, `fair-esm`, `transformers`, `onnxruntime`, `openvino` or `esm-cpp`.
    precision : str
        `fp32`, `bf16` or `int8`.
    file : str
        What it opens, inside the folder of weights.
    environment : str
        `own` (the interpreter that runs the benchmark), `peers` or `esm-cpp`.
    backend : str
        Of numpyesm; of openvino, `mixed` if what is not int8 is in bf16, which is its default, and not in fp32.
    """

    family: str
    precision: str
    file: str
    environment: str
    backend: str = ""

    @property
    def name(self) -> str:
        """For example `openvino-bf16`, `numpyesm-numba-fp32`."""
        return "-".join(part for part in (self.family, self.backend, self.precision) if part)

    @property
    def ours(self) -> bool:
        return self.family == OURS


ENGINES = (
    Engine(OURS, "fp32", "canonical.safetensors", "own", "numpy"),
    Engine(OURS, "fp32", "canonical.safetensors", "own", "numba"),
    Engine(OURS, "bf16", "canonical.safetensors", "own", "numba"),
    Engine(OURS, "int8", "canonical.safetensors", "own", "numba"),
    Engine("fair-esm", "fp32", "fair-esm.pt", "peers"),
    Engine("transformers", "fp32", "hf", "peers"),
    Engine("transformers", "bf16", "hf", "peers"),
    Engine("onnxruntime", "fp32", "model.onnx", "peers"),
    Engine("onnxruntime", "int8", "model-int8.onnx", "peers"),
    Engine("openvino", "fp32", "model.onnx", "peers"),
    Engine("openvino", "bf16", "model.onnx", "peers"),
    Engine("openvino", "int8", "openvino-int8.xml", "peers"),
    Engine("openvino", "int8", "openvino-int8.xml", "peers", "mixed"),
    Engine("esm-cpp", "fp32", "esm-cpp.safetensors", "esm-cpp"),
    Engine("esm-cpp", "int8", "esm-cpp.safetensors", "esm-cpp"),
)
BY_NAME = {engine.name: engine for engine in ENGINES}


@dataclass(frozen=True)
class Environments:
    """The interpreter of each environment.

    Attributes
    ----------
    own, peers, esm_cpp : Path
    """

    own: Path
    peers: Path
    esm_cpp: Path

    @classmethod
    def find(cls, peers: Path | None = None, esm_cpp: Path | None = None) -> Environments:
        """What was named, else what `--setup` made, else the current interpreter, which may have it all."""
        own = Path(sys.executable)
        return cls(own, peers or _python(PEERS_VENV) or own, esm_cpp or _python(ESM_CPP_VENV) or own)

    def python(self, engine: Engine) -> Path:
        """Where an engine runs."""
        return {"own": self.own, "peers": self.peers, "esm-cpp": self.esm_cpp}[engine.environment]


def venv_python(folder: Path) -> Path:
    """The interpreter in a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _python(folder: Path) -> Path | None:
    python = venv_python(folder)
    return python if python.exists() else None


def select(names: list[str] | None) -> list[Engine]:
    """Engines by name or family, in the order of the table; all of them for None.

    Raises
    ------
    ValueError
        An unknown name.
    """
    if names is None:
        return list(ENGINES)
    known = {key for engine in ENGINES for key in (engine.name, engine.family, f"{engine.family}-{engine.backend}")}
    for name in names:
        if name not in known:
            raise ValueError(f"engine {name!r} is unknown; there are {', '.join(BY_NAME)}")
    return [e for e in ENGINES if {e.name, e.family, f"{e.family}-{e.backend}"} & set(names)]
