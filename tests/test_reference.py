"""`numpyesm.reference`, the judge of all backends, against fair-esm in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm.alphabet import TOKENS, tokenize
from numpyesm.config import PRESETS
from numpyesm.reference import forward, nested

torch = pytest.importorskip("torch")
pytest.importorskip("esm")

from fair_esm_models import as_checkpoint, fair_esm_model, float64_softmax, largest  # noqa: E402

pytestmark = pytest.mark.parity

# All 33 tokens in one sequence, `<pad>`, `<eos>` and `<mask>` in the middle of it.
EVERY_TOKEN = np.array([0, *range(1, len(TOKENS)), 5, 2], np.uint8)


def assert_equal_to_fair_esm(fair: Any, tokens: np.ndarray, weights: dict[str, Any]) -> None:
    layers = list(range(fair.num_layers + 1))
    with torch.no_grad(), float64_softmax():
        expected = fair(torch.from_numpy(tokens[None].astype(np.int64)), repr_layers=layers, return_contacts=True)
    found = forward(tokens, **weights)
    for layer in layers:
        assert largest(found["representations"][layer], expected["representations"][layer][0]) < 1e-9
    assert largest(found["logits"], expected["logits"][0]) < 1e-9
    assert largest(found["contacts"], expected["contacts"][0]) < 1e-9


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_random_weights(sharpness: float) -> None:
    fair = fair_esm_model(3, sharpness, PRESETS["esm2-8m"])
    weights = nested(as_checkpoint(fair))
    fair = fair.double()
    batch = tokenize(["M", "MK", "ACDEFGHIKLMNPQRSTVWYBXZUO-", random_sequence(70)])
    for tokens in (*batch, EVERY_TOKEN, np.array([0, 20, 32, 32, 15, 2], np.uint8)):
        assert_equal_to_fair_esm(fair, tokens, weights)
