"""A request on its way through the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..alphabet import MASK_TOKEN
from ..options import BY_LAYER, check_includes, check_layers
from ..results import EncodeResult, PredictResult
from .catalog import ServedModel
from .errors import ApiError
from .schemas import EncodeRequest, PredictRequest, Request

Result = EncodeResult | PredictResult | float
Outcome = list[Result] | ApiError


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    Attributes
    ----------
    group : hashable
        Sequences of jobs with equal groups may share a pass: what the pass computes for all of them costs hardly more
        than what each of them needs.
    """

    served: ServedModel
    action: str
    sequences: tuple[str, ...]
    layers: tuple[int, ...] = ()
    include: frozenset[str] = frozenset()
    positions: str = "all"

    @classmethod
    def of(cls, served: ServedModel, action: str, request: Request) -> Work:
        """The work of a checked request."""
        sequences = tuple(item.sequence for item in request.items)
        if isinstance(request, EncodeRequest):
            layers = tuple(check_layers(request.params.repr_layers, served.model.config.num_layers))
            return cls(served, action, sequences, layers, check_includes(request.params.include))
        positions = request.params.positions if isinstance(request, PredictRequest) else "all"
        return cls(served, action, sequences, positions=positions)

    @property
    def group(self) -> Hashable:
        if self.action != "encode":
            return (self.served.slug, self.action, self.positions)
        last = self.served.model.config.num_layers
        depth = last if self.include & {"logits", "attentions"} else max(self.layers, default=0)
        # Attention maps cost much, and rows of every residue take much memory: only those who want them share them.
        dear = self.include & {"contacts", "attentions", "per_token"}
        return (self.served.slug, self.action, depth, dear, self.layers if "per_token" in dear else ())

    @property
    def lengths(self) -> list[int]:
        """Residues of each sequence."""
        masked = (len(MASK_TOKEN) - 1) * (self.action == "predict")
        return [len(sequence) - masked * sequence.count(MASK_TOKEN) for sequence in self.sequences]

    @property
    def by_layer(self) -> bool:
        return bool(self.include & BY_LAYER)


@dataclass(eq=False)
class Job:
    """Work of one client, and where its results go.

    Attributes
    ----------
    memory : int
        Bytes of its results.
    taken : int
        Sequences that the engine has taken so far.
    """

    work: Work
    client: str
    memory: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Result]]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    computed: float | None = None
    taken: int = 0
    in_pass: bool = False
    cancelled: bool = False
    holds_memory: bool = False
    rows: list[int] = field(default_factory=list)
    results: list[Result | None] = field(default_factory=list)
    error: ApiError | None = None

    def __post_init__(self) -> None:
        self.rows = [length + 2 for length in self.work.lengths]
        self.results = [None] * len(self.rows)

    @property
    def all_taken(self) -> bool:
        return self.taken == len(self.rows)


def run_pass(parts: Sequence[tuple[Job, int]]) -> None:
    """Compute sequences of jobs of one group in one call, and give each job its own.

    Parameters
    ----------
    parts : sequence of (job, index of the sequence in the job)
    """
    first = parts[0][0].work
    model = first.served.model
    sequences = [job.work.sequences[index] for job, index in parts]
    computed: Sequence[Result]
    if first.action == "encode":
        works = {id(job): job.work for job, _ in parts}.values()
        layers = sorted({layer for work in works if work.by_layer for layer in work.layers})
        computed = model.encode(sequences, layers, frozenset().union(*(work.include for work in works)))
        computed = [_own_share(job.work, result) for (job, _), result in zip(parts, computed, strict=True)]
    elif first.action == "predict":
        computed = model.predict(sequences, first.positions)
    else:
        computed = model.log_prob(sequences).tolist()
    for (job, index), result in zip(parts, computed, strict=True):
        job.results[index] = result if isinstance(result, float) else replace(result, sequence_index=index)


def _own_share(work: Work, result: Result) -> EncodeResult:
    """Of what the pass computed, what this job asked for."""
    assert isinstance(result, EncodeResult)

    def layers(name: str, values: dict[int, Any] | None) -> dict[int, Any] | None:
        return {n: v for n, v in (values or {}).items() if n in work.layers} if name in work.include else None

    return EncodeResult(
        result.sequence_index,
        embeddings=layers("mean", result.embeddings),
        bos_embeddings=layers("bos", result.bos_embeddings),
        per_token_embeddings=layers("per_token", result.per_token_embeddings),
        contacts=result.contacts if "contacts" in work.include else None,
        logits=result.logits if "logits" in work.include else None,
        attentions=result.attentions if "attentions" in work.include else None,
    )
