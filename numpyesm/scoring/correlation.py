"""Spearman's rank correlation, with ties and missing values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def average_ranks(values: npt.ArrayLike) -> FloatArray:
    """Rank from 1; equal values share the mean of their ranks: (n,) -> (n,)."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # rank of the last of each group of equals
    ranks: FloatArray = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Compute Pearson's correlation of the average ranks, over the pairs in which neither value is NaN.

    NaN where it is undefined: fewer than two pairs, or one side constant.
    """
    a, b = np.asarray(x, np.float64).ravel(), np.asarray(y, np.float64).ravel()
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values on one side, {len(b)} on the other")
    both = ~(np.isnan(a) | np.isnan(b))
    if np.count_nonzero(both) < 2:
        return float("nan")
    with np.errstate(invalid="ignore"):  # 0 / 0, if one side is constant
        return float(np.corrcoef(average_ranks(a[both]), average_ranks(b[both]))[0, 1])
