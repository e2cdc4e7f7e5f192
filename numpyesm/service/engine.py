"""One task takes waiting jobs, pass by pass, and one thread computes them."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..alphabet import tokenize
from ..api.catalog import Catalog
from ..api.errors import ApiError
from ..api.requests import Work
from ..errors import InvalidOption
from ..memory import format_memory
from ..options import Outputs
from .admission import Admission
from .jobs import Job, Part, compute
from .queue import FairQueue
from .settings import Settings

# Rows of one pass (eight sequences of 256, or one of 2048). More would hardly be faster, and would keep whoever comes
# meanwhile waiting longer.
PASS_ROWS = 2112


class Engine:
    """Runs jobs in the order that fairness gives; its methods are called from the event loop.

    Parameters
    ----------
    catalog : Catalog
    settings : Settings
    on_pass : callable (slug, sequences, rows, seconds), optional
        Called after every pass.

    Attributes
    ----------
    draining : bool
        No new jobs are accepted; accepted ones finish.
    admission : Admission
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
        self._queue = FairQueue()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="numpyesm-engine")
        self._running: list[Job] = []
        self._stopped = False
        self._rows_per_second = 1000.0
        self.draining = False
        self.admission = Admission(settings.max_memory, PASS_ROWS)

    # -- life ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start the thread, and run each model once so that the first request does not wait for compilation.

        Raises
        ------
        InvalidOption
            The memory limit leaves no room for any request.
        """
        self._thread.submit(self._warm_up).result()
        self.admission = Admission(self._settings.max_memory, PASS_ROWS)
        for served in self._catalog:
            outputs = Outputs(("mean",), (served.model.config.num_layers,))
            shortest = Work(served, "encode", tuple(tokenize(["M"])), outputs)
            if (need := self.admission.need(shortest)) > self.admission.limit:
                raise InvalidOption(
                    f"a memory limit of {format_memory(self.admission.limit)} (--max-memory, or ulimit -v) leaves "
                    f"nothing for requests to {served.slug}: the process takes {format_memory(self.admission.idle)} "
                    f"without any, and about {format_memory(need)} with one"
                )

    def _warm_up(self) -> None:
        for served in self._catalog:
            include = ["mean", "attentions"]
            include += ["logits"] * served.checkpoint.has_lm_head
            include += ["classes"] * (served.model.head is not None)
            include += ["contacts"] * served.checkpoint.has_contact_head
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for length in (20, 120):
                    served.model.encode(["MKTLVAGSER" * (length // 10)], include=include)

    def start(self) -> None:
        """Start serving in the running event loop; call `prepare` first."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """Fail all waiting jobs, and finish the current pass."""
        self.draining = self._stopped = True
        self._fail(self._queue)
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    def abandon(self) -> None:
        """Fail all jobs, running ones too: clients are told now, and the current pass is discarded."""
        self.draining = True
        self._fail(self._queue)
        self._fail(self._running)

    @property
    def alive(self) -> bool:
        """Whether jobs are being served."""
        return self._task is not None and not self._task.done()

    @property
    def waiting(self) -> int:
        """Number of jobs with sequences still waiting."""
        return len(self._queue)

    # -- for requests ---------------------------------------------------------------------------------------------

    def check_place(self, client: str) -> None:
        """Raise ApiError 503 or 429 if a job would not be accepted now; called before the body is read."""
        if self.draining:
            raise _shutting_down()
        if not self.alive:
            raise ApiError(503, "the engine has stopped", code="server.not_ready", headers={"Retry-After": "5"})
        limit, size = self._settings.client_limit, self._settings.queue_size
        too_many = self._queue.count(client) >= limit
        if too_many or len(self._queue) >= size:
            wait = {"Retry-After": str(self.retry_after())}
            if too_many:
                raise ApiError(429, f"{limit} requests of this client are waiting already", headers=wait)
            raise ApiError(503, f"the queue is full ({size} requests)", code="server.queue_full", headers=wait)

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
        """Free a job's place and memory, once its answer is sent or nobody waits for it."""
        job.cancelled = True
        job.done.cancel()
        self._queue.remove(job)
        if not job.in_pass:
            self.admission.release(job)
            self._wake.set()

    def retry_after(self) -> int:
        """Seconds until about half the queue is done."""
        rows = sum(sum(job.rows[job.taken :]) for job in self._queue)
        return max(1, min(120, round(rows / self._rows_per_second / 2)))

    # -- the task ---------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._stopped:
            parts = self._queue.take(PASS_ROWS, self.admission.admit)
            if not parts:
                self._wake.clear()
                await self._wake.wait()
                continue
            self._begin(parts)
            start = time.perf_counter()
            await loop.run_in_executor(self._thread, compute, parts)
            self._finish(parts, time.perf_counter() - start)

    def _begin(self, parts: Sequence[Part]) -> None:
        self._running = list(dict.fromkeys(job for job, _ in parts))
        for job in self._running:
            job.in_pass = True
            job.started = job.started or time.monotonic()

    def _finish(self, parts: Sequence[Part], seconds: float) -> None:
        for job in self._running:
            job.in_pass = False
            if job.cancelled:
                self.admission.release(job)
            elif job.error is not None:
                self._queue.remove(job)
                _resolve(job, job.error)
            elif job.all_taken:
                job.computed = time.monotonic()
                _resolve(job, None)
        self._running = []
        rows = sum(job.rows[index] for job, index in parts)
        self._rows_per_second += 0.2 * (rows / max(seconds, 1e-6) - self._rows_per_second)
        if self._on_pass is not None:
            self._on_pass(parts[0][0].work.served.slug, len(parts), rows, seconds)

    def _fail(self, jobs: Iterable[Job]) -> None:
        for job in list(jobs):
            self._queue.remove(job)
            _resolve(job, _shutting_down())


def _resolve(job: Job, error: ApiError | None) -> None:
    """Wake the request that waits for this job."""
    if job.done.done():
        return
    if error is not None:
        job.done.set_exception(error)
    else:
        job.done.set_result(None)


def _shutting_down() -> ApiError:
    return ApiError(503, "the service is shutting down", code="server.draining", headers={"Retry-After": "5"})
