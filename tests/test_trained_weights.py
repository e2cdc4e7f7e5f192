"""The trained test bed: transformers and fair-esm agree on it in float64, and its proteins cover the lengths."""

from __future__ import annotations

import pytest
import trained_weights

from numpyesm.alphabet import AMINO_ACIDS


def test_proteins_are_many_and_of_every_length() -> None:
    lengths = sorted(map(len, trained_weights.real_proteins().values()))
    assert len(lengths) >= 20
    assert 20 <= lengths[0] < 25
    assert 600 < lengths[-1] <= 700
    assert set("".join(trained_weights.real_proteins().values())) == set(AMINO_ACIDS)


@pytest.mark.trained_weights
@pytest.mark.parity
@pytest.mark.slow
def test_both_references_agree_in_float64() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from fair_esm_models import float64_softmax, tokens_of

    tokens = tokens_of([trained_weights.real_proteins()["ubiquitin"]])
    fair = trained_weights.fair_esm_model()
    theirs = trained_weights.transformers_model()
    with torch.no_grad(), float64_softmax(), trained_weights.exact_rotary():
        expected = fair(tokens, repr_layers=range(7), return_contacts=True)
        found = theirs(tokens, output_hidden_states=True)
        contacts = theirs.predict_contacts(tokens, torch.ones_like(tokens))
    for layer in range(7):
        assert (found.hidden_states[layer] - expected["representations"][layer]).abs().max() < 1e-9
    assert (found.logits - expected["logits"]).abs().max() < 1e-9
    assert (contacts - expected["contacts"]).abs().max() < 1e-9
    # The regression is trained: it finds ubiquitin's first hairpin, strands 1 to 7 and 10 to 17.
    assert min(contacts[0, 1, 13], contacts[0, 3, 11]) > 0.9
