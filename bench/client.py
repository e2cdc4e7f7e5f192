"""The driver's end: starts a worker in the engine's environment, asks it one thing at a time, and gives up in time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .engines import ROOT, Engine

LOAD_TIMEOUT = 300.0  # a cold cache of compiled code, a slow disk
RUN_TIMEOUT = 600.0


class EngineFailed(Exception):
    """An engine that cannot be installed, opened or run, with the reason."""


def thread_environment(threads: int) -> dict[str, str]:
    """The same number of threads, said in every library's own way."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "NUMPYESM_THREADS",
        "ESM_NUM_THREADS",
    )
    return {name: str(threads) for name in names}


def child_environment(threads: int) -> dict[str, str]:
    """Environment variables of every process that is measured."""
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    return os.environ | quiet | thread_environment(threads)


def load_request(engine: Engine, folder: Path, threads: int) -> dict[str, Any]:
    """What tells a worker which engine it is."""
    return {
        "do": "load",
        "family": engine.family,
        "backend": engine.backend,
        "precision": engine.precision,
        "path": str(folder / engine.file),
        "threads": threads,
    }


class Worker:
    """A running engine.

    Raises
    ------
    EngineFailed
        From every method, with the reason; the process is gone then.
    """

    def __init__(self, engine: Engine, python: Path, threads: int, log: Path) -> None:
        self.engine = engine
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
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, timeout: float = RUN_TIMEOUT, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise EngineFailed(f"no answer in {timeout:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            self.close()
            raise EngineFailed(f"the process ended: {last_line(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def cpu_seconds(self) -> float:
        """Processor time that the process has used, 0 where it cannot be told."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, IndexError, ValueError):
            return 0.0

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self._lines.put(line)
        except ValueError:  # closed
            pass
        self._lines.put("")


def start_all(
    engines: list[Engine],
    start: Callable[[Engine], Worker],
    folder: Path,
    threads: int,
    sabotage: str | None = None,
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Start and load every engine, one after the other.

    Returns
    -------
    workers, loaded, missing
        By name: the running ones, what they said (seconds, versions), and the reason for each that cannot run.
    """
    workers: dict[str, Worker] = {}
    loaded: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for engine in engines:
        worker = start(engine)
        request = load_request(engine, folder, threads)
        try:
            loaded[engine.name] = worker.ask(LOAD_TIMEOUT, **request, sabotage=0.05 if sabotage == engine.name else 0.0)
            workers[engine.name] = worker
        except EngineFailed as failure:
            worker.close()
            missing[engine.name] = str(failure)
    return workers, loaded, missing


def last_line(log: Path) -> str:
    """The last thing a process said on stderr."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "without a word"
