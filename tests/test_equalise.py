"""Outlier channels before int8: the same function, and no bits lost to them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2
from numpyesm.config import ModelConfig
from numpyesm.weights.checkpoint import Checkpoint
from numpyesm.weights.equalise import equalised
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

WIDTH, OUTLIERS, FACTOR = 160, (3, 77, 150), 32.0


def with_outliers(factor: float = FACTOR) -> Checkpoint:
    """Three channels behind each LayerNorm `factor` times larger, and read by weights as much smaller."""
    checkpoint = random_checkpoint(ModelConfig(3, WIDTH, 10, 640))
    tensors = dict(checkpoint.tensors)
    for layer in range(3):
        for norm, matrix in (("attention_norm", "qkv"), ("ffn_norm", "fc1")):
            for name, times in ((f"{norm}.weight", factor), (f"{norm}.bias", factor), (f"{matrix}.weight", 1 / factor)):
                values = tensors[f"layers.{layer}.{name}"].astype(np.float32).copy()
                values[list(OUTLIERS)] *= np.float32(times)
                tensors[f"layers.{layer}.{name}"] = StoredTensor(values)
    return replace(checkpoint, tensors=tensors)


def test_nothing_changes_in_float32() -> None:
    checkpoint = with_outliers()
    changed = equalised(checkpoint)
    gain, before = (c.array("layers.1.ffn_norm.weight", np.float32) for c in (changed, checkpoint))
    assert np.abs(gain).max() < np.abs(before).max() / 8, "the outliers are gone"
    sequences = [random_sequence(n) for n in (1, 40, 130)]
    results = [
        ESM2(c, backend="numpy").encode(sequences, include=["per_token", "logits"]) for c in (checkpoint, changed)
    ]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.per_token_embeddings[3], other.per_token_embeddings[3])
        np.testing.assert_array_equal(one.logits, other.logits)


@pytest.mark.parametrize("broken", [0.0, np.inf, np.nan])
def test_odd_channels_are_left_alone(broken: float) -> None:
    checkpoint = with_outliers()
    name = "layers.0.attention_norm.weight"
    values = checkpoint.array(name, np.float32).copy()
    values[5] = broken
    bias = checkpoint.array("layers.0.attention_norm.bias", np.float32).copy()
    bias[5] = 0
    tensors = {**checkpoint.tensors, name: StoredTensor(values), "layers.0.attention_norm.bias": StoredTensor(bias)}
    with np.errstate(all="raise"):
        changed = equalised(replace(checkpoint, tensors=tensors))
    np.testing.assert_array_equal(changed.array(name, np.float32)[5], values[5])
    assert np.isfinite(np.delete(changed.array(name, np.float32), 5)).all()


@pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")
def test_outliers_cost_no_accuracy() -> None:
    from numpyesm.kernels.numba_.isa import host_isa

    if "int8" not in host_isa().precisions:
        pytest.skip(f"{host_isa().name} has no int8")
    sequences = [random_sequence(n) for n in (60, 200)]

    def error(checkpoint: Checkpoint) -> float:
        found, truth = (
            ESM2(checkpoint, backend=backend, precision=precision).encode(sequences, include=["per_token"])
            for backend, precision in (("numba", "int8"), ("numpy", "fp32"))
        )
        pairs = [(a.per_token_embeddings[3], b.per_token_embeddings[3]) for a, b in zip(found, truth, strict=True)]
        return float(np.sqrt(np.mean([np.mean((a - b) ** 2) for a, b in pairs])))

    assert error(with_outliers()) < 1.1 * error(with_outliers(1.0))
