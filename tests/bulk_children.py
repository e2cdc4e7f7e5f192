"""What bulk tests do in processes of their own, which are killed, interrupted or given no space.

The processes are forks of one that has imported everything and has no threads: a start takes no time.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_a_child(log: Path, function: Callable[..., int | None], *arguments: object) -> tuple[int, str]:
    """Exit code (negative: the signal) of a process that calls the function, and what it wrote to stderr and stdout."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpyesm.cli", "numpyesm.bulk.job", "pyarrow.parquet", "h5py", "filelock"])
    process = context.Process(target=_call, args=(log, function, arguments))
    process.start()
    process.join(100)
    process.kill()
    process.join()
    return process.exitcode, log.read_text()


def _call(log: Path, function: Callable[..., int | None], arguments: tuple[object, ...]) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(function(*arguments))


def embed_and_crash(arguments: list[str], at: int, after: bool, number: int) -> int:
    """`numpyesm embed`; a signal comes just before, or just after, the n-th step that touches the disk for good."""
    from numpyesm.bulk import job
    from numpyesm.bulk.journal import Journal
    from numpyesm.cli import main

    steps = itertools.count(1)

    def crashing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            now = next(steps) == at
            if now and not after:
                os.kill(os.getpid(), number)
            try:
                return function(*arguments, **keywords)
            finally:
                if now:
                    os.kill(os.getpid(), number)

        return call

    for name in ("fsync", "replace", "mkdir", "rmdir", "unlink", "rename"):
        setattr(os, name, crashing(getattr(os, name)))
    for name in ("add_record", "finish_reading", "commit"):
        setattr(Journal, name, crashing(getattr(Journal, name)))
    job.COMMIT_SECONDS, job.COMMIT_SHARE = 0, 1e9
    return main(["embed", *arguments])


def limit_files(size: int) -> None:
    """No file may grow beyond a size: as a full disk, but it takes no rights."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def embed_under_a_limit(arguments: list[str], size: int) -> int:
    from numpyesm.cli import main

    limit_files(size)
    return main(["embed", *arguments])


def write_hdf5(path: Path, trouble: str, at: int) -> int:
    """Write 300 records to HDF5: no file may grow beyond `at` bytes, or Ctrl-C comes within the n-th write."""
    from numpyesm.bulk.journal import Row
    from numpyesm.bulk.settings import Settings
    from numpyesm.bulk.writers import hdf5
    from numpyesm.bulk.writers.hdf5 import UnfailingFile
    from numpyesm.config import PRESETS
    from numpyesm.options import Outputs

    settings = Settings(PRESETS["esm2-8m"], Outputs(("per_token", "contacts"), (3,)))
    rows = (Row(i, f"P{i}", "", 60, bytes(32), bytes(settings.num_bytes(60))) for i in range(1, 301))
    write, calls = UnfailingFile.write, itertools.count(1)

    def interrupted(self: UnfailingFile, data: Any) -> int:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return write(self, data)

    if trouble == "limit":
        limit_files(at)
    else:
        UnfailingFile.write = interrupted  # type: ignore[method-assign]
    try:
        hdf5.write(rows, settings, {"model": "esm2-8m"}, path)
    except OSError as error:
        return error.errno or errno.EIO
    except KeyboardInterrupt:
        return 130 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 1
    return 0
