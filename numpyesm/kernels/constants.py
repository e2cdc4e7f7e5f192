"""Numbers that every backend computes with."""

from __future__ import annotations

LAYER_NORM_EPSILON = 1e-5

# gelu(x) = x / (1 + exp(-x P(x²))): P is a minimax fit of logit(Φ(x)) / x, highest power first, weighted by its effect
# on the result; the largest error against the exact erf form is 7e-8 (tools/fit_gelu.py).
GELU_POLYNOMIAL = (
    3.6187271938271902e-09,
    -2.67293764072034e-07,
    7.946226863840827e-06,
    -0.00011055588674078872,
    -6.590950812169469e-05,
    0.07266782266675867,
    1.5957689853266488,
)
