"""Agreement with transformers on a trained model: all layers, attentions, logits, contacts, from 1 to 2048 residues.

The judge is reference.py. Up to 300 residues it is held against transformers in float64 with the checkpoint's own
frequencies, which takes tens of gigabytes at 2048.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trained_weights
from conftest import BACKENDS, assert_float32_rule, outputs_of_reference

from numpyesm import ESM2, reference
from numpyesm.alphabet import tokenize

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.trained_weights, pytest.mark.parity, pytest.mark.slow]

LENGTHS = (1, 2, 10, 76, 300, 1022, 2048)
LONGEST_IN_FLOAT64, LONGEST_FOR_MAPS = 300, 1022  # torch holds every attention map
LAYERS = range(trained_weights.LAYERS + 1)

Outputs = dict[str, np.ndarray]


def sequence_of(length: int) -> str:
    """Natural text of any length: real proteins, one behind the other."""
    return "".join(trained_weights.real_proteins().values())[:length]


def outputs_of_transformers(length: int, dtype: Any) -> Outputs:
    model = trained_weights.transformers_model(dtype, random_contacts=True)
    tokens = torch.from_numpy(tokenize([sequence_of(length)])[0].astype(np.int64))[None]
    maps = length <= LONGEST_FOR_MAPS
    with torch.no_grad(), trained_weights.exact_rotary():
        found = model(tokens, output_hidden_states=True, output_attentions=maps)
        outputs = {f"per_token_{n}": found.hidden_states[n][0, 1:-1].numpy() for n in LAYERS}
        outputs["logits"] = found.logits[0, 1:-1, 4:24].numpy()
        if maps:
            attentions = [one[0].mean(dim=(0, 1))[1:-1].numpy() for one in found.attentions]
            outputs["attentions"] = np.stack(attentions)
            del found
            outputs["contacts"] = model.predict_contacts(tokens, torch.ones_like(tokens))[0].numpy()
    return outputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_weights.write_hugging_face(tmp_path_factory.mktemp("trained"), random_contacts=True)


@pytest.fixture(scope="module", params=LENGTHS)
def truth(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[int, Outputs, Outputs]:
    """Length, outputs in float64, and transformers' in float32."""
    length = request.param
    weights = reference.nested(ESM2.from_pretrained(checkpoint, backend="numpy").checkpoint)
    exact = outputs_of_reference(weights, tokenize([sequence_of(length)])[0])
    if length <= LONGEST_IN_FLOAT64:
        for name, values in outputs_of_transformers(length, torch.float64).items():
            assert np.abs(values - exact[name]).max() < 1e-9, name
    return length, exact, outputs_of_transformers(length, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_as_exact_as_torch(truth: tuple[int, Outputs, Outputs], checkpoint: Path, backend: str) -> None:
    length, exact, torchs = truth
    include = ["per_token", "logits", "attentions", "contacts"]
    (result,) = ESM2.from_pretrained(checkpoint, backend=backend).encode([sequence_of(length)], LAYERS, include)
    for name, values in result.to_arrays().items():
        assert_float32_rule(name, [values], [exact[name]], [torchs[name]] if name in torchs else None)
