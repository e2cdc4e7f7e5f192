"""Which sources kernels are made from, as one hash: code from other sources has other tables and is not called."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ...weights.tensor import GROUP

_ROOM = Path(__file__).parents[1]
_BESIDE = ("compiled/code.py", "compiled/isa.py", "compiled/layout.py", "compiled/panels.py", "constants.py")


@cache
def kernel_sources() -> str:
    """SHA-256 of all that decides what the compiled code does."""
    digest = hashlib.sha256(f"int8 in groups of {GROUP}".encode())
    for path in [*sorted((_ROOM / "numba_").glob("*.py")), *(_ROOM / name for name in _BESIDE)]:
        # As in the repository, whatever a checkout on Windows made of the ends of lines.
        digest.update(path.name.encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()
