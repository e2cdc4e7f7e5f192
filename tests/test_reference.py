"""`numpyesm.reference`, the judge of all backends, against fair-esm in float64; and every backend against it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import trained_weights
from conftest import ALL, assert_close, outputs_of_reference, random_sequence

from numpyesm import ESM2
from numpyesm.alphabet import TOKENS, tokenize
from numpyesm.config import PRESETS
from numpyesm.options import Outputs
from numpyesm.reference import EOS, PAD, forward, nested

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


BACKENDS = [
    ("numpy", "fp64", 1e-9),
    ("numpy", "fp32", 2e-5),
    *([("compiled", "fp32", 2e-5)] * bool(find_spec("numba"))),
]


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_random_weights(sharpness: float) -> None:
    fair = fair_esm_model(3, sharpness, PRESETS["esm2-8m"])
    checkpoint = as_checkpoint(fair)
    weights = nested(checkpoint)
    fair = fair.double()
    batch = tokenize(["M", "MK", "ACDEFGHIKLMNPQRSTVWYBXZUO-", random_sequence(70)])
    batch += tokenize(["M<mask><mask>K", "<mask>" * 50], masks=True)
    for tokens in (*batch, EVERY_TOKEN):
        assert_equal_to_fair_esm(fair, tokens, weights)
    batch.append(EVERY_TOKEN[np.append(~np.isin(EVERY_TOKEN[:-1], (PAD, EOS)), True)])  # what a pass takes of them
    truth = [outputs_of_reference(weights, tokens) for tokens in batch]
    some = [np.arange(1, len(tokens) - 1, 3) for tokens in batch]
    for backend, precision, within in BACKENDS:
        model = ESM2(checkpoint, backend=backend, precision=precision, threads=2)
        found = model.passes.encode(batch, Outputs.check(checkpoint, range(7), ALL))
        for result, logits, rows, exact in zip(found, model.passes.logits(batch, some), some, truth, strict=True):
            assert_close(logits, exact["logits"][rows - 1], within)
            for name, values in result.to_arrays().items():
                assert_close(values, exact[name], within)


@pytest.mark.trained_weights
@pytest.mark.slow
def test_trained_weights() -> None:
    state = trained_weights.fair_esm_tensors(trained_weights.hugging_face_tensors())
    fair = fair_esm_model(0, config=PRESETS["esm2-8m"])
    assert not fair.load_state_dict(state, strict=False).missing_keys
    weights = nested(as_checkpoint(fair))
    ubiquitin = tokenize([trained_weights.real_proteins()["ubiquitin"]])[0]
    for tokens in (ubiquitin, EVERY_TOKEN):
        assert_equal_to_fair_esm(fair.double(), tokens, weights)
    # The regression is trained: it finds ubiquitin's first hairpin, strands 1 to 7 and 10 to 17.
    contacts = forward(ubiquitin, **weights)["contacts"]
    assert min(contacts[1, 13], contacts[3, 11]) > 0.9
