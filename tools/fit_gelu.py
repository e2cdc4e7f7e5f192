"""Fit the polynomial of the NumPy backend's GELU, and measure its error.

    gelu(x) = x Φ(x) = x / (1 + exp(-v(x))),   v(x) = logit Φ(x) = x P(x²)

P is fitted on 0 < x <= 6 by Lawson's reweighted least squares, each point weighted by how much an error of P there
changes gelu. Run `python tools/fit_gelu.py`; the coefficients stand in numpyesm/kernels/constants.py.
"""

from __future__ import annotations

import math

import numpy as np

DEGREE = 6
ITERATIONS = 400


def fit(degree: int = DEGREE) -> tuple[list[float], float]:
    """Coefficients of P, highest power first, and the largest error of gelu in exact arithmetic."""
    x = np.linspace(1e-3, 6.0, 6000)
    upper = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in x])
    lower = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    target = (np.log(lower) - np.log(upper)) / x
    # d gelu / d P = x · Φ(1-Φ) · x, or as seen by Φ itself where x < 1
    effect = lower * upper * x * np.maximum(1, x)
    powers = np.vander(x * x, degree + 1)
    weight = np.ones_like(x)
    for _ in range(ITERATIONS):
        scale = np.sqrt(weight) * effect
        coefficients = np.linalg.lstsq(powers * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs((powers @ coefficients - target) * effect)
        weight *= error / error.max() + 1e-3
        weight /= weight.max()
    return coefficients.tolist(), float(error.max())


if __name__ == "__main__":
    found, largest = fit()
    print(f"largest error {largest:.1e}")
    print("\n".join(f"    {value!r}," for value in found))
