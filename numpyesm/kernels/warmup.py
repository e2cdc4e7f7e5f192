"""Compile kernels ahead of time for this machine, so that no later process has to."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingExtra, warn
from ..options import PRECISIONS, check_precision
from .build import build, child_environment, linker
from .compiled.code import Code
from .compiled.isa import host_isa
from .compiled.library import VARIABLE, cached_library, find_library, forget_library


def warmup(
    precisions: str | Sequence[str] | None = None, cache_dir: str | os.PathLike[str] | None = None
) -> Path | str:
    """Make compiled kernels for this machine, if there are none.

    With Numba and a C compiler that is a library for all precisions, in the cache or in `cache_dir`, where later
    processes find it when `NUMPYESM_KERNELS` names the folder; with Numba alone its own cache is filled, and
    `NUMBA_CACHE_DIR` names the folder.

    Parameters
    ----------
    precisions : str or sequence of str, optional
        Of `fp32`, `bf16`, `int8`: what Numba compiles without a C compiler; all of them by default.
    cache_dir : path, optional
        Where to put the code.

    Returns
    -------
    Path or str
        The library or folder that holds the code; a sentence if there was nothing to do, or no folder for it.

    Raises
    ------
    InvalidOption
        An unknown precision.
    MissingExtra
        Numba is not installed, or fails here.
    BuildFailed
        The library could not be made, or `CC` names no C compiler.
    OSError
        `cache_dir` cannot be written to.
    """
    if isinstance(precisions, str):
        precisions = [precisions]
    wanted = [check_precision(precision) for precision in precisions or PRECISIONS]
    if cache_dir is None and isinstance(found := find_library(), Code):
        return f"nothing to compile: {found}"
    if importlib.util.find_spec("numba") is None:
        raise MissingExtra("warmup compiles kernels: pip install 'numpyesm[fast]'")
    folder = None if cache_dir is None else Path(cache_dir).absolute()
    if folder is not None:
        _check_writable(folder)
    if linker() is not None:
        if folder is None and os.environ.get(VARIABLE, "").strip():
            warn(f"{VARIABLE}={os.environ[VARIABLE]}: what is compiled now is not used as long as this is set")
        sys.stderr.write("numpyesm: compiling a library of kernels for this CPU (once, half a minute or more) ...\n")
        made = build(folder or cached_library().parent, [host_isa().name])
        forget_library()
        return made
    return _fill_numba_cache(wanted, folder)


def _check_writable(folder: Path) -> None:
    """To say it before compiling for so long, not after."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to") from error


def _fill_numba_cache(precisions: Sequence[str], folder: Path | None) -> Path | str:
    """In a process of its own: this one may have settled on another folder already."""
    # Ctrl-C reaches both processes: this one says it, that one ends without a traceback.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "from numpyesm.kernels.numba_.cache import cache_folder\n"
        "from numpyesm.kernels.numba_.code import numba_code\n"
        "for precision in sys.argv[1:]: numba_code(precision)\n"
        "print(cache_folder() or '')"
    )
    environment = child_environment(**({} if folder is None else {"NUMBA_CACHE_DIR": str(folder)}))
    done = subprocess.run(
        [sys.executable, "-c", code, *precisions], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise MissingExtra("warmup compiles kernels, and Numba fails here; its error is above")
    found = done.stdout.strip()
    if folder is not None and folder not in Path(found).parents:
        raise OSError(f"{folder}: cannot be written to")
    return Path(found) if found else "compiled in memory only: no folder can be written"
