"""Weights as bytes: `convert --dtype int8`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

from numpyesm import CheckpointError
from numpyesm.weights import load_checkpoint, save_canonical
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import GROUP, StoredTensor


def test_groups_are_rounded_to_half_a_level() -> None:
    weight = np.random.default_rng(0).standard_normal((2 * GROUP + 10, 7)).astype(np.float32)
    weight[:, 3] = 0
    weight[GROUP : 2 * GROUP] *= 100  # which costs the other groups nothing
    stored = StoredTensor(weight).stored_as("I8")
    assert stored.raw.dtype == np.int8
    assert stored.scale is not None
    assert stored.scale.shape == (3, 7)
    assert np.abs(stored.raw).max() == 127
    steps = np.repeat(stored.scale, GROUP, axis=0)[: len(weight)]
    assert (np.abs(stored.astype(np.float32) - weight) <= steps / 2 * 1.0001).all()
    assert (stored.raw[:, 3] == 0).all()


def test_file_holds_bytes_and_keeps_the_sensitive_parts(tmp_path: Path) -> None:
    whole = random_checkpoint(SMALL)
    save_canonical(tmp_path / "x.safetensors", whole, precision="int8")
    found = load_checkpoint(tmp_path / "x.safetensors")
    assert found.precision == "int8"
    for name, tensor in found.tensors.items():
        if tensor.dtype == "I8":
            assert name.startswith("layers.")
            rounded = whole.tensors[name].stored_as("I8")
            np.testing.assert_array_equal(tensor.raw, rounded.raw)
            np.testing.assert_array_equal(found.array(name), rounded.astype(np.float32))
        else:
            np.testing.assert_array_equal(found.array(name), whole.array(name))
    assert sum(t.dtype == "I8" for t in found.tensors.values()) == 4 * SMALL.num_layers


def test_quantising_again_changes_nothing(tmp_path: Path) -> None:
    save_canonical(tmp_path / "a.safetensors", random_checkpoint(SMALL), precision="int8")
    once = load_checkpoint(tmp_path / "a.safetensors")
    save_canonical(tmp_path / "b.safetensors", once)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    save_canonical(tmp_path / "c.safetensors", once, precision="fp32")
    again = load_checkpoint(tmp_path / "c.safetensors").tensors["layers.0.fc1.weight"].stored_as("I8")
    np.testing.assert_array_equal(again.raw, once.tensors["layers.0.fc1.weight"].raw)


def test_bytes_without_their_scale_are_refused(tmp_path: Path) -> None:
    save_canonical(tmp_path / "a.safetensors", random_checkpoint(SMALL), precision="int8")
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    del tensors["layers.0.fc1.weight.scale"]
    write_safetensors(tmp_path / "b.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight\.scale"):
        load_checkpoint(tmp_path / "b.safetensors")
    ffn = SMALL.ffn_dim  # one scale a column is how int8 was stored before
    for shape in ((3, ffn), (ffn,)):
        tensors["layers.0.fc1.weight.scale"] = StoredTensor(np.ones(shape, np.float32))
        write_safetensors(tmp_path / "c.safetensors", tensors, metadata)
        with pytest.raises(CheckpointError, match="wrong shape: convert the original again"):
            load_checkpoint(tmp_path / "c.safetensors")
