"""Waiting jobs, bounded, taken so that no client crowds out the others. Its user holds a lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from .jobs import Job


class QueueFull(Exception):
    """No place; `mine` if the client's own share is what is full."""

    def __init__(self, mine: bool) -> None:
        super().__init__()
        self.mine = mine


class FairQueue:
    """Jobs by client; within a client first come first served, but one of many passes lets short ones through.

    The next sequence is always one of the client that has been given the fewest rows so far, so that a client with a
    thousand long sequences and one with a single short one get the engine in turn.
    """

    def __init__(self, size: int, client_limit: int) -> None:
        self._size = size
        self._client_limit = client_limit
        self._by_client: dict[str, deque[Job]] = {}
        self._given: dict[str, float] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Job]:
        return (job for jobs in self._by_client.values() for job in jobs)

    def check_room(self, client: str) -> None:
        """QueueFull if a job of `client` would not be taken."""
        if len(self._by_client.get(client, ())) >= self._client_limit:
            raise QueueFull(mine=True)
        if self._length >= self._size:
            raise QueueFull(mine=False)

    def put(self, job: Job) -> None:
        """Append, or QueueFull."""
        self.check_room(job.client)
        if job.client not in self._by_client:
            # Who comes (back) starts level with the others: waiting earns no credit, leaving clears no debt.
            self._given[job.client] = min(self._given.values(), default=0.0)
            self._by_client[job.client] = deque()
        self._by_client[job.client].append(job)
        self._length += 1

    def remove(self, job: Job) -> None:
        """Take a job out, if it is in."""
        jobs = self._by_client.get(job.client)
        if jobs is None or job not in jobs:
            return
        jobs.remove(job)
        self._length -= 1
        if not jobs:
            del self._by_client[job.client], self._given[job.client]

    def take(self, max_rows: int, may_start: Callable[[Job], bool]) -> list[tuple[Job, int]]:
        """Sequences for one pass: of one group, at most `max_rows` rows or a single sequence.

        Parameters
        ----------
        max_rows : int
        may_start : callable
            Whether a job that has not begun may, for its memory.
        """
        taken: list[tuple[Job, int]] = []
        rows = 0
        waiting = dict.fromkeys(self._by_client)  # in order: equals are served as they came
        while waiting:
            client = min(waiting, key=self._given.__getitem__)
            job = self._next(client, taken[0][0] if taken else None, max_rows - rows, may_start)
            if job is None:
                waiting.pop(client, None)
                continue
            taken.append((job, job.taken))
            rows += job.rows[job.taken]
            self._given[client] += job.rows[job.taken]
            job.taken += 1
            if job.all_taken:
                self.remove(job)
                if client not in self._by_client:
                    waiting.pop(client, None)
        for client in {job.client for job, _ in taken if not job.all_taken}:
            self._let_short_ones_pass(client, max_rows)
        return taken

    def _let_short_ones_pass(self, client: str, max_rows: int) -> None:
        """A job of several passes has had one: those that wait now and need one only come before its next."""
        jobs = self._by_client[client]
        self._by_client[client] = deque(sorted(jobs, key=lambda job: job.taken > 0 or sum(job.rows) > max_rows))

    def _next(self, client: str, like: Job | None, room: int, may_start: Callable[[Job], bool]) -> Job | None:
        """The client's first job that can join the pass."""
        for job in self._by_client[client]:
            if like is not None and (job.work.group != like.work.group or job.rows[job.taken] > room):
                continue
            if job.holds_memory or may_start(job):
                return job
        return None
