"""What takes a fresh process for every sample: cold start, contact maps, the cost of `import numpyesm`."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from .agreement import compare_contacts
from .client import EngineFailed, child_environment, load_request
from .engines import REFERENCE, ROOT, Engine, Environments
from .measure import SETTLE_SECONDS

TIMEOUT = 300.0


def cold_start(
    engines: list[Engine], environments: Environments, folder: Path, threads: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """From starting Python to the first embedding of 100 residues, and the peak memory of that process.

    The engines have run before in this benchmark: files are in memory, compiled code is in its cache.
    """
    found: dict[str, dict[str, Any]] = {engine.name: {"seconds": [], "peak_mb": []} for engine in engines}
    for _ in range(repeats):
        for engine in engines:
            cell = found[engine.name]
            if "missing" in cell:
                continue
            request = load_request(engine, folder, threads) | {"what": "first"}
            try:
                seconds, answer = _once(environments.python(engine), request, threads)
            except EngineFailed as failure:
                cell["missing"] = str(failure)
                continue
            cell["seconds"].append(seconds)
            cell["peak_mb"].append(answer["peak_mb"])
    return {name: cell | _summary(cell) for name, cell in found.items()}


def contact_maps(
    engines: list[Engine],
    environments: Environments,
    folder: Path,
    threads: int,
    lengths: tuple[int, ...],
    repeats: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Time of one contact map in a warm process, and the peak memory of that process: `{engine: {length: cell}}`."""
    found: dict[str, dict[str, dict[str, Any]]] = {
        engine.name: {str(length): {"seconds": [], "peak_mb": []} for length in lengths} for engine in engines
    }
    samples: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(repeats):
        for length in lengths:
            for engine in engines:
                cell = found[engine.name][str(length)]
                if "missing" in cell:
                    continue
                request = load_request(engine, folder, threads) | {"what": "contacts", "length": length}
                try:
                    _, answer = _once(environments.python(engine), request, threads)
                except EngineFailed as failure:
                    cell["missing"] = str(failure)
                    continue
                cell["seconds"].append(answer["seconds"])
                cell["peak_mb"].append(answer["peak_mb"])
                samples[engine.name, length] = answer["sample"]
    by_name = {engine.name: engine for engine in engines}
    for (name, length), sample in samples.items():
        reference = samples.get((REFERENCE, length))
        if reference is not None:
            verdict = compare_contacts(sample, reference, by_name[name].precision)
            found[name][str(length)]["agreement"] = verdict
    return {name: {length: cell | _summary(cell) for length, cell in cells.items()} for name, cells in found.items()}


def import_cost(python: Path, repeats: int) -> dict[str, Any]:
    """Seconds of `python -c 'import numpyesm'` above `import numpy`, each a fresh process, taken in turn."""
    samples: dict[str, list[float]] = {"numpy": [], "numpyesm": []}
    for repeat in range(repeats + 1):
        for module, seconds in samples.items():
            start = time.perf_counter()
            subprocess.run([str(python), "-c", f"import {module}"], cwd=ROOT, env=child_environment(1), check=True)
            if repeat:  # the first pair writes byte code and fills the file cache
                seconds.append(time.perf_counter() - start)
    extra = median(samples["numpyesm"]) - median(samples["numpy"])
    return {"samples": samples, "extra_seconds": extra, "extra_best": min(samples["numpyesm"]) - min(samples["numpy"])}


def _once(python: Path, request: dict[str, Any], threads: int) -> tuple[float, dict[str, Any]]:
    """Seconds from starting the process to its answer, and the answer."""
    time.sleep(SETTLE_SECONDS)
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(python), "-m", "bench.once", json.dumps(request)],
            cwd=ROOT,
            env=child_environment(threads),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        # The clock stops at the answer: how long the interpreter takes to end is not part of it.
        watchdog = threading.Timer(TIMEOUT, process.kill)
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.communicate()
        watchdog.cancel()
        if not line:
            if seconds >= TIMEOUT:
                raise EngineFailed(f"no answer in {TIMEOUT:.0f} s")
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise EngineFailed(said[-1][:300] if said else f"ended with exit code {process.returncode}")
    answer: dict[str, Any] = json.loads(line)
    return seconds, answer


def _summary(cell: dict[str, Any]) -> dict[str, float]:
    if not cell["seconds"]:
        return {}
    return {"median": median(cell["seconds"]), "best": min(cell["seconds"]), "median_peak_mb": median(cell["peak_mb"])}
