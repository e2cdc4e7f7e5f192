"""Requests on their way through the engine, and the passes that they share."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..api.errors import ApiError
from ..api.requests import Work
from ..errors import NumpyesmError
from ..formats import Result
from ..options import INCLUDES, Outputs
from ..results import EncodeResult

log = logging.getLogger("numpyesm.service")


@dataclass(eq=False)
class Job:
    """Work of one client, and where its results go.

    Attributes
    ----------
    memory : int
        Bytes of its results.
    done : Future
        Gets the results, or an ApiError.
    taken : int
        Sequences that the engine has taken so far.
    """

    work: Work
    client: str
    memory: int
    done: asyncio.Future[list[Result]]
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
    group: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [length + 2 for length in self.work.lengths]
        self.group = _group(self.work)

    @property
    def all_taken(self) -> bool:
        """Whether the engine has taken every sequence."""
        return self.taken == len(self.rows)


# A sequence of a job, by its index. The sequences of a job are computed in order.
Part: TypeAlias = tuple[Job, int]


def _group(work: Work) -> Hashable:
    """Tell what may share a pass: what equal groups compute together costs little more than what each of them needs."""
    if work.action != "encode":
        return (work.served.slug, work.action, work.positions)
    include = set(work.outputs.include)
    depth = max(work.outputs.by_layer, default=0)
    if include & {"logits", "attentions"}:
        depth = work.served.model.config.num_layers
    # Attention maps are slow and rows of every residue are large: only requests that want the same ones share them.
    costly = frozenset(include & {"contacts", "attentions", "per_token"})
    return (work.served.slug, work.action, depth, costly, work.outputs.layers if "per_token" in costly else ())


def compute(parts: Sequence[Part]) -> None:
    """Compute one pass and give each job its results; if the pass fails, each job on its own.

    So no job suffers from another. This is what the engine's thread does.
    """
    jobs = list(dict.fromkeys(job for job, _ in parts))
    try:
        _run_pass(parts)
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].error = _as_api_error(error)
            return
        log.warning("a shared pass failed; its jobs run one by one", exc_info=error)
        for job in jobs:
            compute([part for part in parts if part[0] is job])


def _run_pass(parts: Sequence[Part]) -> None:
    jobs = list(dict.fromkeys(job for job, _ in parts))
    outputs = [job.work.outputs for job in jobs]
    shared = Outputs(
        tuple(name for name in INCLUDES if any(name in one.include for one in outputs)),
        tuple(sorted({layer for one in outputs for layer in one.by_layer})),
    )
    tokens = tuple(job.work.tokens[index] for job, index in parts)
    computed = list(replace(jobs[0].work, tokens=tokens, outputs=shared).compute())
    for (job, index), result in zip(parts, computed, strict=True):
        job.results.append(_share(job.work.outputs, result, index))


def _share(outputs: Outputs, result: Result, index: int) -> Result:
    """Of what the pass computed for a sequence, what its job wants."""
    if isinstance(result, float):
        return result
    if not isinstance(result, EncodeResult):
        return replace(result, sequence_index=index)

    def layers(name: str, values: dict[int, Any] | None) -> dict[int, Any] | None:
        return {n: v for n, v in (values or {}).items() if n in outputs.layers} if name in outputs.include else None

    return EncodeResult(
        index,
        embeddings=layers("mean", result.embeddings),
        bos_embeddings=layers("bos", result.bos_embeddings),
        per_token_embeddings=layers("per_token", result.per_token_embeddings),
        contacts=result.contacts if "contacts" in outputs.include else None,
        logits=result.logits if "logits" in outputs.include else None,
        attentions=result.attentions if "attentions" in outputs.include else None,
    )


def _as_api_error(error: Exception) -> ApiError:
    """What a client may know of a failure inside; the rest is in the log."""
    log.error("a computation failed", exc_info=error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MemoryError):
        return ApiError(503, "not enough memory just now", code="server.memory", headers={"Retry-After": "10"})
    if isinstance(error, NumpyesmError):
        return ApiError(500, "the model could not compute this request")
    return ApiError(500, "internal error")
