"""Numeric backends: the same steps on NumPy or on compiled kernels."""

from __future__ import annotations

import importlib.util
import warnings

from ..errors import InvalidOption, MissingExtra
from ..weights.checkpoint import Checkpoint
from .base import Kernels

BACKENDS = ("auto", "numpy", "numba")
PRECISIONS = ("fp32", "bf16", "int8")


def make_kernels(
    checkpoint: Checkpoint, backend: str = "auto", precision: str = "fp32", *, in_place: bool = False
) -> Kernels:
    """Kernels of the named backend with the weights laid out for it; `auto` is numba where it is installed.

    `in_place` leaves all matrices in the mapped file, where the backend can: less memory for a little time.

    Raises
    ------
    InvalidOption
        An unknown backend or precision, or a precision that the backend or the CPU does not have.
    MissingExtra
        The numba backend without Numba.
    """
    if backend not in BACKENDS:
        raise InvalidOption(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    # fp64 is the reference precision of the tests; it is not offered to users.
    if precision not in (*PRECISIONS, "fp64"):
        raise InvalidOption(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
    if backend == "numba" or (backend == "auto" and precision in PRECISIONS and _numba_available()):
        if not _numba_available():
            raise MissingExtra("backend='numba' needs Numba: pip install 'numpyesm[fast]'")
        if precision == "fp64":
            raise InvalidOption("precision='fp64': the numba backend does not have it")
        try:
            from .numba_.kernels import NumbaKernels
        except (ImportError, AttributeError) as error:  # made for another NumPy; NUMBA_DISABLE_JIT
            if backend == "numba" or precision != "fp32":
                raise MissingExtra(f"the numba backend cannot be used, Numba fails here: {error}") from error
            warnings.warn(f"using the slower NumPy backend, because Numba fails here: {error}", stacklevel=4)
        else:
            return NumbaKernels(checkpoint, precision)
    if precision in ("bf16", "int8"):
        hint = "" if _numba_available() else " (it is not installed: pip install 'numpyesm[fast]')"
        raise InvalidOption(
            f"precision={precision!r}: the numpy backend computes in fp32 only, the numba backend has it{hint}"
        )
    from .numpy_forward import NumpyKernels

    return NumpyKernels(checkpoint, precision, in_place)


def _numba_available() -> bool:
    """Whether `import numba` would find something; looked up without importing it."""
    return importlib.util.find_spec("numba") is not None
