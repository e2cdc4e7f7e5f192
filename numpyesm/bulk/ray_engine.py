"""The engine of a cluster: a Ray Data pipeline with a pool of actors, each holding the model.

One task on this machine streams batches out of the journal's `sequences.txt`; actors all over the cluster turn batches
into bytes; this process takes the bytes as they come and writes them to the journal, exactly as the local engine's.
Whatever Ray loses it computes again from the batch, and what it never gave back is still pending in the journal.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BulkError, InvalidOption, MissingExtra, NumpyesmError
from ..model import ESM2, SyntheticWeightsWarning
from ..threads import default_threads
from .compute import default_budget, encode_pending
from .journal import Journal, Pending
from .layout import Layout
from .packing import pack
from .settings import Settings

_MOST_THREADS_A_WORKER = 4
# Of one batch whose worker died. Without an end, a batch that is too much for the memory would be tried for ever.
_RETRIES = 5


class RayEngine:
    """Computes what a journal still lacks on a Ray cluster.

    Parameters
    ----------
    model : ESM2
        Its weights are put into the object store once and read from there by every worker.
    settings : Settings
    layout : Layout
    tokens_per_batch : int or None
    address : str or None
        Of a running cluster (`auto`, `host:port`); None starts one on this machine and stops it at the end.
    workers, threads : int or None
        Actors, and CPUs of each.
    """

    def __init__(
        self,
        model: ESM2,
        settings: Settings,
        layout: Layout,
        tokens_per_batch: int | None,
        *,
        address: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._ray = check_ray(address, workers)
        self._settings, self._layout = settings, layout
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect(address, (workers or 1) * (threads or 1))
        try:
            self.workers, self.threads = self._pool(workers, threads)
            # Held until the end: an actor that is started again reads it again.
            self._weights = self._ray.put(model.checkpoint)
        except BaseException:
            self.close()
            raise
        self._budget = tokens_per_batch or min(default_budget(model, settings), max(4096, 2048 * self.threads))
        self._backend, self._precision = model.backend, model.precision

    def _connect(self, address: str | None, least_cpus: int) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address is None:
                # CPUs that this process may use, not all that the machine has; more only where more are asked for.
                cpus = max(default_threads(), least_cpus)
                with _without_greeting():
                    self._ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
            else:
                with _without_greeting():
                    self._ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BulkError(f"no Ray cluster at {address or 'this machine'}: {error}") from error

    def _pool(self, workers: int | None, threads: int | None) -> tuple[int, int]:
        """How many actors, and CPUs of each, fit the nodes of the cluster."""
        nodes = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        cpus = [count for count in nodes if count]  # a head node often offers none
        if not cpus:
            raise BulkError("the Ray cluster has no CPUs")
        if threads is None:
            threads = min(cpus) if workers is None else max(1, min(sum(cpus) // workers, min(cpus)))
            threads = min(threads, _MOST_THREADS_A_WORKER) if workers is None else threads
        room = sum(count // threads for count in cpus)
        if room < (workers or 1):
            # Ray would wait for more machines, for ever.
            raise InvalidOption(f"{workers or 1} workers of {threads} threads: the cluster has room for {room}")
        return workers or room, threads

    def run(self, journal: Journal) -> Iterator[tuple[int, bytes]]:
        """Number and numbers of each pending sequence, in no particular order."""
        import ray.data

        context = ray.data.DataContext.get_current()
        before = {name: getattr(context, name) for name in ("target_max_block_size", "enable_progress_bars")}
        # A row is a batch, and each is to be a block of its own: Ray would gather 128 MB of sequences first.
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        try:
            source = _source(str(journal.folder / "sequences.txt"), journal.done_mask(), self._budget)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names of arguments that change from release to release
                batches = ray.data.read_datasource(
                    source, override_num_blocks=1, **self._here(ray.data.read_datasource)
                )
                computed = batches.map_batches(
                    _Worker,
                    fn_constructor_args=(
                        [self._weights],  # in a list, or Ray would tie the actor's life to this one object
                        self._settings,
                        self._layout,
                        self._backend,
                        self._precision,
                        self.threads,
                        self._budget,
                    ),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=self.workers),
                    num_cpus=self.threads,
                    max_restarts=-1,
                    max_task_retries=_RETRIES,
                )
            for table in computed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                failed = table["error"].drop_null()
                if len(failed):
                    raise BulkError(failed[0].as_py())
                for numbers, blobs in zip(table["numbers"], table["blobs"], strict=True):
                    for number, blob in zip(numbers, blobs, strict=True):
                        yield number.as_py(), blob.as_py()
        except ray.exceptions.RayError as error:
            raise _reason(error) from error
        finally:
            for name, value in before.items():
                setattr(context, name, value)

    def _here(self, function: Any) -> dict[str, Any]:
        """Arguments that place a task on this machine, where the journal is, without taking a CPU from the workers."""
        node = self._ray.get_runtime_context().get_node_id()
        if "label_selector" in signature(function).parameters:
            return {"num_cpus": 0, "label_selector": {"ray.io/node-id": node}}
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        return {"ray_remote_args": {"num_cpus": 0, "scheduling_strategy": strategy}}

    def close(self) -> None:
        """Stop what was started here."""
        if self._started:
            self._ray.shutdown()


class _Worker:
    """In an actor: the model, made once, and batches of text into batches of bytes."""

    def __init__(
        self,
        weights: list[Any],
        settings: Settings,
        layout: Layout,
        backend: str,
        precision: str,
        threads: int,
        budget: int,
    ) -> None:
        import ray

        warnings.simplefilter("ignore", SyntheticWeightsWarning)  # said once, where the run was started
        self._model = ESM2(ray.get(weights[0]), backend=backend, precision=precision, threads=threads)
        self._settings, self._layout, self._budget = settings, layout, budget

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        numbers: list[list[int]] = []
        blobs: list[list[bytes]] = []
        errors: list[str | None] = []
        for row in table.to_pylist():
            batch = [Pending(number, text) for number, text in zip(row["numbers"], row["sequences"], strict=True)]
            found: list[tuple[int, bytes]] = []
            try:
                for number, result in encode_pending(self._model, batch, self._settings, self._budget):
                    found.append((number, self._layout.pack(result)))
                errors.append(None)
            except NumpyesmError as error:  # as a value: an exception would come out in many wrappings
                errors.append(str(error))
            numbers.append([number for number, _ in found])
            blobs.append([data for _, data in found])
        columns = {
            "numbers": pa.array(numbers, pa.list_(pa.int64())),
            "blobs": pa.array(blobs, pa.large_list(pa.large_binary())),
            "error": pa.array(errors, pa.string()),
        }
        return pa.table(columns)


def _read_batches(path: str, done: npt.NDArray[np.uint8], budget: int) -> Iterator[Any]:
    """Tables of one row each: a batch of pending sequences."""
    import pyarrow as pa

    def pending() -> Iterator[Pending]:
        with open(path, "rb") as spool:
            for number, line in enumerate(spool):
                if not done[number >> 3] >> (7 - (number & 7)) & 1:
                    yield Pending(number, line[:-1].decode("ascii"))

    for batch in pack(pending(), lambda item: len(item.sequence), budget):
        numbers = pa.array([[item.number for item in batch]], pa.list_(pa.int64()))
        yield pa.table({"numbers": numbers, "sequences": pa.array([[item.sequence for item in batch]])})


def _source(path: str, done: npt.NDArray[np.uint8], budget: int) -> Any:
    """A Ray data source of one task, which streams: nothing is read before it is wanted."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Batches(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            size = Path(path).stat().st_size
            metadata = BlockMetadata(num_rows=None, size_bytes=size, input_files=None, exec_stats=None)
            return [ReadTask(lambda: _read_batches(path, done, budget), metadata)]

    return Batches()  # type: ignore[no-untyped-call]


def _reason(error: BaseException) -> BulkError:
    """What went wrong in a worker, as far as Ray tells."""
    inner = getattr(error, "cause", None) or error
    text = " ".join(str(inner).split())
    return BulkError(f"a Ray worker failed: {type(inner).__name__}: {text[-600:]}")


@contextmanager
def _without_greeting() -> Iterator[None]:
    """Hold back what Ray's C++ part writes to stderr while it starts, and pass on all but its remark on its log level.

    That level is set because at any other it calls it an error that an actor can be started again.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            for line in held:
                if b"Set ray log level" not in line:
                    os.write(2, line)
            os.close(stderr)


def check_ray(address: str | None, workers: int | None) -> Any:
    """The ray module, if it is there and what is asked for can be."""
    if address is not None and address.startswith("ray://"):
        raise InvalidOption(
            f"address={address!r}: Ray Data does not run through a Ray client. Run this command on a "
            "machine of the cluster with --address auto, or by `ray job submit`"
        )
    if address is not None and (match := re.fullmatch(r"(.+):(\d{1,5})", address)):
        # Ray ends the whole process if nobody answers there.
        try:
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=10).close()
        except OSError as error:
            raise BulkError(f"no Ray cluster at {address}: {error.strerror or error}") from error
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise InvalidOption(f"workers={workers!r}: expected a whole number from 1")
    return _import_ray()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    # Ray would otherwise hand a worker that asks for no GPU an empty CUDA_VISIBLE_DEVICES, and say so at length.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtra("the Ray engine needs ray: pip install 'numpyesm[ray]'") from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it has to say is raised, too
    return ray
