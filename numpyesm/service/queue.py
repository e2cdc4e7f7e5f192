"""Requests waiting for the engine, served so that no client crowds out the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..api.requests import Work
from ..formats import Result


@dataclass(eq=False)
class Job:
    """Work of one client, and where its results go.

    Attributes
    ----------
    memory : int
        Bytes of its results.
    done : Future
        Resolved when the results are complete, or with an ApiError.
    taken : int
        How many sequences the engine has taken so far, in order.
    released : bool
        The results are sent, or no one is waiting for them.
    rows : list of int
        Rows that each sequence takes in a pass.
    group : Work
        Jobs may share a pass if these are equal.
    """

    work: Work
    client: str
    memory: int
    done: asyncio.Future[None]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    computed: float | None = None
    taken: int = 0
    released: bool = False
    holds_memory: bool = False
    results: list[Result] = field(default_factory=list)
    rows: list[int] = field(init=False)
    group: Work = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [length + 2 for length in self.work.lengths]
        self.group = replace(self.work, tokens=())

    @property
    def all_taken(self) -> bool:
        """Whether the engine has taken every sequence."""
        return self.taken == len(self.rows)

    def times(self) -> dict[str, float]:
        """Milliseconds spent in the queue and in the engine, as far as known."""
        spans = {"queue_ms": (self.arrived, self.started), "compute_ms": (self.started, self.computed)}
        return {name: round((end - start) * 1e3, 2) for name, (start, end) in spans.items() if start and end}


# A job, and the index of one of its sequences.
Part: TypeAlias = tuple[Job, int]


class FairQueue:
    """Jobs of all clients.

    The next sequence is always one of the client that has been given the fewest rows so far: a client with a thousand
    long sequences and one with a single short one take turns. Each client's jobs are served first come, first served;
    but after each pass of a job that needs several, jobs that need only one go first.
    """

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._given: dict[str, int] = {}  # rows so far, of clients that have jobs here

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def count(self, client: str) -> int:
        """Jobs of one client."""
        return sum(job.client == client for job in self._jobs)

    def put(self, job: Job) -> None:
        """Append a job."""
        # A new or returning client starts at the current minimum, so idling earns no credit and reconnecting clears no
        # debt.
        self._given.setdefault(job.client, min(self._given.values(), default=0))
        self._jobs.append(job)

    def remove(self, job: Job) -> None:
        """Remove a job, if it is there."""
        if job in self._jobs:
            self._jobs.remove(job)
            if not self.count(job.client):
                del self._given[job.client]

    def take(self, max_rows: int, admit: Callable[[Job], bool]) -> list[Part]:
        """Take sequences for one pass: of one group, at most `max_rows` rows or a single sequence.

        Parameters
        ----------
        max_rows : int
        admit : callable
            Whether there is memory for a job's results.
        """
        waiting: dict[str, list[Job]] = {}  # ordered: clients with equal shares are served as they came
        for one in self._jobs:
            waiting.setdefault(one.client, []).append(one)
        taken: list[Part] = []
        rows_left = max_rows

        def may_join(job: Job) -> bool:
            fits = not taken or (job.group == taken[0][0].group and job.rows[job.taken] <= rows_left)
            return fits and admit(job)

        while waiting:
            client = min(waiting, key=self._given.__getitem__)
            job = next(filter(may_join, waiting[client]), None)
            if job is None:
                del waiting[client]
                continue
            taken.append((job, job.taken))
            rows_left -= job.rows[job.taken]
            self._given[client] += job.rows[job.taken]
            job.taken += 1
            if job.all_taken:
                self.remove(job)
                waiting[client].remove(job)
                if not waiting[client]:
                    del waiting[client]
        unfinished = {job.client for job, _ in taken if not job.all_taken}
        self._jobs.sort(key=lambda job: job.client in unfinished and (job.taken > 0 or sum(job.rows) > max_rows))
        return taken
