"""Decide which jobs may start, by the memory that their results and passes need."""

from __future__ import annotations

from .. import memory
from ..api.errors import ApiError
from ..api.requests import Work
from .queue import Job

# A piece of an answer as text, the same compressed and in the socket's buffer, and Python's own needs.
_SENDING = 16 << 20
# Python's objects of one item.
_PER_ITEM = 4096
# Jobs smaller than this share of the limit may overtake one that waits for memory.
_SMALL_SHARE = 0.01


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
