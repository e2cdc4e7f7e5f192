"""The library of kernels that was compiled ahead of time: where it is looked for, and what it must be.

In this order: `NUMPYESM_KERNELS` (a file, a folder, or `none`), the package `numpyesm-kernels`, the cache, where
`numpyesm warmup` leaves it. Only a library from the same sources is called: its tables are laid out alike.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...errors import InvalidOption
from ...weights.cache import cache_dir
from .code import ARGUMENTS, Code, kernel_sources, symbol
from .isa import architecture, host_isa, wanted_levels

# Changes when functions are called in another way; what is in the tables, the checksum of the sources tells.
ABI = 1
VARIABLE = "NUMPYESM_KERNELS"
_CACHE = "kernels"  # folder in the cache
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def library_name() -> str:
    """File name of the library for this system and architecture."""
    return f"numpyesm-kernels-{architecture()}{_SUFFIX}"


def abi() -> str:
    """What a library must say of itself."""
    return f"{ABI} {kernel_sources()}"


def cached_library() -> Path:
    """Where the cache holds the library for these sources and this kind of CPU: clusters share home directories."""
    return cache_dir() / _CACHE / f"{kernel_sources()}-{host_isa().name}" / library_name()


def library_code() -> Code | None:
    """Return the kernels of the best level that the library and this CPU have; None without a library that fits.

    Raises
    ------
    InvalidOption
        `NUMPYESM_KERNELS` names one that is not there or does not fit.
    """
    return _code(os.environ.get(VARIABLE, "").strip())


@cache
def _code(named: str) -> Code | None:
    if named.lower() == "none":
        return None
    if named:
        path = Path(named).expanduser()
        path = path / library_name() if path.is_dir() else path
        code = _open(path)
        if isinstance(code, str):
            raise InvalidOption(f"{VARIABLE}={named}: {code}")
        return code
    for path in _installed():
        if path.is_file():
            code = _open(path)
            if not isinstance(code, str):
                return code
            warnings.warn(f"the compiled kernels are not used: {code}", stacklevel=4)
    return None


def _installed() -> Iterator[Path]:
    spec = importlib.util.find_spec("numpyesm_kernels")
    for folder in spec.submodule_search_locations or () if spec else ():
        yield Path(folder) / library_name()
    if (cache_dir() / _CACHE).is_dir():  # its name has a checksum of the sources, which takes longer than all the rest
        yield cached_library()


def _open(path: Path) -> Code | str:
    """The kernels of a library, or why they cannot be used."""
    if not path.is_file():
        return f"there is no file {path}"
    try:
        import ctypes
    except ImportError:
        return "this Python has no ctypes"
    try:
        library = ctypes.CDLL(str(path))
        found = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(library, "numpyesm_abi"))).value
    except (OSError, ValueError) as error:
        return f"{path} is no library of kernels for this machine ({error})"
    if found != abi().encode():
        return f"{path} was built from other sources than this numpyesm: build or install it again"
    for isa in wanted_levels().values():
        if hasattr(library, symbol(isa, "run_phases")):
            addresses = {
                name: ctypes.cast(getattr(library, symbol(isa, name)), ctypes.c_void_p).value or 0
                for name in ARGUMENTS
                if hasattr(library, symbol(isa, name))
            }
            return Code(isa, "library", addresses, path)
    return f"{path} has no kernels for {', '.join(wanted_levels())}"
