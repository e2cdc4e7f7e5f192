"""One task takes waiting jobs, pass by pass, and one thread computes them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ..api.catalog import Catalog
from ..api.errors import ApiError, as_api_error, unavailable
from ..api.requests import Work, check_request
from ..errors import InvalidOption
from ..formats import Result
from ..memory import format_memory
from ..options import INCLUDES, missing_head
from .queue import Admission, FairQueue, Job, Part
from .settings import Settings

log = logging.getLogger("numpyesm.service")

# Rows of one pass (eight sequences of 256, or one of 2048). More would hardly be faster, and would keep the next
# client waiting longer.
PASS_ROWS = 2112
# Share of the queue that one client (API key, or address) may fill.
_CLIENT_SHARE = 0.75


class Engine:
    """Runs jobs in a fair order; its methods are called from the event loop.

    Each model is run once, so that the first request does not wait for compilation.

    Parameters
    ----------
    catalog : Catalog
    settings : Settings
    on_pass : callable (slug, sequences, rows, seconds)
        Called after every pass.

    Attributes
    ----------
    draining : bool
        No new jobs are accepted; accepted ones finish.
    admission : Admission

    Raises
    ------
    InvalidOption
        The memory limit leaves no room for any request.
    """

    def __init__(self, catalog: Catalog, settings: Settings, on_pass: Callable[[str, int, int, float], None]) -> None:
        self._settings = settings
        self._on_pass = on_pass
        self._queue = FairQueue()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._running: list[Job] = []
        self._rows_per_second = 1000.0
        self.draining = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="numpyesm-engine")
        self._thread.submit(_warm_up, catalog).result()
        self.admission = Admission(settings.max_memory, PASS_ROWS)
        for served in catalog:
            shortest = check_request(served, "encode", {"items": [{"sequence": "M"}]})
            if (need := self.admission.need(shortest)) > self.admission.limit:
                raise InvalidOption(
                    f"a memory limit of {format_memory(self.admission.limit)} (--max-memory, or ulimit -v) leaves "
                    f"no room for requests to {served.slug}: the process takes {format_memory(self.admission.idle)} "
                    f"when idle, and about {format_memory(need)} with the smallest request"
                )

    def start(self) -> None:
        """Start serving in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """Fail all jobs, and wait for the current pass."""
        self.abandon()
        if self._task is not None:
            self._task.cancel()
        await asyncio.to_thread(self._thread.shutdown)

    def abandon(self) -> None:
        """Fail all jobs, running ones too: clients are told now, and the current pass is discarded."""
        self.draining = True
        for job in [*self._queue, *self._running]:
            self._fail(job, unavailable("draining", "the service is shutting down"))

    @property
    def waiting(self) -> int:
        """Number of jobs with sequences still waiting."""
        return len(self._queue)

    # -- for requests ---------------------------------------------------------------------------------------------

    def check_alive(self) -> None:
        """Raise ApiError 503 if jobs are not being served."""
        if self._task is None or self._task.done():
            raise unavailable("not_ready", "the engine has stopped")

    def check_accepting(self) -> None:
        """Raise ApiError 503 if no new jobs are accepted."""
        self.check_alive()
        if self.draining:
            raise unavailable("draining", "the service is shutting down")

    def check_place(self, client: str) -> None:
        """Raise ApiError 503 or 429 if a job would not be accepted now; called before the body is read."""
        self.check_accepting()
        size = self._settings.queue_size
        limit = max(1, int(size * _CLIENT_SHARE))
        if self._queue.count(client) >= limit:
            wait = {"Retry-After": str(self.retry_after())}
            raise ApiError(429, f"this client already has {limit} requests waiting", headers=wait)
        if len(self._queue) >= size:
            raise unavailable("queue_full", f"the queue is full ({size} requests)", self.retry_after())

    def submit(self, work: Work, client: str) -> Job:
        """Queue a job.

        Raises
        ------
        ApiError
            413, 429 or 503.
        """
        memory = self.admission.check(work)
        self.check_place(client)
        job = Job(work, client, memory, asyncio.get_running_loop().create_future())
        self._queue.put(job)
        self._wake.set()
        return job

    def release(self, job: Job) -> None:
        """Free a job's place and memory, once its answer is sent or its client is gone."""
        job.released = True
        job.done.cancel()
        self._queue.remove(job)
        if job not in self._running:
            self.admission.release(job)
            self._wake.set()

    def retry_after(self) -> int:
        """Seconds until about half the queue is done."""
        rows = sum(sum(job.rows[job.taken :]) for job in self._queue)
        return max(1, min(120, round(rows / self._rows_per_second / 2)))

    # -- the task ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            parts = self._queue.take(PASS_ROWS, self.admission.admit)
            if not parts:
                self._wake.clear()
                await self._wake.wait()
                continue
            start = time.monotonic()
            self._running = list(dict.fromkeys(job for job, _ in parts))
            for job in self._running:
                job.started = job.started or start
            self._finish(parts, await loop.run_in_executor(self._thread, compute, parts))
            seconds = time.monotonic() - start
            rows = sum(job.rows[index] for job, index in parts)
            self._rows_per_second += 0.2 * (rows / max(seconds, 1e-6) - self._rows_per_second)
            self._on_pass(parts[0][0].work.served.slug, len(parts), rows, seconds)

    def _finish(self, parts: list[Part], results: list[Result | ApiError]) -> None:
        for (job, index), result in zip(parts, results, strict=True):
            if isinstance(result, ApiError):
                self._fail(job, result)
            else:
                job.results.append(result if isinstance(result, float) else replace(result, sequence_index=index))
        finished, self._running = self._running, []
        for job in finished:
            if job.released:
                self.admission.release(job)
            elif job.all_taken and not job.done.done():
                job.computed = time.monotonic()
                job.done.set_result(None)

    def _fail(self, job: Job, error: ApiError) -> None:
        self._queue.remove(job)
        if not job.done.done():
            job.done.set_exception(error)


def compute(parts: Sequence[Part]) -> list[Result | ApiError]:
    """Compute one pass; if it fails, each sequence on its own, so that no job fails because of another."""
    work = replace(parts[0][0].work, tokens=tuple(job.work.tokens[index] for job, index in parts))
    try:
        return list(work.compute())
    except Exception as error:
        if all(job is parts[0][0] for job, _ in parts):
            log.error("a computation failed", exc_info=error)
            return [as_api_error(error)] * len(parts)
        log.warning("a shared pass failed; its sequences run one by one", exc_info=error)
        return [result for part in parts for result in compute([part])]


def _warm_up(catalog: Catalog) -> None:
    for served in catalog:
        include = [name for name in INCLUDES if missing_head(served.checkpoint, name) is None]
        for length in (20, 120):
            served.model.encode(["MKTLVAGSER" * (length // 10)], include=include)
