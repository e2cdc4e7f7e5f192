"""Rotary frequencies are part of a checkpoint. That every backend uses them, test_reference.py shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from numpyesm.config import ModelConfig
from numpyesm.weights import convert, load_checkpoint
from numpyesm.weights.checkpoint import computed_frequencies

mk = pytest.importorskip("make_checkpoints")
pytestmark = pytest.mark.usefixtures("quick_calibration")

SHAPE = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, ffn_dim=256)


def test_without_any_the_formula_counts(tmp_path: Path) -> None:
    state = {n: tensor for n, tensor in mk.hugging_face_state(mk.fair_esm_model()).items() if "inv_freq" not in n}
    checkpoint = load_checkpoint(mk.write_hugging_face(tmp_path / "hf", state))
    np.testing.assert_array_equal(checkpoint.array("rotary.frequencies"), computed_frequencies(mk.TINY.head_dim))
    for head_dim in (2, 16, 24, 32, 64):
        fresh = mk.esm.rotary_embedding.RotaryEmbedding(head_dim).inv_freq
        np.testing.assert_array_equal(computed_frequencies(head_dim), fresh)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_conversion_keeps_them(tmp_path: Path, precision: str) -> None:
    theirs = mk.fair_esm_model(SHAPE)
    converted = convert(mk.write_fair_esm(tmp_path / "m.pt", theirs), tmp_path / "c.safetensors", dtype=precision)
    expected = theirs.layers[0].self_attn.rot_emb.inv_freq.numpy()
    assert not np.array_equal(expected, computed_frequencies(SHAPE.head_dim))
    np.testing.assert_array_equal(load_checkpoint(converted.path).array("rotary.frequencies"), expected)
