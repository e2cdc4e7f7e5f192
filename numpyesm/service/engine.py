"""One thread that owns the models and computes what the queue holds, pass by pass."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from ..errors import InvalidOption, NumpyesmError
from ..results import EncodeResult, PredictResult
from .catalog import Catalog
from .errors import ApiError
from .fair_queue import FairQueue, QueueFull
from .jobs import Job, Outcome, Result, Work, run_pass
from .memory import MemoryBudget, result_bytes
from .settings import MEBIBYTE, Settings

log = logging.getLogger("numpyesm.service")

# Rows of one pass (eight sequences of 256, or one of 2048). More would hardly be faster, and would keep whoever comes
# meanwhile waiting longer.
PASS_ROWS = 2112

# A job of less than this share of the memory limit is let past one that waits for memory.
_SMALL_SHARE = 0.01


class Engine:
    """Takes jobs from any event loop; answers in the order that fairness gives.

    Parameters
    ----------
    catalog : Catalog
    settings : Settings
    on_pass : callable (slug, sequences, rows, seconds), optional
        Told of every pass, in the engine's thread.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        on_pass: Callable[[str, int, int, float], None] | None = None,
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._on_pass = on_pass
        self._wake = threading.Condition()
        self._queue = FairQueue(settings.queue_size, settings.client_limit)
        self._stopped = False
        self._prepared = False
        self._running: list[Job] = []
        self._starved: Job | None = None
        self._rows_per_second = 1000.0
        self._thread: threading.Thread | None = None
        self.draining = False
        self.budget = MemoryBudget(settings.max_memory, PASS_ROWS)

    # -- life ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Compile and touch what the first request would otherwise wait for.

        Raises
        ------
        InvalidOption
            If the memory limit leaves room for no request at all: every one would be refused.
        """
        for served in self._catalog:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                include = ["mean", "attentions"]
                include += ["logits"] * served.checkpoint.has_lm_head
                include += ["contacts"] * served.checkpoint.has_contact_head
                for length in (20, 120):
                    served.model.encode(["MKTLVAGSER" * (length // 10)], include=include)
        self.budget = MemoryBudget(self._settings.max_memory, PASS_ROWS)
        self._prepared = True
        for served in self._catalog:
            shortest = Work(served, "encode", ("M",), (served.model.config.num_layers,), frozenset({"mean"}))
            if (need := self.budget.need(shortest)) > self.budget.limit:
                raise InvalidOption(
                    f"--max-memory {self.budget.limit / MEBIBYTE:.0f}M leaves no room for requests to {served.slug}: "
                    f"the process takes {self.budget.idle / MEBIBYTE:.0f}M without any, and about "
                    f"{need / MEBIBYTE:.0f}M with one"
                )

    def start(self) -> None:
        """Prepare, if that is not done, and begin."""
        if not self._prepared:
            self.prepare()
        self._thread = threading.Thread(target=self._run, name="numpyesm-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the pass in hand, fail what waits, and end."""
        with self._wake:
            self._stopped = self.draining = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()

    def abandon(self) -> None:
        """Fail what waits or runs: its clients are told now; the pass in hand still ends by itself."""
        with self._wake:
            self.draining = True
            self._fail_waiting()
            for job in self._running:
                job.cancelled = True
            _deliver_error(self._running, _shutting_down())

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs that are not wholly taken."""
        return len(self._queue)

    # -- for the event loop ---------------------------------------------------------------------------------------

    def check_room(self, client: str) -> None:
        """ApiError 503 or 429 if a job would not be taken now: asked before the body is read."""
        with self._wake:
            self._check_room(client)

    def estimate(self, work: Work) -> int:
        """Bytes of the results, or ApiError 413 if the request can never fit."""
        need = self.budget.need(work)
        if need > self.budget.limit:
            raise ApiError(
                413,
                f"this request would take about {need / 2**30:.2f} GiB of memory, and the limit of this service is "
                f"{self.budget.limit / 2**30:.2f} GiB; ask for fewer or shorter items, fewer layers or fewer outputs",
                code="user.memory",
            )
        return result_bytes(work)

    def submit(self, work: Work, client: str) -> Job:
        """Queue a job; its `done` gets the results or an ApiError.

        Raises
        ------
        ApiError
            413, 429 or 503.
        """
        loop = asyncio.get_running_loop()
        job = Job(work, client, self.estimate(work), loop, loop.create_future())
        with self._wake:
            self._check_room(client)
            self._queue.put(job)
            self._wake.notify_all()
        return job

    def release(self, job: Job) -> None:
        """The job's answer is sent, or nobody waits for it: its place and its memory are free."""
        with self._wake:
            job.cancelled = True
            self._queue.remove(job)
            if not job.in_pass:
                self._free(job)

    def _check_room(self, client: str) -> None:
        if self.draining:
            raise _shutting_down()
        if self._thread is not None and not self._thread.is_alive():
            raise ApiError(503, "the engine has stopped", code="server.not_ready", headers={"Retry-After": "5"})
        try:
            self._queue.check_room(client)
        except QueueFull as full:
            wait = {"Retry-After": str(self.retry_after())}
            if full.mine:
                raise ApiError(
                    429,
                    f"{self._settings.client_limit} requests of this client are waiting already",
                    headers=wait,
                ) from None
            raise ApiError(
                503,
                f"the queue is full ({self._settings.queue_size} requests)",
                code="server.queue_full",
                headers=wait,
            ) from None

    def retry_after(self) -> int:
        """Seconds until about half the queue is done."""
        with self._wake:  # also held by some callers: its lock is one that a thread may take again
            rows = sum(sum(job.rows[job.taken :]) for job in self._queue)
        return max(1, min(120, round(rows / self._rows_per_second / 2)))

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                parts: list[tuple[Job, int]] = []
                while not self._stopped and not (parts := self._queue.take(PASS_ROWS, self._may_start)):
                    self._wake.wait()
                if self._stopped:
                    self._fail_waiting()
                    return
                self._running = list({id(job): job for job, _ in parts}.values())
                now = time.monotonic()
                for job in self._running:
                    job.in_pass = True
                    job.started = job.started or now
            self._compute(parts)
            with self._wake:
                finished = []
                for job in self._running:
                    job.in_pass = False
                    if job.cancelled:
                        self._free(job)
                    elif job.all_taken:
                        finished.append(job)
                self._running = []
            now = time.monotonic()
            for job in finished:
                job.computed = now
            _deliver(finished)
            del parts, finished

    def _may_start(self, job: Job) -> bool:
        """Reserve the memory of a job's results, if there is enough."""
        if self._starved is not None and self._starved is not job:
            if self._starved.cancelled:
                self._starved = None
            elif job.memory > _SMALL_SHARE * self.budget.limit:
                return False  # one that waits for memory is not overtaken by others like it
        if not self.budget.fits(job.work, job.memory):
            self._starved = self._starved or job
            return False
        if self._starved is job:
            self._starved = None
        job.holds_memory = True
        self.budget.held += job.memory
        return True

    def _free(self, job: Job) -> None:
        if job.holds_memory:
            job.holds_memory = False
            self.budget.held -= job.memory
            job.results = []
            self._wake.notify_all()
        if self._starved is job:  # others may go now
            self._starved = None
            self._wake.notify_all()

    def _compute(self, parts: Sequence[tuple[Job, int]]) -> None:
        """Run the pass; should it fail, each job on its own, so that none suffers from another."""
        start = time.perf_counter()
        try:
            run_pass(parts)
        except Exception as error:
            if len(self._running) == 1:
                self._fail(self._running[0], error)
            else:
                log.warning("a shared pass failed; its jobs run one by one", exc_info=error)
                for job in self._running:
                    try:
                        run_pass([part for part in parts if part[0] is job])
                    except Exception as own:
                        self._fail(job, own)
        seconds = time.perf_counter() - start
        rows = sum(job.rows[index] for job, index in parts)
        self._rows_per_second += 0.2 * (rows / max(seconds, 1e-6) - self._rows_per_second)
        if self._on_pass is not None:
            self._on_pass(parts[0][0].work.served.slug, len(parts), rows, seconds)

    def _fail(self, job: Job, error: Exception) -> None:
        """Give the job an error in place of results, and take it out of the queue."""
        with self._wake:
            self._queue.remove(job)
            job.taken = len(job.rows)
        job.error = as_api_error(error)

    def _fail_waiting(self) -> None:
        jobs = list(self._queue)
        for job in jobs:
            self._queue.remove(job)
        _deliver_error(jobs, _shutting_down())


def _shutting_down() -> ApiError:
    return ApiError(503, "the service is shutting down", code="server.draining", headers={"Retry-After": "5"})


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of a failure inside; the rest is in the log."""
    if isinstance(error, ApiError):
        return error
    log.error("a computation failed", exc_info=error)
    if isinstance(error, MemoryError):
        return ApiError(503, "not enough memory just now", code="server.memory", headers={"Retry-After": "10"})
    if isinstance(error, NumpyesmError):
        return ApiError(500, "the model could not compute this request")
    return ApiError(500, "internal error")


def _deliver(jobs: Sequence[Job]) -> None:
    """Hand results to the event loops."""
    _hand_over([(job, _checked_results(job)) for job in jobs])


def _deliver_error(jobs: Sequence[Job], error: ApiError) -> None:
    """Hand an error to the event loops in place of results."""
    _hand_over([(job, error) for job in jobs])


def _hand_over(outcomes: Sequence[tuple[Job, Outcome]]) -> None:
    """Each loop is woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Outcome]]] = {}
    for job, outcome in outcomes:
        by_loop.setdefault(job.loop, []).append((job, outcome))
    for loop, done in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(_resolve, done)


def _resolve(done: Sequence[tuple[Job, Outcome]]) -> None:
    for job, outcome in done:
        if job.done.done():
            continue
        if isinstance(outcome, ApiError):
            job.done.set_exception(outcome)
        else:
            job.done.set_result(outcome)


def _checked_results(job: Job) -> Outcome:
    """The results; an error if a number in them is none, which JSON cannot say."""
    if job.error is not None:
        return job.error
    results = [result for result in job.results if result is not None]
    if len(results) < len(job.results):
        return ApiError(500, "internal error")
    if not all(map(_finite, results)):
        log.error("%s %s: a result is not finite", job.work.served.slug, job.work.action)
        return ApiError(500, "the model gave a number that is not finite", code="server.not_finite")
    return results


def _finite(result: Result) -> bool:
    if isinstance(result, EncodeResult | PredictResult):
        return all(np.isfinite(array).all() for array in result.to_arrays().values())
    return bool(np.isfinite(result))
