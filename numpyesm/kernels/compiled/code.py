"""Compiled kernels as this process calls them: functions at addresses, that take integers; and what they are made from.

Code from other sources has other tables and is not called.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...weights.tensor import GROUP
from .isa import Isa

# What decides what compiled code does, by name: what else lies in a folder is not part of it.
_ROOM = Path(__file__).parents[1]
SOURCES = (
    "constants.py",
    *(f"compiled/{name}.py" for name in ("code", "isa", "layout", "panels")),
    *(f"numba_/{name}.py" for name in ("__init__", "attention", "attention_tiles", "cache", "code", "emitter", "gemm")),
    *(f"numba_/{name}.py" for name in ("layer", "load", "rows", "runner", "steps", "tiles", "vectors")),
)

# How many integers each takes; `numba_/` says which.
ARGUMENTS = {
    "run_phases": 5,
    "lm_head": 8,
    "attend": 12,
    "attend_bf16": 12,
    "layer_norm": 9,
    "linear": 19,
    "linear_bf16": 19,
    "pack_weights": 9,
    "add_mean": 7,
}


def symbol(isa: Isa, name: str) -> str:
    """Name of a kernel of one level in a library of all of them."""
    return f"numpyesm_{isa.name.replace('-', '_')}_{name}"


def needed(isa: Isa, precision: str) -> tuple[str, ...]:
    """Names of the kernels that a precision needs at a level.

    Attention; all other products; then what all precisions share, the LM head's products and short sequences' attention
    in float32 among it.
    """
    end = "_bf16" if isa.bf16 and precision != "fp32" else ""
    shared = "attend", "linear", "layer_norm", "run_phases", "lm_head", "pack_weights", "add_mean"
    return f"attend{end}", f"linear{end}", *shared


@dataclass(frozen=True)
class Code:
    """Kernels of one level.

    Attributes
    ----------
    isa : Isa
    made_by : str
        What compiled them: `library`, or Numba with its version.
    addresses : mapping from str to int
        Functions by name. In C: `int32_t f(void **result, void **error, int64_t, …)`, as Numba calls what it compiles;
        nothing is ever left in the two pointers.
    file : Path or None
        The library that they are in.
    """

    isa: Isa
    made_by: str
    addresses: Mapping[str, int]
    file: Path | None = None
    _functions: dict[str, Callable[..., int]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.isa.name}, {self.made_by}" + (f" {self.file}" if self.file else "")

    def call(self, name: str, *numbers: int) -> None:
        """Call a kernel; the interpreter's lock is free meanwhile."""
        function = self._functions.get(name)
        if function is None:
            import ctypes  # not everywhere; nothing else here needs it

            kinds = (ctypes.POINTER(ctypes.c_void_p),) * 2 + (ctypes.c_int64,) * ARGUMENTS[name]
            function = ctypes.CFUNCTYPE(ctypes.c_int32, *kinds)(self.addresses[name])
            function = functools.partial(function, ctypes.c_void_p(), ctypes.c_void_p())
            self._functions[name] = function
        function(*numbers)


@functools.cache
def kernel_sources() -> str:
    """Checksum of all that decides what compiled code does. `hashlib` alone would take 4 ms of a cold start."""
    found = zlib.crc32(f"int8 in groups of {GROUP}".encode())
    for name in SOURCES:
        # As in the repository, whatever a checkout on Windows made of the ends of lines.
        found = zlib.crc32(name.encode() + (_ROOM / name).read_bytes().replace(b"\r\n", b"\n"), found)
    return f"{found:08x}"
