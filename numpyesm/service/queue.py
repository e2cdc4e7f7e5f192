"""Which request is next: no client crowds out the others, and results and passes fit the memory."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from .. import memory
from ..api.errors import ApiError
from ..api.requests import Work
from ..formats import Result

# Pieces of answers as text, the same compressed and in the sockets' buffers (less than a megabyte for each client that
# is slow to read), and Python's own needs.
_SENDING = 16 << 20
# Python's objects of one item.
_PER_ITEM = 4096
# Jobs smaller than this share of the limit may overtake one that waits for memory.
_SMALL_SHARE = 0.01


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

    @cached_property
    def rows(self) -> list[int]:
        """Rows that each sequence takes in a pass."""
        return [len(tokens) for tokens in self.work.tokens]

    @cached_property
    def group(self) -> Work:
        """Jobs may share a pass if these are equal."""
        return replace(self.work, tokens=())

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

        `admit` says whether there is memory for a job's results.
        """
        taken: list[Part] = []
        rows_left = max_rows

        def may_join(job: Job) -> bool:
            fits = not taken or (job.group == taken[0][0].group and job.rows[job.taken] <= rows_left)
            return fits and admit(job)

        # With their places: clients with equal shares are served as they came.
        candidates = [(self._given[job.client], place, job) for place, job in enumerate(self._jobs)]
        heapq.heapify(candidates)
        while candidates:
            given, place, job = heapq.heappop(candidates)
            if given < self._given[job.client]:  # another job of this client was taken since
                heapq.heappush(candidates, (self._given[job.client], place, job))
                continue
            if not may_join(job):  # now or later: room only shrinks during a pass
                continue
            taken.append((job, job.taken))
            rows_left -= job.rows[job.taken]
            self._given[job.client] += job.rows[job.taken]
            job.taken += 1
            if job.all_taken:
                self.remove(job)
            else:
                heapq.heappush(candidates, (self._given[job.client], place, job))
        unfinished = {job.client for job, _ in taken if not job.all_taken}
        self._jobs.sort(key=lambda job: job.client in unfinished and (job.taken > 0 or sum(job.rows) > max_rows))
        return taken


def result_bytes(work: Work) -> int:
    """Memory of the results, in bytes; they are kept until the answer is sent."""
    tokens = 16 * sum(work.lengths) if work.action == "predict" else 0  # a list of shared strings
    return _PER_ITEM * len(work.tokens) + 4 * work.count_numbers() + tokens


class Admission:
    """The memory that all jobs share: the limit, minus what the idle process takes.

    Attributes
    ----------
    limit, idle, held : int
        Bytes: of the whole process, of the process without requests, of results being computed or sent.
    """

    def __init__(self, limit: int, pass_rows: int) -> None:
        # What `ulimit -v` leaves is known only once the models are loaded.
        self.limit = min(limit, memory.memory_limit() or limit)
        self.idle = memory.resident_memory()
        self.held = 0
        self._pass_rows = pass_rows
        self._starved: Job | None = None

    def need(self, work: Work) -> int:
        """Memory of the whole process while this is its only request, in bytes."""
        model, longest = work.served.model, max(work.lengths) + 2
        wanted = work.outputs.include or ("logits",)
        one_pass = memory.pass_bytes(model.config, max(self._pass_rows, longest), longest, wanted, model.threads)
        return self.idle + _SENDING + one_pass + result_bytes(work)

    def check(self, work: Work) -> int:
        """Return the bytes of the results, or raise ApiError 413 if the request can never fit."""
        need = self.need(work)
        if need > self.limit:
            raise ApiError(
                413,
                f"this request would take about {need / 2**30:.2f} GiB of memory, and the limit of this service is "
                f"{self.limit / 2**30:.2f} GiB; ask for fewer or shorter items, fewer layers or fewer outputs",
                code="user.memory",
            )
        return result_bytes(work)

    def admit(self, job: Job) -> bool:
        """Reserve memory for a job's results, if there is enough."""
        if job.holds_memory:
            return True
        if self._starved not in (None, job) and job.memory > _SMALL_SHARE * self.limit:
            return False  # large jobs do not overtake one that waits for memory
        # A single job may always start: whether it fits at all was checked when it arrived.
        if self.held and self.held + self.need(job.work) > self.limit:
            self._starved = self._starved or job
            return False
        if self._starved is job:
            self._starved = None
        job.holds_memory = True
        self.held += job.memory
        return True

    def release(self, job: Job) -> None:
        """Free the memory that a job holds, and its claim to be next."""
        if job.holds_memory:
            job.holds_memory = False
            job.results = []
            self.held -= job.memory
        if self._starved is job:
            self._starved = None
