"""Numeric backends: the same passes on NumPy or on compiled kernels."""

from __future__ import annotations

import importlib.util

from ..errors import InvalidOption, MissingExtra, warn
from ..options import PRECISIONS, check_backend, check_precision
from ..threads import WorkerPool
from ..weights.checkpoint import Checkpoint
from .base import Kernels
from .compiled.code import Code
from .compiled.library import find_library

_HOW = "pip install './packaging/kernels' from a clone (compiled ahead of time) or 'numpyesm[fast]' (Numba)"


def make_kernels(
    checkpoint: Checkpoint,
    backend: str = "auto",
    precision: str = "fp32",
    *,
    in_place: bool = False,
    pool: WorkerPool | None = None,
) -> Kernels:
    """Lay the weights out for a backend, by the workers of `pool` if there is one.

    `auto` is the library of compiled kernels where one is installed, else Numba if it is there and can keep what it
    compiles, else NumPy. `in_place` leaves all matrices in the mapped file, where the backend can: less memory for a
    little time.

    Raises
    ------
    InvalidOption
        An unknown backend or precision, a precision that the backend does not have, or a library that was named and
        cannot be used.
    MissingExtra
        The compiled backend without a library and without Numba.
    """
    backend = check_backend(backend)
    # fp64 is for tests; it is not offered to users.
    if precision != "fp64":
        check_precision(precision)
    elif backend == "compiled":
        raise InvalidOption("precision='fp64': the compiled backend does not have it")
    code, reason = None, "as asked"
    if backend != "numpy" and precision in PRECISIONS:
        code, reason = _compiled(precision, must=backend == "compiled" or precision != "fp32")
    if code is not None:
        from .compiled.forward import CompiledKernels

        return CompiledKernels(checkpoint, precision, code, pool or WorkerPool(1))
    if precision in ("bf16", "int8"):
        hint = "" if backend == "numpy" else f" ({reason}): {_HOW}"
        raise InvalidOption(
            f"precision={precision!r}: the numpy backend computes in fp32 only, the compiled backend has it{hint}"
        )
    if backend == "compiled":
        raise MissingExtra(f"backend='compiled': {reason}: {_HOW}")
    from .numpy_forward import NumpyKernels

    kernels = NumpyKernels(checkpoint, precision, in_place)
    kernels.origin = reason
    return kernels


def describe_kernels() -> str:
    """Return what `backend="auto"` runs on this machine, and why, without compiling anything."""
    found = find_library()
    if isinstance(found, Code):
        return str(found)
    if importlib.util.find_spec("numba") is None:
        return f"none, NumPy is used: {found}, and Numba is not installed"
    return f"by Numba, at first use: {found}"


def _compiled(precision: str, must: bool) -> tuple[Code | None, str]:
    """Compiled kernels, or None and why there are none; Numba that fails is an error if they `must` be had."""
    found = find_library()
    if isinstance(found, Code):
        return found, ""
    if importlib.util.find_spec("numba") is None:
        return None, f"{found}, and Numba is not installed"
    try:
        from .numba_.cache import cache_folder
        from .numba_.code import numba_code
    except (ImportError, AttributeError) as error:  # made for another NumPy; NUMBA_DISABLE_JIT
        if must:
            raise MissingExtra(f"the compiled backend cannot be used, Numba fails here: {error}") from error
        warn(f"using the slower NumPy backend, because Numba fails here: {error}")
        return None, f"{found}, and Numba fails here"
    if must or cache_folder() is not None:
        return numba_code(precision), ""
    warn(
        "using the slower NumPy backend, because no folder can be written to keep compiled kernels in: set "
        "NUMBA_CACHE_DIR, or ask for backend='compiled' to compile them in each process"
    )
    return None, f"{found}, and no folder for what Numba compiles"
