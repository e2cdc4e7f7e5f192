"""The driver's side of a worker: start it in the engine's environment and ask it one thing at a time."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engines import ROOT, Engine


class EngineFailed(Exception):
    """An engine that cannot be installed, opened or run, with the reason."""


def child_environment(threads: int) -> dict[str, str]:
    """Environment variables of every process that is measured: its threads, in every library's own way."""
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "ESM")}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    kept = {"PYTHONDONTWRITEBYTECODE": ""}  # pip compiles what it installs; so may we what a checkout holds
    return os.environ | counts | quiet | kept | {"NUMPYESM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def run_python(python: Path, threads: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as the measured processes run, to its end, and keep what it says."""
    command, environment = [str(python), *arguments], child_environment(threads)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Bench:
    """Where engines run and what they open."""

    pythons: dict[str, Path]
    folder: Path
    threads: int

    def start(self, engine: Engine) -> Worker:
        """Start a process for the engine, which has not opened its weights yet."""
        return Worker(self.pythons[engine.environment], self.threads, self.folder / "logs" / f"{engine.name}.log")

    def load_request(self, engine: Engine) -> dict[str, Any]:
        """Return the request that opens the engine's weights."""
        return {
            "do": "load",
            "family": engine.family,
            "backend": engine.backend,
            "precision": engine.precision,
            "path": str(self.folder / engine.file),
            "threads": self.threads,
        }

    @contextlib.contextmanager
    def opened(self, engine: Engine) -> Iterator[Worker]:
        """A fresh worker with its weights opened, ended afterwards."""
        worker = self.start(engine)
        try:
            worker.ask(**self.load_request(engine))
            yield worker
        finally:
            worker.close()


class Worker:
    """A running engine, which answers requests one at a time."""

    def __init__(self, python: Path, threads: int, log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", "bench.worker"],
                cwd=ROOT,
                env=child_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request, wait for its answer; EngineFailed if the engine says so or its process ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text(errors="replace").strip().splitlines()
            raise EngineFailed(f"the process ended: {said[-1][:300] if said else 'without a message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def ask_arrays(self, **request: Any) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Send a request whose result is large. Returns the answer and its arrays by name."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "arrays.npz")
            answer = self.ask(**request, file=str(file))
            with np.load(file) as arrays:
                return answer, dict(arrays)

    def outputs(self, batch: Sequence[str]) -> list[dict[str, npt.NDArray[Any]]]:
        """Each sequence's last representation `rows` (L, D), their `mean` (D,), and `logits` (L, 20)."""
        _, arrays = self.ask_arrays(do="outputs", sequences=list(batch))
        rows = [arrays[f"rows{i}"] for i in range(len(batch))]
        return [{"rows": r, "mean": r.mean(axis=0), "logits": arrays[f"logits{i}"]} for i, r in enumerate(rows)]

    def cpu_seconds(self) -> float:
        """Processor time that the process has used; 0 where that is not known."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
