"""The published numbers of ESM-2 35M, where the official weights are (see weights/README.md)."""

from __future__ import annotations

import pytest

from numpyesm import ESM2
from numpyesm.verification import compare_with_reference


@pytest.mark.official_weights
@pytest.mark.parametrize("backend", ["numpy", "auto"])
def test_reference_numbers(backend: str) -> None:
    model = ESM2.from_pretrained("esm2-35m", backend=backend)
    assert not model.checkpoint.synthetic
    failed = [comparison for comparison in compare_with_reference(model) if not comparison.passed]
    assert failed == []


@pytest.mark.official_weights
def test_official_contact_head_is_sparse() -> None:
    weight = ESM2.from_pretrained("esm2-35m").checkpoint.array("contact_head.weight")
    assert (weight != 0).sum() == 61
