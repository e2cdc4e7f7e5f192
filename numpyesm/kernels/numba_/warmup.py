"""Compile everything ahead of time, so that no later process has to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...options import PRECISIONS, check_precision


def warmup(precisions: Sequence[str] | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Fill the cache of compiled code.

    Parameters
    ----------
    precisions : sequence of str, optional
        Of `fp32`, `bf16`, `int8`; all of them by default.
    cache_dir : path, optional
        Where to put it; later processes find it there when `NUMBA_CACHE_DIR` names it.

    Returns
    -------
    Path or None
        The folder that holds the code; None if there is none that can be written to.

    Raises
    ------
    InvalidOption
        An unknown precision.
    OSError
        `cache_dir` cannot be written to.
    """
    wanted = [check_precision(precision) for precision in precisions or PRECISIONS]
    if cache_dir is None:
        from . import cache, kernels  # noqa: F401  # importing the kernels is what registers them

        for precision in wanted:
            cache.prepare(precision)
        return cache.cache_folder()
    # This process may have settled on another folder already, and keeps what it has compiled there.
    folder = Path(cache_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:  # to say it before half a minute of compiling, not after
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to") from error
    # Ctrl-C reaches both processes: this one says it, that one ends without a traceback.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "from numpyesm.kernels.numba_.warmup import warmup; print(warmup(sys.argv[1:]))"
    )
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, *wanted],
        env={**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = Path(done.stdout.strip())
    if folder not in found.parents:
        raise OSError(f"{folder}: cannot be written to")
    return found
