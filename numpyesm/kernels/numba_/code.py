"""Kernels that Numba compiles in this process, or loads from its cache."""

from __future__ import annotations

import sys
from contextlib import suppress

import numba

from ..compiled.code import Code, needed

# Importing them is what registers them.
from . import attention, layer, runner  # noqa: F401
from .cache import cache_folder, compile_kernel
from .emitter import ISA

_ready: dict[str, Code] = {}


def numba_code(precision: str) -> Code:
    """Load or compile what `precision` needs; says so on stderr when it has to compile."""
    if precision in _ready:
        return _ready[precision]
    folder = cache_folder()
    mark = None if folder is None else folder / f"{precision}.ready"
    if mark is None or not mark.exists():
        sys.stderr.write("numpyesm: compiling kernels for this CPU (once, some seconds) ...\n")
        sys.stderr.flush()
    addresses = {}
    for name in needed(ISA, precision):
        compiled = compile_kernel(name)
        addresses[name] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if mark is not None:
        with suppress(OSError):
            mark.touch()
    return _ready.setdefault(precision, Code(ISA, f"Numba {numba.__version__}", addresses))
