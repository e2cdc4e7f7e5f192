"""Where Numba keeps what it compiles, and the decorators that say what is compiled.

Compiled code depends on the CPU, the instruction set in use, Numba, and our own sources: each combination has its own
folder, so that no process finds another's. Numba writes each file under a temporary name and renames it: several
processes may start at once. A folder holds one signature of each function only, so they write the same names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types
from numba.core import config as _config
from numba.core import inline_closurecall as _inliner
from numba.core.compiler_lock import global_compiler_lock

from ..._version import __version__
from ..compiled.code import ARGUMENTS, kernel_sources
from .emitter import ISA

numba_config: Any = _config  # its settings are not declared
_njit: Any = vars(numba)["njit"]  # nor are all its options

_kernels: dict[str, Any] = {}  # dispatchers by name
_lock = threading.Lock()


def _candidates() -> Iterator[Path]:
    """Folders to try, best first: what the user set, beside the sources, the user's cache, a temporary folder."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"])
        return
    yield Path(__file__).parent / "__pycache__"
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / "numpyesm"
    else:
        yield Path(os.path.expanduser("~")) / ".cache" / "numpyesm"


def _temporary_folder() -> Path | None:
    """A folder in the system's temporary folder that nobody else can write to: it will hold code that we run."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    try:
        path = Path(tempfile.gettempdir()) / f"numpyesm-{user}"  # raises where no temporary folder can be written
        path.mkdir(mode=0o700, exist_ok=True)
        owned = not hasattr(os, "getuid") or (path.lstat().st_uid == os.getuid() and not path.lstat().st_mode & 0o077)
    except OSError:
        return None
    return path if owned and path.is_dir() and not path.is_symlink() else None


def _key() -> str:
    """Name of the folder for this host and these sources."""
    digest = hashlib.sha256(kernel_sources().encode())
    features = ",".join(sorted(name for name, present in llvm.get_host_cpu_features().items() if present))
    digest.update(f"{features} {numba_config.CPU_NAME} {numba_config.CPU_FEATURES}".encode())
    parts = (f"numpyesm-{__version__}", f"numba-{numba.__version__}", llvm.get_host_cpu_name(), ISA.name)
    return "-".join((*parts, digest.hexdigest()[:16]))


def _usable(folder: Path) -> bool:
    """Whether files can be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@cache
def cache_folder() -> Path | None:
    """The folder of this process, made if need be; None if compiled code can be kept in memory only."""
    key = _key()
    filled: Path | None = None
    for base in _candidates():
        if _usable(base / key):
            return base / key
        if filled is None and (base / key).is_dir():
            filled = base / key
    temporary = _temporary_folder()
    if temporary is None:
        return None
    if filled is not None and not (temporary / key).exists():
        _copy_whole(filled, temporary / key)
    return temporary / key if _usable(temporary / key) else None


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a read-only cache that was filled beforehand: Numba does not read where it cannot write."""
    part = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        shutil.copytree(source, part / "copy")
        # A folder keeps the mode of its source, which may forbid to write, and so to rename, it.
        for folder in (part / "copy", *(path for path in (part / "copy").rglob("*") if path.is_dir())):
            folder.chmod(0o700)
        (part / "copy").rename(target)
    except OSError:  # another process was faster, or the disk is full: then it is compiled anew
        pass
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def kernel(function: Callable[..., None]) -> Any:
    """Compile a function of integers when a precision that needs it is first used, and keep the code on disk."""
    # It is called by its address: Python's way in is not made. Nothing here raises.
    dispatcher = _njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    folder = cache_folder()
    if folder is not None:
        # Numba reads its configuration now; a folder that became read-only: the code stays in memory.
        with suppress(RuntimeError), _lock, _replaced(numba_config, "CACHE_DIR", str(folder)):
            dispatcher.enable_caching()
    _kernels[function.__name__] = dispatcher
    return dispatcher


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function as a part of the kernels that call it.

    It is put in its caller's place before compilation: a function of its own would go through LLVM once for itself and
    once more for every caller above it.
    """
    return _njit(nogil=True, error_model="numpy", inline="always")(function)


class _NoCopies:
    """In place of the module `copy` in Numba's inliner, which copies each block twice, with all variables each time.

    That takes two thirds of the time that our kernels need to compile, for the same machine code: a helper's IR was
    made for the caller alone.
    """

    @staticmethod
    def deepcopy(block: Any) -> Any:
        return block


def compile_kernel(name: str) -> Any:
    """Numba's result for one kernel, compiled or loaded now if need be; others who compile meanwhile wait."""
    dispatcher = _kernels[name]
    if not dispatcher.signatures:
        with global_compiler_lock, _replaced(_inliner, "copy", _NoCopies):
            dispatcher.compile((types.int64,) * ARGUMENTS[name])
    (compiled,) = dispatcher.overloads.values()
    return compiled
