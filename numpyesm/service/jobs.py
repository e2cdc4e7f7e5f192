"""Requests on their way through the engine, and the passes that they share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..api.errors import ApiError, as_api_error
from ..api.requests import Work
from ..formats import Result

log = logging.getLogger("numpyesm.service")


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
        How many sequences the engine has taken so far.
    """

    work: Work
    client: str
    memory: int
    done: asyncio.Future[None]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    computed: float | None = None
    taken: int = 0
    in_pass: bool = False
    cancelled: bool = False
    holds_memory: bool = False
    error: ApiError | None = None
    results: list[Result] = field(default_factory=list)
    rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [length + 2 for length in self.work.lengths]

    def times(self) -> dict[str, float]:
        """Milliseconds spent in the queue and in the engine, as far as known."""
        if self.started is None:
            return {}
        times = {"queue_ms": round((self.started - self.arrived) * 1e3, 2)}
        return (
            times if self.computed is None else times | {"compute_ms": round((self.computed - self.started) * 1e3, 2)}
        )

    @property
    def group(self) -> Hashable:
        """Jobs may share a pass if they want the same outputs."""
        return replace(self.work, tokens=())

    @property
    def all_taken(self) -> bool:
        """Whether the engine has taken every sequence."""
        return self.taken == len(self.rows)


# A sequence of a job, by its index. The sequences of a job are computed in order.
Part: TypeAlias = tuple[Job, int]


def compute(parts: Sequence[Part]) -> None:
    """Compute one pass and give each job its results; if the pass fails, each job on its own.

    So no job fails because of another. Runs in the engine's thread.
    """
    jobs = list(dict.fromkeys(job for job, _ in parts))
    try:
        _run_pass(parts)
    except Exception as error:
        if len(jobs) == 1:
            log.error("a computation failed", exc_info=error)
            jobs[0].error = as_api_error(error)
            return
        log.warning("a shared pass failed; its jobs run one by one", exc_info=error)
        for job in jobs:
            compute([part for part in parts if part[0] is job])


def _run_pass(parts: Sequence[Part]) -> None:
    work = parts[0][0].work
    shared = replace(work, tokens=tuple(job.work.tokens[index] for job, index in parts))
    results = list(shared.compute())
    for (job, index), result in zip(parts, results, strict=True):
        job.results.append(result if isinstance(result, float) else replace(result, sequence_index=index))
