"""Rotary frequencies are part of a checkpoint: read from every kind of file, and used by every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.checkpoint import computed_frequencies

mk = pytest.importorskip("make_checkpoints")
models = pytest.importorskip("fair_esm_models")
torch = mk.torch
pytestmark = pytest.mark.usefixtures("quick_calibration")

SHAPE = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, ffn_dim=256)
SEQUENCE = random_sequence(300, 4)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """fair-esm in float64, with attention sharp enough that an angle matters."""
    with torch.no_grad():
        return models.fair_esm_model(3, 4.0, SHAPE).double()


@pytest.fixture(scope="module")
def truth(theirs: Any) -> Any:
    with torch.no_grad(), models.float64_softmax():
        return theirs(models.tokens_of([SEQUENCE]), repr_layers=[2])["representations"][2][0, 1:-1].numpy()


def deviation(path: Path, truth: Any, **options: Any) -> float:
    found = ESM2.from_pretrained(path, **options).encode([SEQUENCE], [2], ["per_token"])[0].per_token_embeddings[2]
    return models.largest(found, truth) / float(np.abs(truth).max())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("backend", "precision", "within"), [("numpy", "fp64", 1e-6), ("numpy", "fp32", 2e-5), ("numba", "fp32", 2e-5)]
)
def test_stored_frequencies_are_used(
    tmp_path: Path, theirs: Any, truth: Any, backend: str, precision: str, within: float, suffix: str
) -> None:
    pytest.importorskip(backend)
    path = mk.write_fair_esm(tmp_path / "m.pt", theirs.float())
    theirs.double()
    if suffix == ".safetensors":
        path = convert(path, tmp_path / "m.safetensors").path
    assert deviation(path, truth, backend=backend, precision=precision) < within


def test_computed_frequencies_would_be_seen(tmp_path: Path, theirs: Any, truth: Any) -> None:
    content = mk.fair_esm_content(theirs.float())
    theirs.double()
    content["model"] = {name: tensor for name, tensor in content["model"].items() if "inv_freq" not in name}
    torch.save(content, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="no contact regression"):
        assert deviation(tmp_path / "m.pt", truth, backend="numpy") > 1e-3


def test_without_any_the_formula_counts(tmp_path: Path) -> None:
    model = mk.fair_esm_model()
    state = {name: tensor for name, tensor in mk.hugging_face_state(model).items() if "inv_freq" not in name}
    checkpoint = load_checkpoint(mk.write_hugging_face(tmp_path / "hf", state))
    fresh = mk.esm.rotary_embedding.RotaryEmbedding(mk.TINY.head_dim).inv_freq
    np.testing.assert_array_equal(checkpoint.array("rotary.frequencies"), fresh)
    for head_dim in (2, 16, 24, 32, 64):
        fresh = mk.esm.rotary_embedding.RotaryEmbedding(head_dim).inv_freq
        np.testing.assert_array_equal(computed_frequencies(head_dim), fresh)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_conversion_keeps_them(tmp_path: Path, precision: str) -> None:
    model = mk.fair_esm_model(SHAPE)
    converted = convert(mk.write_fair_esm(tmp_path / "m.pt", model), tmp_path / "c.safetensors", dtype=precision)
    expected = model.layers[0].self_attn.rot_emb.inv_freq.numpy()
    assert not np.array_equal(expected, computed_frequencies(SHAPE.head_dim))
    np.testing.assert_array_equal(converted.checkpoint.array("rotary.frequencies"), expected)
