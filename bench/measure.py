"""Rounds: for each repeat, for each workload, every engine runs once in turn, and only one is busy at a time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from .client import EngineFailed, Worker

# Thread pools of the engine that ran last spin for some milliseconds before they sleep.
SETTLE_SECONDS = 0.1
# In each turn, several shorter runs follow one that is not timed: the caches hold what another engine left there.
SHORT_SECONDS, SHORT_RUNS = 1.0, 5


@dataclass(frozen=True)
class Limits:
    """How long one cell (an engine at a workload) may take.

    The first run is thrown away as warm-up if it is shorter than `warm_up_seconds`. A cell whose single run is expected
    to take longer than `skip_seconds` is left out by name, except numpyesm's; for `mean` embeddings alone, a fifth of
    that is the limit.
    """

    repeats: int  # turns with timed runs at most
    cell_seconds: float  # a cell gets no more runs once they have taken this long
    warm_up_seconds: float
    skip_seconds: float


@dataclass
class Cell:
    """Samples of one engine at one workload."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | ({"median": median(self.seconds), "best": min(self.seconds)} if self.seconds else {})


class Rounds:
    """The interleaved measurement. Engines in `ours` are also timed computing `mean` embeddings alone."""

    def __init__(
        self,
        workers: Mapping[str, Worker],
        workloads: dict[str, list[str]],
        limits: Limits,
        ours: Set[str] = frozenset(),
    ) -> None:
        self.workers, self.workloads, self.limits, self.ours = workers, workloads, limits, ours
        self.lanes = [(name, "all") for name in workers] + [(name, "mean") for name in workers if name in ours]
        self.cells = {lane: {workload: Cell() for workload in workloads} for lane in self.lanes}
        self.failed: dict[str, str] = {}
        self.other_load = 0.0

    def run(self) -> dict[str, dict[str, Any]]:
        """Run all rounds. Returns `{lane: {workload: cell}}`, a lane being `engine` or `engine:mean`."""
        busy, own, start = machine_busy_seconds(), self._own_seconds(), time.perf_counter()
        for name in self.workers:
            for workload, batch in self.workloads.items():
                self._ask(name, do="workload", name=workload, sequences=batch)
        for repeat in range(self.limits.repeats):
            for position, workload in enumerate(self.workloads):
                # Nobody always runs after the same neighbour or first on a cool processor.
                shift = (repeat * 3 + position) % len(self.lanes)
                for lane in self.lanes[shift:] + self.lanes[:shift]:
                    self._turn(lane, workload)
            print(f"round {repeat + 1} of {self.limits.repeats} done", file=sys.stderr, flush=True)
        others = (machine_busy_seconds() - busy) - (self._own_seconds() - own)
        self.other_load = max(0.0, others) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        return {
            name if outputs == "all" else f"{name}:{outputs}": {w: cell.to_json() for w, cell in cells.items()}
            for (name, outputs), cells in self.cells.items()
        }

    def _turn(self, lane: tuple[str, str], workload: str) -> None:
        """Time one run of one cell, after one that warms up if it is short."""
        name, outputs = lane
        cell, limits = self.cells[lane][workload], self.limits
        if name in self.failed or cell.note or sum(cell.seconds) >= limits.cell_seconds:
            return
        if not cell.seconds:
            limit = limits.skip_seconds if outputs == "all" else limits.skip_seconds / 5
            expected = self._expected_seconds(lane, workload)
            if expected > limit and not (outputs == "all" and name in self.ours):
                cell.note = f"left out: would take about {expected:.0f} s per run (see --full)"
            elif self._time(lane, workload) < limits.warm_up_seconds:
                cell.seconds.clear()
                self._time(lane, workload)
            return
        if short := cell.seconds[0] < SHORT_SECONDS:
            self._ask(name, do="run", name=workload, outputs=outputs)
        for _ in range(SHORT_RUNS if short else 1):
            self._time(lane, workload)

    def _expected_seconds(self, lane: tuple[str, str], workload: str) -> float:
        """Estimate from the lowest rate so far of workloads with many sequences; 0 if there is none yet."""
        sizes = {name: sum(map(len, batch)) for name, batch in self.workloads.items() if len(batch) > 1}
        rates = [sizes[w] / cell.seconds[0] for w, cell in self.cells[lane].items() if cell.seconds and w in sizes]
        return sizes[workload] / min(rates) if rates and workload in sizes else 0.0

    def _time(self, lane: tuple[str, str], workload: str) -> float:
        """Add a sample to a cell. Returns its seconds, or infinity if the engine failed."""
        time.sleep(SETTLE_SECONDS)
        answer = self._ask(lane[0], do="run", name=workload, outputs=lane[1])
        cell = self.cells[lane][workload]
        if answer is None:
            cell.note = self.failed[lane[0]]
            return float("inf")
        cell.peak_mb = answer["peak_mb"]
        cell.seconds.append(answer["seconds"])
        return cell.seconds[-1]

    def _ask(self, engine: str, /, **request: Any) -> dict[str, Any] | None:
        if engine in self.failed:
            return None
        try:
            return self.workers[engine].ask(**request)
        except EngineFailed as failure:
            self.failed[engine] = str(failure)
            print(f"{engine}: {failure}", file=sys.stderr, flush=True)
            return None

    def _own_seconds(self) -> float:
        return sum(worker.cpu_seconds() for worker in self.workers.values())


def machine_busy_seconds() -> float:
    """Processor seconds that all processes together have used since boot; 0 where that is not known."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0
