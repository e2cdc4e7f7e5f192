"""The engine of a cluster: a pool of Ray actors, each holding the model.

This process reads batches from the journal and hands them out; actors all over the cluster compute; what comes back is
written to the journal, exactly as with the local engine. What Ray loses is recomputed from the batch; what it never
returned is still pending in the journal.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import BulkError, InvalidOption, NumpyesmError
from ..extras import require
from ..model import ESM2, SyntheticWeightsWarning
from ..options import number_within
from ..streaming.batches import Pending
from ..streaming.packing import token_budget
from ..threads import default_threads
from ..weights.checkpoint import Checkpoint
from .journal import Journal
from .settings import Settings

_MOST_THREADS_PER_WORKER = 4
# Of one batch whose worker died. Without a limit, a batch that needs too much memory would be retried for ever.
_RETRIES = 5
# One batch waits at a worker while another is computed.
_BATCHES_PER_WORKER = 2


def compute_on_ray(
    ray: Any,
    journal: Journal,
    model: ESM2,
    settings: Settings,
    tokens_per_batch: int | None,
    address: str | None,
    workers: int | None,
    threads: int | None,
) -> Generator[list[tuple[int, bytes]], None, None]:
    """Yield the number and the packed outputs of each sequence that a journal still lacks, in any order.

    `ray` is the module, as `check_ray` returns it. Workers read the weights from the object store. `address` is that of
    a running cluster (`auto`, `host:port`); None starts one on this machine and stops it at the end.
    """
    from ray.util import ActorPool

    started = not ray.is_initialized()
    if started:
        _connect(ray, address, (workers or 1) * (threads or 1))
    try:
        cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        count, threads = pool_size(cpus, workers, threads)
        budget = tokens_per_batch or token_budget(model.config, threads, settings.outputs)
        weights = ray.put(model.checkpoint)  # held until the end: a worker that is started again reads it again
        worker = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
        arguments = (weights, settings, model.backend, model.precision, threads, budget)
        actors = [worker.remote(*arguments) for _ in range(count)]
        pool: Any = ActorPool(actors * _BATCHES_PER_WORKER)
        for batch in journal.batches(budget):
            if not pool.has_free():
                yield _results(pool)
            pool.submit(lambda actor, batch: actor.encode.remote(batch), batch)
        while pool.has_next():
            yield _results(pool)
    except ray.exceptions.RayError as error:
        inner = getattr(error, "cause", None) or error
        text = " ".join(str(inner).split())
        raise BulkError(f"a Ray worker failed: {type(inner).__name__}: {text[-600:]}") from error
    finally:
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str | None, fewest_cpus: int) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        # CPUs that this process may use, not all that the machine has; more only if more are asked for.
        options |= {"num_cpus": max(default_threads(), fewest_cpus), "include_dashboard": False}
    try:
        with _quiet_stderr():
            ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BulkError(f"no Ray cluster at {address or 'this machine'}: {error}") from error


def _results(pool: Any) -> list[tuple[int, bytes]]:
    """Results of the batch that is finished first."""
    results: list[tuple[int, bytes]] | str = pool.get_next_unordered()
    if isinstance(results, str):
        raise BulkError(results)
    return results


class _Worker:
    """In an actor: the model, made once, and batches of text into batches of bytes."""

    def __init__(
        self, checkpoint: Checkpoint, settings: Settings, backend: str, precision: str, threads: int, budget: int
    ) -> None:
        warnings.simplefilter("ignore", SyntheticWeightsWarning)  # said once, where the run was started
        self._passes = ESM2(checkpoint, backend=backend, precision=precision, threads=threads).passes
        self._settings, self._budget = settings, budget

    def encode(self, batch: Sequence[Pending]) -> list[tuple[int, bytes]] | str:
        """Number and packed outputs of each sequence, or the message of an error."""
        try:
            return list(self._settings.encode(self._passes, batch, self._budget))
        except NumpyesmError as error:  # Ray would wrap an exception many times
            return str(error)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what Ray's C++ part writes to stderr while it starts: a remark on its log level. Failures are raised."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def pool_size(cpus: Sequence[int], workers: int | None, threads: int | None) -> tuple[int, int]:
    """Return how many workers, and with how many CPUs each, fit nodes with these numbers of CPUs.

    Raises
    ------
    InvalidOption
        What is asked for does not fit: Ray would wait for more machines, for ever.
    """
    nodes = [count for count in cpus if count]  # a head node often offers none
    if not nodes:
        raise BulkError("the Ray cluster has no CPUs")
    if threads is None:
        share = _MOST_THREADS_PER_WORKER if workers is None else max(1, sum(nodes) // workers)
        threads = min(*nodes, share)
    most = sum(count // threads for count in nodes)
    if most < (workers or 1):
        raise InvalidOption(f"{workers or 1} workers of {threads} threads: the cluster has room for {most}")
    return workers or most, threads


def check_ray(address: str | None, workers: int | None) -> Any:
    """Return the ray module, if it is installed and can do what is asked."""
    if address is not None and address.startswith("ray://"):
        raise InvalidOption(
            f"address={address!r}: this engine cannot run through a Ray client. Run this command on a "
            "machine of the cluster with --address auto, or by `ray job submit`"
        )
    if address is not None and (match := re.fullmatch(r"(.+):(\d{1,5})", address)):
        # Ray ends the whole process if nobody answers there.
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        except OSError as error:
            raise BulkError(f"no Ray cluster at {address}: {error.strerror or error}") from error
    if workers is not None:
        number_within("workers", workers, 1)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would otherwise hand a worker that asks for no GPU an empty CUDA_VISIBLE_DEVICES, and say so at length.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's C++ part calls it an error on stderr, among other things, that an actor can be started again.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = require("ray", "the Ray engine", "ray")
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray
