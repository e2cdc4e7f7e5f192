"""What takes a fresh process per sample: cold start, contact maps, mutation scans, `import numpyesm`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from .client import Bench, EngineFailed, run_python
from .engines import REFERENCE, Engine
from .measure import SETTLE_SECONDS
from .workloads import random_sequence

Cells = dict[str, dict[str, Any]]


def cold_start(bench: Bench, engines: Sequence[Engine], repeats: int) -> Cells:
    """Seconds from starting Python to the first embedding of 100 residues, and the peak memory of that process.

    Files are in memory and compiled code is in its cache: the first sample of each engine is thrown away.
    """
    cells: Cells = {engine.name: {"seconds": [], "peak_mb": []} for engine in engines}
    for repeat in range(repeats + 1):
        for engine in engines:
            cell = cells[engine.name]
            if "missing" in cell:
                continue
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            worker = bench.start(engine)
            try:
                worker.ask(**bench.load_request(engine))
                worker.ask(do="workload", name="first", sequences=[random_sequence(100, 1)])
                answer = worker.ask(do="run", name="first", outputs="mean")
                seconds = time.perf_counter() - start
            except EngineFailed as failure:
                cell["missing"] = str(failure)
                continue
            finally:
                worker.close()
            if repeat:
                cell["seconds"].append(seconds)
                cell["peak_mb"].append(answer["peak_mb"])
    return {name: cell | _summary(cell) for name, cell in cells.items()}


def in_fresh_processes(bench: Bench, engines: Sequence[Engine], do: str, sequence: str, repeats: int) -> Cells:
    """Time `contacts` or `scan` of one sequence in a warm process, and take that process's peak memory.

    Each engine's cell has its largest difference from the reference too.
    """
    cells: Cells = {engine.name: {"seconds": [], "peak_mb": []} for engine in engines}
    values: dict[str, npt.NDArray[Any]] = {}
    for _ in range(repeats):
        for engine in engines:
            try:
                with bench.opened(engine) as worker:
                    worker.ask_arrays(do=do, sequence=sequence[:20])  # what is compiled or allocated once
                    time.sleep(SETTLE_SECONDS)
                    answer, arrays = worker.ask_arrays(do=do, sequence=sequence)
            except EngineFailed as failure:
                cells[engine.name]["missing"] = str(failure)
                continue
            cells[engine.name]["seconds"].append(answer["seconds"])
            cells[engine.name]["peak_mb"].append(answer["peak_mb"])
            values[engine.name] = arrays["values"]
    for name in values:
        cells[name] |= _summary(cells[name])
        if REFERENCE in values:
            cells[name]["max_difference"] = float(np.abs(values[name] - values[REFERENCE]).max())
    return cells


def import_cost(python: Path, repeats: int) -> dict[str, Any]:
    """Seconds of `import numpyesm` above `import numpy`, each in a fresh process, taken in turn."""
    samples: dict[str, list[float]] = {"numpy": [], "numpyesm": []}
    for repeat in range(repeats + 1):
        for module, seconds in samples.items():
            start = time.perf_counter()
            run_python(python, 1, "-c", f"import {module}").check_returncode()
            if repeat:  # the first pair writes byte code and fills the file cache
                seconds.append(time.perf_counter() - start)
    extra = median(samples["numpyesm"]) - median(samples["numpy"])
    return {"samples": samples, "extra_seconds": extra}


def _summary(cell: dict[str, Any]) -> dict[str, float]:
    if not cell["seconds"]:
        return {}
    return {"median": median(cell["seconds"]), "best": min(cell["seconds"]), "median_peak_mb": median(cell["peak_mb"])}
