"""The library of kernels that was compiled ahead of time: where it is looked for, and what it must be.

In this order: `NUMPYESM_KERNELS` (a file, a folder, or `none`), the package `numpyesm-kernels`, the cache, where
`numpyesm warmup` leaves it. Only a library from the same sources is called: its tables are laid out alike.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ...errors import InvalidOption, warn
from ...weights.cache import cache_dir
from .code import ARGUMENTS, Code, kernel_sources, symbol
from .isa import architecture, host_isa, levels, wanted_levels

# Changes when functions are called in another way; what is in the tables, the checksum of the sources tells.
ABI = 1
VARIABLE = "NUMPYESM_KERNELS"
_CACHE = "kernels"  # folder in the cache
# Of an ELF file's header: its kind, the machine, where the table of sections begins, its items' size and number.
_ELF = struct.Struct("<18s H 20x Q 10x H H 2x")
_ELF_MAGIC = b"\x7fELF\x02\x01"
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
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


def find_library() -> Code | str:
    """Return the kernels of the best level that the library and this CPU have, or why there are none.

    Raises
    ------
    InvalidOption
        `NUMPYESM_KERNELS` names a library that is not there or does not fit, or `NUMPYESM_ISA` a level that this CPU
        does not have.
    """
    return _find(os.environ.get(VARIABLE, "").strip())


@cache
def _find(named: str) -> Code | str:
    if os.environ.get("NUMPYESM_ISA"):
        wanted_levels()  # raises if it cannot be had, whatever there is to run
    if named.lower() == "none":
        return f"{VARIABLE}={named}"
    if named:
        path = Path(named).expanduser().resolve()  # without a folder, the system would look in its own
        found = _open(path / library_name() if path.is_dir() else path)
        if isinstance(found, str):
            raise InvalidOption(f"{VARIABLE}={named}: {found}")
        return found
    refused = ""
    for path in _installed():
        if path.is_file():
            found = _open(path)
            if not isinstance(found, str):
                return found
            refused = refused or found
    if refused:
        warn(f"the compiled kernels are not used: {refused}")
    return refused or "no library of kernels"


def forget_library() -> None:
    """Look again next time: one has been made."""
    _find.cache_clear()


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
    if path.stat().st_size < _elf_header(path)[1]:  # opening it would end the process
        return f"{path} is incomplete: build or install it again"
    try:
        library = ctypes.CDLL(str(path))
        found = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(library, "numpyesm_abi"))).value
    except (OSError, ValueError) as error:
        return f"{path} is no library of kernels for this machine ({error})"
    if found != abi().encode():
        return _other_sources(path)
    for isa in wanted_levels().values():
        if hasattr(library, symbol(isa, "run_phases")):
            addresses = {
                name: ctypes.cast(getattr(library, symbol(isa, name)), ctypes.c_void_p).value or 0
                for name in ARGUMENTS
                if hasattr(library, symbol(isa, name))
            }
            return Code(isa, "library", addresses, path)
    return f"{path} has no kernels for {', '.join(wanted_levels())}"


def _other_sources(path: Path) -> str:
    return f"{path} was built from other sources than this numpyesm: build or install it again"


def _elf_header(path: Path) -> tuple[int, int]:
    """Machine of an ELF file, and how many bytes it must have at least; zeros for other files."""
    with open(path, "rb") as file:
        header = file.read(_ELF.size)
    if len(header) < _ELF.size or not header.startswith(_ELF_MAGIC):
        return 0, 0
    _, machine, sections_at, section_size, sections = _ELF.unpack(header)
    return machine, sections_at + section_size * sections


def levels_in(path: Path, target: str) -> list[str] | str:
    """Return the levels of a Linux library for an architecture, maybe another one, or why it is none for it.

    Nothing of the file is run.
    """
    content, (machine, least) = path.read_bytes(), _elf_header(path)
    if machine != _ELF_MACHINES[target] or len(content) < least:
        return f"{path} is no library of kernels for Linux on {target}"
    if abi().encode() + b"\0" not in content:
        return _other_sources(path)
    return [isa.name for isa in levels(target).values() if symbol(isa, "run_phases").encode() + b"\0" in content]
