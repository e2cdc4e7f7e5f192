"""Fit the polynomials of GELU, gelu(x) = x Φ(x), and measure their errors.

exact    x / (1 + exp(-x P(x²))): x P(x²) is logit Φ(x), fitted on 0 < x <= 6 (numpyesm/kernels/constants.py)
coarse   x (1/2 + x P(x²)), which is x from 4.25 on (numpyesm/kernels/numba_/emitter.py)

By Lawson's reweighted least squares, each point weighted by how much an error of P there changes gelu.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_normal = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))  # Φ


def fit(degree: int = 6) -> tuple[list[float], float]:
    """Coefficients of P, highest power first, and the largest error of gelu in exact arithmetic."""
    x = np.linspace(1e-3, 6.0, 6000)
    upper, lower = _normal(-x), _normal(x)
    # d gelu / d P = x · Φ(1-Φ) · x, or as seen by Φ itself where x < 1
    return _minimax(x, degree, (np.log(lower) - np.log(upper)) / x, lower * upper * x * np.maximum(1, x))


def fit_coarse(degree: int = 7, largest: float = 4.25) -> tuple[list[float], float]:
    """The same; P(x²) = 1 / 2c + (x² - c²) R(x²) makes Φ one at c, the largest x."""
    x = np.linspace(1e-3, largest, 6000)[:-1]
    rest = x * x - largest**2
    found, error = _minimax(x, degree - 1, ((_normal(x) - 0.5) / x - 0.5 / largest) / rest, x * x * np.abs(rest))
    return (np.poly1d(found) * np.poly1d([1, -(largest**2)]) + 0.5 / largest).coef.tolist(), error


def _minimax(x: Array, degree: int, target: Array, effect: Array) -> tuple[list[float], float]:
    """Coefficients of a polynomial in x², and its largest error times `effect`."""
    powers, weight = np.vander(x * x, degree + 1), np.ones_like(x)
    for _ in range(400):
        scale = np.sqrt(weight) * effect
        coefficients = np.linalg.lstsq(powers * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs((powers @ coefficients - target) * effect)
        weight *= error / error.max() + 1e-3
        weight /= weight.max()
    return coefficients.tolist(), float(error.max())


if __name__ == "__main__":
    for found, largest in (fit(), fit_coarse()):
        print(f"largest error {largest:.1e}", *(f"    {value!r}," for value in found), sep="\n")
