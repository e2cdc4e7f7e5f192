"""A thread pool. The caller does no work itself, so Ctrl-C is handled at once and stops the workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from .options import number_within

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Item = TypeVar("Item")


def default_threads() -> int:
    """Return `NUMPYESM_THREADS`, else the CPUs that this process may use (by affinity and container quota)."""
    if setting := os.environ.get("NUMPYESM_THREADS"):
        return check_threads(setting)
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        available = os.cpu_count() or 1
    return max(1, min(available, _container_quota() or available))


def check_threads(threads: object) -> int:
    """Return a positive number of threads, or raise InvalidOption."""
    if isinstance(threads, str) and threads.strip().isdecimal():
        threads = int(threads)
    return number_within("threads", threads, 1, 1024)


def _container_quota() -> int | None:
    """CPUs that the control group allows (cgroup v2), rounded up; None if unlimited or unknown."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None


class WorkerPool:
    """`threads` workers shared by all calls to one model, so that concurrent calls do not oversubscribe the CPUs."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()
        self._lock = threading.Lock()

    def run(self, work: Callable[[Item], None], items: Sequence[Item], threads: int | None = None) -> None:
        """Call `work` on every item, in any order, by at most `threads` workers, and return when all are done.

        The first exception stops the rest and is raised here; so does KeyboardInterrupt in the caller.
        """
        workers = min(self.threads, threads or self.threads, len(items))
        if workers <= 1:
            for item in items:
                work(item)
            return
        queue = iter(items)
        take = threading.Lock()
        stop = threading.Event()

        def worker(_: int) -> None:
            while not stop.is_set():
                with take:
                    item = next(queue, None)
                if item is None:
                    return
                try:
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
        from concurrent.futures import Future

        executor = self._get_executor()
        futures: list[Future[None]] = []
        try:
            for index in range(count):
                # Our own futures: the executor queues a call before it finds that it cannot start a thread for it.
                futures.append(Future())
                try:
                    executor.submit(_fulfil, futures[-1], work, index)
                except RuntimeError:
                    # No threads at all (WebAssembly), or no more of them (a limit): the existing ones do all the work.
                    if futures[-1].cancel():
                        futures.pop()
                    if not futures:
                        work(index)
                    break
            for future in futures:
                future.result()
        except BaseException:
            give_up()
            for future in futures:
                future.cancel() or future.exception()
            raise

    def _get_executor(self) -> ThreadPoolExecutor:
        with self._lock:
            # After a fork the threads are gone though the object is there.
            if self._executor is None or self._process != os.getpid():
                from concurrent.futures import ThreadPoolExecutor

                self._executor = ThreadPoolExecutor(self.threads, thread_name_prefix="numpyesm")
                self._process = os.getpid()
            return self._executor


def _fulfil(future: Future[None], work: Callable[[int], None], index: int) -> None:
    """Do the work unless it has been cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        work(index)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
