"""Spearman's correlation: against SciPy, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numpyesm.scoring.correlation import average_ranks, spearman


def test_known_values() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    # Wikipedia's example of IQ and hours of television: -29/165.
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert spearman(iq, hours) == pytest.approx(-29 / 165, abs=1e-15)
    assert average_ranks([10, 20, 20, 5, 20]).tolist() == [2, 4, 4, 1, 4]


def test_missing_and_infinite_values() -> None:
    """A missing value leaves its pair out."""
    nan, inf = math.nan, math.inf
    assert spearman([1, nan, 2, 3, 9], [1, 5, 2, 3, nan]) == 1
    assert spearman([-inf, 0, inf], [1, 2, 3]) == 1
    for x, y in ([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, 2], [5, 5]), ([nan] * 3, [1, 2, 3]):
        assert math.isnan(spearman(x, y))
    with pytest.raises(ValueError, match="3 values on one side, 2 on the other"):
        spearman([1, 2, 3], [1, 2])


@pytest.mark.slow
@settings(deadline=None)  # SciPy takes seconds to import
@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-1e6, 1e6)), min_size=2, max_size=60))
def test_like_scipy(pairs: list[tuple[int, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = np.array(pairs, np.float64).T
    np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))
    if np.ptp(x) and np.ptp(y):
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    else:
        assert math.isnan(spearman(x, y))
