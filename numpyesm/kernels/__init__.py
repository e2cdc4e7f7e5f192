"""Numeric backends: the same steps on NumPy or on compiled kernels."""

from __future__ import annotations

from ..errors import InvalidOption
from ..weights.checkpoint import Checkpoint
from .base import Kernels

BACKENDS = ("auto", "numpy", "numba")
PRECISIONS = ("fp32", "bf16", "int8")


def make_kernels(checkpoint: Checkpoint, backend: str = "auto", precision: str = "fp32") -> Kernels:
    """Kernels of the named backend with the weights laid out for it.

    Raises
    ------
    InvalidOption
        An unknown backend or precision, or a precision that the backend does not have.
    """
    if backend not in BACKENDS:
        raise InvalidOption(f"backend={backend!r}: allowed are {', '.join(BACKENDS)}")
    # fp64 is the reference precision of the tests; it is not offered to users.
    if precision not in (*PRECISIONS, "fp64"):
        raise InvalidOption(f"precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
    if backend == "numba":
        raise InvalidOption("backend='numba' is not part of this version yet; use backend='numpy' or 'auto'")
    if precision in ("bf16", "int8"):
        raise InvalidOption(f"precision={precision!r}: the numpy backend computes in fp32 only")
    from .reference_numpy import NumpyKernels

    return NumpyKernels(checkpoint, precision)
