"""Numeric backends: the same passes on NumPy or on compiled kernels."""

from __future__ import annotations

import importlib.util
import warnings

from ..errors import InvalidOption, MissingExtra
from ..options import PRECISIONS, check_backend, check_precision
from ..weights.checkpoint import Checkpoint
from .base import Kernels


def make_kernels(
    checkpoint: Checkpoint, backend: str = "auto", precision: str = "fp32", *, in_place: bool = False
) -> Kernels:
    """Lay the weights out for a backend; `auto` is the compiled one if Numba is there and can keep what it compiles.

    `in_place` leaves all matrices in the mapped file, where the backend can: less memory for a little time.

    Raises
    ------
    InvalidOption
        An unknown backend or precision, or a precision that the backend or the CPU does not have.
    MissingExtra
        The compiled backend without Numba.
    """
    backend = check_backend(backend)
    # fp64 is for tests; it is not offered to users.
    if precision != "fp64":
        check_precision(precision)
    if backend == "compiled" or (backend == "auto" and precision in PRECISIONS and _numba_available()):
        if not _numba_available():
            raise MissingExtra("backend='compiled' needs Numba: pip install 'numpyesm[fast]'")
        if precision == "fp64":
            raise InvalidOption("precision='fp64': the compiled backend does not have it")
        try:
            from .numba_.cache import cache_folder
            from .numba_.kernels import NumbaKernels
        except (ImportError, AttributeError) as error:  # made for another NumPy; NUMBA_DISABLE_JIT
            if backend == "compiled" or precision != "fp32":
                raise MissingExtra(f"the compiled backend cannot be used, Numba fails here: {error}") from error
            warnings.warn(f"using the slower NumPy backend, because Numba fails here: {error}", stacklevel=4)
        else:
            if backend == "compiled" or precision != "fp32" or cache_folder() is not None:
                return NumbaKernels(checkpoint, precision)
            warnings.warn(
                "using the slower NumPy backend, because no folder can be written to keep compiled kernels in: set "
                "NUMBA_CACHE_DIR, or ask for backend='compiled' to compile them in each process",
                stacklevel=4,
            )
    if precision in ("bf16", "int8"):
        hint = "" if _numba_available() else " (it is not installed: pip install 'numpyesm[fast]')"
        raise InvalidOption(
            f"precision={precision!r}: the numpy backend computes in fp32 only, the compiled backend has it{hint}"
        )
    from .numpy_forward import NumpyKernels

    return NumpyKernels(checkpoint, precision, in_place)


def _numba_available() -> bool:
    """Whether `import numba` would find something; looked up without importing it."""
    return importlib.util.find_spec("numba") is not None
