"""Where compiled code is kept, and the decorator that compiles and keeps it.

Compiled code depends on the CPU, the instruction set in use, Numba, and our own sources: each combination has its own
folder, so that no process finds another's. Numba writes each file under a temporary name and renames it: several
processes may start at once. A folder holds one signature of each function only, so they write the same names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba.core import config as _config

from ..._version import __version__
from .isa import host_isa

numba_config: Any = _config  # its settings are not declared

# Dispatchers with their one signature, by precision; "all" is needed by each.
_registry: dict[str, list[tuple[Any, Any]]] = {"all": [], "fp32": [], "bf16": [], "int8": []}
_lock = threading.Lock()
_ready: set[str] = set()


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
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    features = ",".join(sorted(name for name, present in llvm.get_host_cpu_features().items() if present))
    digest.update(f"{features} {numba_config.CPU_NAME} {numba_config.CPU_FEATURES}".encode())
    parts = (f"numpyesm-{__version__}", f"numba-{numba.__version__}", llvm.get_host_cpu_name(), host_isa().name)
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
def _numba_writes_to(folder: Path) -> Iterator[None]:
    """Numba takes the folder from its configuration at the moment a function is decorated."""
    with _lock:
        before = numba_config.CACHE_DIR
        numba_config.CACHE_DIR = str(folder)
        try:
            yield
        finally:
            numba_config.CACHE_DIR = before


def kernel(precisions: str | tuple[str, ...], *arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a function for these argument types when one of `precisions` is first used, and keep the code on disk.

    Parameters
    ----------
    precisions : str or tuple of str
        Of `fp32`, `bf16`, `int8`; `all` for what every precision needs.
    arguments : Numba types
    """

    def decorate(function: Callable[..., None]) -> Any:
        dispatcher = numba.njit(nogil=True)(function)
        folder = cache_folder()
        if folder is not None:
            # A folder that became read-only: the code stays in memory.
            with suppress(RuntimeError), _numba_writes_to(folder):
                dispatcher.enable_caching()
        for precision in (precisions,) if isinstance(precisions, str) else precisions:
            _registry[precision].append((dispatcher, arguments))
        return dispatcher

    return decorate


def helper(function: Callable[..., Any] | None = None, *, fastmath: Any = False) -> Any:
    """Compile a function as a part of the kernels that call it.

    Without `fastmath` it is put in its caller's place before compilation: a function of its own would go through LLVM
    once for itself and once more for every caller above it.
    """
    if function is None:
        return lambda inner: helper(inner, fastmath=fastmath)
    return numba.njit(nogil=True, fastmath=fastmath, inline="never" if fastmath else "always")(function)


def entry(dispatcher: Any) -> int:
    """Address of a compiled function, for `vectors.call_kernel`."""
    (compiled,) = dispatcher.overloads.values()
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


def signatures() -> list[int]:
    """How many versions there are of each kernel that has been prepared."""
    return [len(dispatcher.signatures) for group in ("all", *_ready) for dispatcher, _ in _registry[group]]


def prepare(precision: str) -> None:
    """Load or compile what `precision` needs; says so on stderr when it has to compile."""
    if precision in _ready:
        return
    folder = cache_folder()
    mark = None if folder is None else folder / f"{precision}.ready"
    if mark is None or not mark.exists():
        sys.stderr.write("numpyesm: compiling kernels for this CPU (once, some seconds) ...\n")
        sys.stderr.flush()
    for group in ("all", precision):
        for dispatcher, arguments in _registry[group]:
            if not dispatcher.signatures:
                dispatcher.compile(arguments)
    if mark is not None:
        with suppress(OSError):
            mark.touch()
    _ready.add(precision)
