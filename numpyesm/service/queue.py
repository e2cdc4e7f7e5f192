"""Waiting jobs, served so that no client crowds out the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .jobs import Job, Part


class FairQueue:
    """Jobs by client.

    The next sequence is always one of the client that has been given the fewest rows so far: a client with a thousand
    long sequences and one with a single short one get the engine in turn. Within a client it is first come first
    served, but after each pass of a job that needs several, jobs that need only one go first.
    """

    def __init__(self) -> None:
        self._by_client: dict[str, deque[Job]] = {}
        self._given: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._by_client.values() for job in jobs)

    def count(self, client: str) -> int:
        """Jobs of one client."""
        return len(self._by_client.get(client, ()))

    def put(self, job: Job) -> None:
        """Append a job."""
        if job.client not in self._by_client:
            # A new or returning client starts at the current minimum, so idling earns no credit and reconnecting
            # clears no debt.
            self._given[job.client] = min(self._given.values(), default=0.0)
            self._by_client[job.client] = deque()
        self._by_client[job.client].append(job)

    def remove(self, job: Job) -> None:
        """Take a job out, if it is in."""
        jobs = self._by_client.get(job.client)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        if not jobs:
            del self._by_client[job.client], self._given[job.client]

    def take(self, max_rows: int, admit: Callable[[Job], bool]) -> list[Part]:
        """Take sequences for one pass: of one group, at most `max_rows` rows or a single sequence.

        Parameters
        ----------
        max_rows : int
        admit : callable
            Whether there is memory for a job's results.
        """
        taken: list[Part] = []
        rows = 0
        waiting = dict.fromkeys(self._by_client)  # ordered: equals are served as they came
        while waiting:
            client = min(waiting, key=self._given.__getitem__)
            job = self._next(client, taken[0][0] if taken else None, max_rows - rows, admit)
            if job is None:
                waiting.pop(client)
                continue
            taken.append((job, job.taken))
            rows += job.rows[job.taken]
            self._given[client] += job.rows[job.taken]
            job.taken += 1
            if job.all_taken:
                self.remove(job)
                if client not in self._by_client:
                    waiting.pop(client)
        for client in {job.client for job, _ in taken if not job.all_taken}:
            self._let_short_jobs_pass(client, max_rows)
        return taken

    def _let_short_jobs_pass(self, client: str, max_rows: int) -> None:
        jobs = self._by_client[client]
        self._by_client[client] = deque(sorted(jobs, key=lambda job: job.taken > 0 or sum(job.rows) > max_rows))

    def _next(self, client: str, like: Job | None, rows_left: int, admit: Callable[[Job], bool]) -> Job | None:
        """The client's first job that can join the pass."""
        for job in self._by_client[client]:
            if like is not None and (job.group != like.group or job.rows[job.taken] > rows_left):
                continue
            if admit(job):
                return job
        return None
