"""Agreement with fair-esm on random weights of the true 35M shape, on every backend, by DESIGN.md's rule for float32.

The judge is our own float64 run, which test_reference.py holds against fair-esm in float64.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from conftest import ALL, assert_float32_rule, random_sequence

from numpyesm import ESM2

torch = pytest.importorskip("torch")
pytest.importorskip("esm")

from fair_esm_models import as_checkpoint, fair_esm_model, largest, tokens_of  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LAYERS = [0, 6, 12]
# Largest differences, where averages or few numbers leave torch too small an error to compare with.
ALLOWED = {"per_token_0": 1e-6, "mean": 1e-4, "bos": 1e-4, "attentions": 1e-5}


@cache
def models(seed: int, sharpness: float) -> tuple[Any, ESM2, list[ESM2]]:
    """The same weights in fair-esm, in our float64 reference and in float32 on each backend."""
    fair = fair_esm_model(seed, sharpness)
    checkpoint = as_checkpoint(fair)
    backends = ["numpy", *(["compiled"] if find_spec("numba") else [])]
    exact = ESM2(checkpoint, backend="numpy", precision="fp64", threads=2)
    return fair, exact, [ESM2(checkpoint, backend=backend, threads=2) for backend in backends]


PEAKED = 2, 2.5  # attention; and contacts spread over 0 to 1
EVEN = 0, 1.0  # fair-esm's own initialisation gives every position about the same attention


def run_fair_esm(fair: Any, sequence: str) -> dict[str, np.ndarray]:
    """fair-esm's outputs of the residues, named as `EncodeResult.to_arrays` does."""
    with torch.no_grad():
        out = fair(tokens_of([sequence]), repr_layers=LAYERS, return_contacts=True)
    found = {"logits": out["logits"][0, 1:-1, 4:24], "contacts": out["contacts"][0]}
    return {name: values.numpy() for name, values in found.items()} | {
        f"per_token_{layer}": values[0, 1:-1].numpy() for layer, values in out["representations"].items()
    }


# Few residues make few numbers: several sequences of a short length are judged together.
BATCHES = {
    **{str(n): [random_sequence(n, seed) for seed in range(40)] for n in (1, 2, 3)},
    "33": [random_sequence(33, seed) for seed in range(8)],
    "257": [random_sequence(257)],
    "unusual letters": ["BXZUO-", "-", "X" * 40, "ACDBXZUO-EFGHIKLMNPQRSTVWY", "MKT-----AYIAK"],
    "600": [random_sequence(600)],  # 1022 and 2048 residues: test_trained_parity.py
}


@pytest.mark.parametrize(("weights", "batch"), [*((PEAKED, batch) for batch in BATCHES), (EVEN, "33"), (EVEN, "257")])
def test_float32_rule(weights: tuple[int, float], batch: str) -> None:
    sequences, (reference, exact, backends) = BATCHES[batch], models(*weights)
    fair = [run_fair_esm(reference, sequence) for sequence in sequences]
    truth = [result.to_arrays() for result in exact.encode(sequences, LAYERS, ALL)]
    for model in backends:
        found = [result.to_arrays() for result in model.encode(sequences, LAYERS, ALL)]
        for name in found[0]:
            allowed = ALLOWED.get(name, ALLOWED.get(name.split("_")[0]))
            if allowed is None:
                assert_float32_rule(name, *([arrays[name] for arrays in side] for side in (found, truth, fair)))
            else:
                for one, right in zip(found, truth, strict=True):
                    assert largest(one[name], right[name]) < allowed, (repr(model), name)
    if (weights, batch) == (PEAKED, "257"):  # contacts far from 0 and 1: else agreement would show nothing
        contacts = truth[0]["contacts"]
        assert (contacts > 0.5).any()
        assert ((contacts > 0.05) & (contacts < 0.95)).mean() > 0.05
