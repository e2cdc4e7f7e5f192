"""A thread pool. The caller does no work itself, so Ctrl-C is handled at once and stops the workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import length_hint
from queue import SimpleQueue
from typing import TypeVar
from weakref import WeakSet, finalize

from .containers import control_groups
from .options import number_within

Item = TypeVar("Item")


def default_threads() -> int:
    """Return `NUMPYESM_THREADS`, else the CPUs that this process may use (by affinity and container quota)."""
    if setting := os.environ.get("NUMPYESM_THREADS"):
        return check_threads(setting, "NUMPYESM_THREADS")
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        available = os.cpu_count() or 1
    return max(1, min(available, _container_quota() or available))


def check_threads(threads: object, option: str = "threads") -> int:
    """Return a positive number of threads, or raise InvalidOption, which names `option`."""
    if isinstance(threads, str) and threads.strip().isdecimal():
        threads = int(threads)
    return number_within(option, threads, 1, 1024)


def _container_quota() -> int | None:
    """CPUs that the control groups of this process allow, rounded up; None if unlimited or unknown."""
    quotas = []
    for folder, version in control_groups("cpu"):
        with suppress(OSError, ValueError):  # not visible from within a container, or "max"
            files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
            if quota > 0:
                quotas.append(-(-quota // period))
    return min(quotas, default=None)


class WorkerPool:
    """`threads` workers shared by all calls to one model, so that concurrent calls do not oversubscribe the CPUs.

    `concurrent.futures` does this too, but takes 9 ms to import, of 240 from starting Python to a first embedding.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.begin_anew()
        _renewed.add(self)

    def begin_anew(self) -> None:
        """No workers yet: they start when there is work for them, and end with this object."""
        self._lock = threading.Lock()
        self._started = self._unfinished = 0
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        finalize(self, self._tasks.put, None).atexit = False

    def run(self, work: Callable[[Item], None], items: Iterable[Item], threads: int | None = None) -> None:
        """Call `work` on every item, in any order, by at most `threads` workers, and return when all are done.

        Items are taken one at a time, so that an iterator may make them as they are needed. The first exception, also
        of the iterator, stops the rest and is raised here; so does KeyboardInterrupt in the caller.
        """
        workers = min(self.threads, threads or self.threads, length_hint(items, self.threads))
        if workers <= 1:
            for item in items:
                work(item)
            return
        queue = iter(items)
        take = threading.Lock()
        stop = threading.Event()

        def worker(_: int) -> None:
            while not stop.is_set():
                try:
                    with take:
                        item = next(queue, None)
                    if item is None:
                        return
                    work(item)
                except BaseException:
                    stop.set()
                    raise

        self.run_together(worker, workers, stop.set)

    def run_together(self, work: Callable[[int], None], count: int, give_up: Callable[[], None]) -> None:
        """Call `work(0)` … `work(count - 1)` on workers, even a single one, and return when all are done.

        On an error, and on KeyboardInterrupt in the caller, `give_up` is called, and must make them return soon:
        compiled code cannot be interrupted. They may run one after the other.
        """
        tasks = [_Task(work, index) for index in range(count)]
        queue = self._queue_for(count)
        try:
            for task in tasks:
                if queue is None:
                    task()
                else:
                    queue.put(task)
            for task in tasks:
                task.result()
        except BaseException:
            give_up()
            for task in tasks:
                task.end()
            raise
        finally:
            with self._lock:
                self._unfinished -= count

    def _queue_for(self, count: int) -> SimpleQueue[_Task | None] | None:
        """Start workers for so many tasks more, as far as that is allowed; None if there is no worker at all."""
        with self._lock:
            self._unfinished += count
            while self._started < min(self.threads, self._unfinished):
                worker = threading.Thread(
                    target=_serve, args=(self._tasks,), name=f"numpyesm_{self._started}", daemon=True
                )
                try:
                    worker.start()
                except RuntimeError:  # no threads at all (WebAssembly), or no more of them (a limit)
                    break
                self._started += 1
            return self._tasks if self._started else None


class Lock:
    """A lock that is open in the child of a fork, whoever held it."""

    def __init__(self) -> None:
        self.begin_anew()
        _renewed.add(self)

    def begin_anew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_renewed: WeakSet[WorkerPool | Lock] = WeakSet()


def _begin_anew() -> None:
    """In the child of a fork: the workers are not there, and whoever held a lock is not, either."""
    for one in list(_renewed):
        one.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


class _Task:
    """One call of `work`, made by a worker unless it is cancelled before."""

    def __init__(self, work: Callable[[int], None], index: int) -> None:
        self._work, self._index = work, index
        self._claim = threading.Lock()  # never released: whoever takes it decides
        self._done = threading.Event()
        self._error: BaseException | None = None

    def __call__(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work(self._index)
        except BaseException as error:
            self._error = error
        self._done.set()

    def result(self) -> None:
        """Wait for it, and raise what it raised."""
        self._done.wait()
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback would keep this frame, and so all that the caller has

    def end(self) -> None:
        """Cancel it, or wait until it is done."""
        if not self._claim.acquire(blocking=False):
            self._done.wait()


def _serve(tasks: SimpleQueue[_Task | None]) -> None:
    """What a worker does."""
    while (task := tasks.get()) is not None:
        task()
        del task  # or a waiting worker would keep what the task has
    tasks.put(None)  # for the next worker
