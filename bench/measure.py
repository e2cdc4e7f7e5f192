"""Rounds: for each repeat, for each workload, every engine in turn runs once, and only one is busy at a time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .client import EngineFailed, Worker

# Thread pools of the engine that ran last spin for some milliseconds before they sleep.
SETTLE_SECONDS = 0.05
# A shorter run is preceded by one that is not timed, each time: the caches hold what another engine left there.
REWARM_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """How long one cell (an engine at a workload) may take.

    Attributes
    ----------
    repeats : int
        Timed runs at most.
    cell_seconds : float
        Once its timed runs have taken this long, a cell gets no more of them.
    warm_up_seconds : float
        The first run is thrown away as warm-up if it is shorter than this; otherwise it counts.
    skip_seconds : float
        A cell whose single run is expected to take longer is left out by name; the reference and numpyesm never are.
    variant_skip_seconds : float
        The same for variants (`mean`), of any engine.
    """

    repeats: int
    cell_seconds: float
    warm_up_seconds: float
    skip_seconds: float
    variant_skip_seconds: float = 5


@dataclass
class Cell:
    """Samples of one engine at one workload."""

    seconds: list[float] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    other_load: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        summary = {"median": median(self.seconds), "best": min(self.seconds)} if self.seconds else {}
        return asdict(self) | summary


class Rounds:
    """The interleaved measurement.

    Parameters
    ----------
    workers : dict of str to Worker
        Running engines by name.
    workloads : dict of str to list of str
    limits : Limits
    variants : mapping of str to sequence of str
        Variants to time besides `all`, by engine: `mean` for numpyesm.
    always : set of str
        Engines that are never left out for being slow.
    """

    def __init__(
        self,
        workers: dict[str, Worker],
        workloads: dict[str, list[str]],
        limits: Limits,
        variants: Mapping[str, Sequence[str]] | None = None,
        always: frozenset[str] = frozenset(),
    ) -> None:
        self.workers = workers
        self.workloads = workloads
        self.limits = limits
        self.always = always
        self.lanes = [(name, "all") for name in workers]
        self.lanes += [(name, variant) for name, more in (variants or {}).items() for variant in more]
        self.cells = {lane: {workload: Cell() for workload in workloads} for lane in self.lanes}
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        """All rounds; returns `{lane: {workload: cell}}`, a lane being `engine` or `engine:variant`."""
        for name, worker in self.workers.items():
            for workload, batch in self.workloads.items():
                self._ask(name, worker, do="workload", name=workload, sequences=batch)
        for repeat in range(self.limits.repeats):
            for position, workload in enumerate(self.workloads):
                # Nobody always runs after the same neighbour or first on a cool processor.
                shift = (repeat * 3 + position) % len(self.lanes)
                for lane in self.lanes[shift:] + self.lanes[:shift]:
                    self._turn(lane, workload)
            print(f"round {repeat + 1} of {self.limits.repeats} done", file=sys.stderr, flush=True)
        return {
            name if variant == "all" else f"{name}:{variant}": {w: c.to_json() for w, c in cells.items()}
            for (name, variant), cells in self.cells.items()
        }

    def _turn(self, lane: tuple[str, str], workload: str) -> None:
        """One timed run of one cell, after one that warms up if it is short."""
        name, variant = lane
        cell, limits = self.cells[lane][workload], self.limits
        if name in self.failed or cell.note:
            return
        if not cell.seconds and not cell.warm_up:
            expected = self._expect(lane, workload)
            never = variant == "all" and name in self.always
            if not never and expected > (limits.skip_seconds if variant == "all" else limits.variant_skip_seconds):
                cell.note = f"left out: would take about {expected:.0f} s a run (see --full)"
                return
            seconds = self._time(name, variant, workload, cell)
            if seconds is None:
                return
            if seconds >= limits.warm_up_seconds:
                cell.seconds.append(seconds)
                return
            cell.warm_up.append(seconds)
            cell.other_load.clear()
        elif sum(cell.seconds) < limits.cell_seconds and cell.seconds[0] < REWARM_SECONDS:
            self._ask(name, self.workers[name], do="run", name=workload, outputs=variant)
        if sum(cell.seconds) >= limits.cell_seconds:
            return
        seconds = self._time(name, variant, workload, cell)
        if seconds is not None:
            cell.seconds.append(seconds)

    def _expect(self, lane: tuple[str, str], workload: str) -> float:
        """Seconds from the slowest rate, in residues a second, of what this lane has run so far; 0 if nothing yet."""
        size = sum(map(len, self.workloads[workload]))
        rates = [
            sum(map(len, self.workloads[other])) / cell.seconds[0]
            for other, cell in self.cells[lane].items()
            # Many short sequences: one long sequence says little about them.
            if cell.seconds and len(self.workloads[other]) > 1
        ]
        return size / min(rates) if rates and len(self.workloads[workload]) > 1 else 0.0

    def _time(self, name: str, variant: str, workload: str, cell: Cell) -> float | None:
        worker = self.workers[name]
        time.sleep(SETTLE_SECONDS)
        busy, own, start = machine_busy_seconds(), worker.cpu_seconds(), time.perf_counter()
        answer = self._ask(name, worker, do="run", name=workload, outputs=variant)
        if answer is None:
            cell.note = self.failed[name]
            return None
        elapsed = time.perf_counter() - start
        other = (machine_busy_seconds() - busy) - (worker.cpu_seconds() - own)
        cell.other_load.append(max(0.0, other) / elapsed / (os.cpu_count() or 1))
        cell.peak_mb = answer["peak_mb"]
        return float(answer["seconds"])

    def _ask(self, engine: str, worker: Worker, **request: Any) -> dict[str, Any] | None:
        if engine in self.failed:
            return None
        try:
            return worker.ask(**request)
        except EngineFailed as failure:
            self.failed[engine] = str(failure)
            print(f"{engine}: {failure}", file=sys.stderr, flush=True)
            return None


def machine_busy_seconds() -> float:
    """Processor seconds that all processes together have used since boot; 0 where it cannot be told."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def mean_other_load(cells: dict[str, dict[str, Any]]) -> float:
    """Share of the machine that other processes took during the timed runs, weighted by their length."""
    pairs = [
        (seconds, load)
        for lane in cells.values()
        for cell in lane.values()
        for seconds, load in zip(cell["seconds"], cell["other_load"], strict=False)
    ]
    total = sum(seconds for seconds, _ in pairs)
    return sum(seconds * load for seconds, load in pairs) / total if total else 0.0
