"""The published numbers of ESM-2 35M, where the official weights are (see weights/README.md)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numpyesm import ESM2
from numpyesm.fasta import read_fasta
from numpyesm.verification import compare_with_reference

CONTACTS_WITHIN = 0.02


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


def cosine(a: Any, b: Any) -> Any:
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.mark.official_weights
@pytest.mark.parametrize(
    ("precision", "mean", "residue", "same"), [("bf16", 0.9999, 0.999, 0.99), ("int8", 0.999, 0.99, 0.97)]
)
def test_gates_of_low_precision(precision: str, mean: float, residue: float, same: float) -> None:
    """The gates that random weights are held to in test_numba_model.py, on real proteins and pieces of them."""
    pytest.importorskip("numba")
    from numpyesm.kernels.numba_.isa import host_isa

    if precision not in host_isa().precisions:
        pytest.skip(f"{host_isa().name} has no {precision}")
    whole = [record.sequence for record in read_fasta(Path(str(files("numpyesm") / "data" / "example_proteins.fasta")))]
    sequences = whole + [sequence[:length] for sequence, length in zip(whole, (20, 33, 60), strict=False)]
    outputs = ["mean", "per_token", "contacts", "logits"]
    exact_model = ESM2.from_pretrained("esm2-35m", backend="numpy")
    assert not exact_model.checkpoint.synthetic
    truth = exact_model.encode(sequences, [6, -1], outputs)
    found = ESM2.from_pretrained("esm2-35m", backend="numba", precision=precision).encode(sequences, [6, -1], outputs)
    agree = []
    for sequence, ours, exact in zip(sequences, found, truth, strict=True):
        for layer in (6, 12):
            assert cosine(ours.embeddings[layer], exact.embeddings[layer]) >= mean, (sequence, layer)
            rows = cosine(ours.per_token_embeddings[layer], exact.per_token_embeddings[layer])
            assert rows.min() >= residue, (sequence, layer, int(rows.argmin()))
        agree.append(ours.logits.argmax(axis=1) == exact.logits.argmax(axis=1))
    assert np.concatenate(agree).mean() >= same
    worst = [float(np.abs(ours.contacts - exact.contacts).max()) for ours, exact in zip(found, truth, strict=True)]
    assert max(worst) <= CONTACTS_WITHIN, dict(zip(map(len, sequences), worst, strict=True))
