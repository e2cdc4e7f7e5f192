"""Hold NumPy's BLAS at a given number of threads: one while our own threads work on blocks of rows.

Two levels of threads would fight for the same cores. NumPy has no call for this, so the library's own function is
looked up in the files that NumPy has loaded. Where none is found (an unknown BLAS) nothing is changed.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# (get, set) pairs: NumPy's bundled OpenBLAS with its prefix and suffixes, plain OpenBLAS, MKL, BLIS.
_SYMBOLS = [
    (f"{prefix}openblas_get_num_threads{suffix}", f"{prefix}openblas_set_num_threads{suffix}")
    for prefix in ("scipy_", "")
    for suffix in ("64_", "", "_64")
] + [("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"), ("bli_thread_get_num_threads", "bli_thread_set_num_threads")]

_lock = threading.Lock()
_users = 0
_saved: list[int] = []


def _candidate_libraries() -> Iterator[str]:
    """Files of BLAS libraries that this process may have loaded, NumPy's own bundle first."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        if folder.is_dir():
            yield from sorted(str(path) for path in folder.iterdir() if "blas" in path.name.lower())
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if ".so" in line}
    except OSError:
        return
    yield from sorted(p for p in paths if any(key in os.path.basename(p).lower() for key in ("blas", "mkl_rt", "blis")))


@functools.cache
def _controls() -> list[tuple[Callable[[], int], Callable[[int], None]]]:
    """(get, set) functions of the loaded BLAS libraries."""
    try:
        import ctypes
    except ImportError:  # a Python built without it
        return []
    found: dict[str, tuple[Callable[[], int], Callable[[int], None]]] = {}
    for path in _candidate_libraries():
        key = os.path.realpath(path)
        if key in found:
            continue
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for get_name, set_name in _SYMBOLS:
            if hasattr(library, get_name) and hasattr(library, set_name):
                setter = getattr(library, set_name)
                setter.argtypes, setter.restype = [ctypes.c_int], None
                found[key] = (getattr(library, get_name), setter)
                break
    return list(found.values())


def _forget_users() -> None:
    """In the child of a fork: the threads that held a limit are not there, and so nothing is limited."""
    global _lock, _users
    if _users:
        _restore()
    _lock, _users = threading.Lock(), 0


def _restore() -> None:
    for (_, set_threads), count in zip(_controls(), _saved, strict=False):
        set_threads(count)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_users)


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """BLAS calls inside use at most `threads` threads; what was set before comes back after the last user leaves.

    The setting is the process's: where users overlap, the least that any of them asked for holds until all are gone.
    """
    global _users
    with _lock:
        controls = _controls()
        if _users == 0:
            _saved[:] = [get() for get, _ in controls]
        for get, set_threads in controls:
            if _users == 0 or get() > threads:
                set_threads(threads)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users = max(0, _users - 1)
            if _users == 0:
                _restore()
