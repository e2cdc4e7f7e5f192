"""The canonical file: same numbers out as in, quickly, and nothing else is taken for one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from numpyesm.config import PRESETS, ModelConfig
from numpyesm.errors import CheckpointError, InvalidOption
from numpyesm.weights import load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import CONTACT_HEAD, LM_HEAD, Checkpoint
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.synthetic import parse_synthetic, random_checkpoint
from numpyesm.weights.tensor import StoredTensor

TINY = ModelConfig(2, 40, 20, 160)


@pytest.fixture
def tiny():
    return random_checkpoint(TINY, seed=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_round_trip(tmp_path, tiny, precision):
    path = tmp_path / "x.safetensors"
    save_canonical(path, tiny, precision=precision)
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.source, loaded.precision, loaded.synthetic) == (TINY, tiny.source, precision, True)
    for name, tensor in tiny.tensors.items():
        ours, exact = loaded.array(name), tensor.astype()
        outside = precision == "bf16" and not name.startswith("layers.")
        if precision == "fp32" or ours.ndim == 1 or outside:
            np.testing.assert_array_equal(ours, exact)
            assert loaded.tensors[name].dtype == "F32"
        else:
            np.testing.assert_allclose(ours, exact, rtol={"fp16": 2**-11, "bf16": 2**-8}[precision], atol=1e-7)
            assert loaded.tensors[name].dtype == {"fp16": "F16", "bf16": "BF16"}[precision]


def test_heads_may_be_absent(tmp_path, tiny):
    tensors = {name: tensor for name, tensor in tiny.tensors.items() if name not in LM_HEAD + CONTACT_HEAD}
    save_canonical(tmp_path / "x.safetensors", Checkpoint(TINY, tensors, source="trunk"))
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert not loaded.has_lm_head
    assert not loaded.has_contact_head
    assert not loaded.synthetic
    assert "synthetic" not in loaded.metadata


def test_a_file_is_mapped_not_copied(tmp_path, tiny):
    save_canonical(tmp_path / "x.safetensors", tiny)
    array = load_checkpoint(tmp_path / "x.safetensors").array("layers.1.fc1.weight")
    assert not array.flags.owndata
    assert array.ctypes.data % 64 == 0
    assert array.flags.c_contiguous


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "1"}, "format version '1'.*convert the original checkpoint again"),
        ({"format_version": "3"}, "format version '3'.*update numpyesm"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"precision": "fp16"}, "stored as F32, expected F16"),
        ({"config": None}, "configuration"),
        ({"config": "[]"}, "configuration"),
        ({"config": "[" * 100_000}, "configuration"),
        ({"config": PRESETS["esm2-8m"].to_json()}, "is missing|has shape"),
        ({"config": ModelConfig(3, 40, 20, 160).to_json()}, "is missing"),
        ({"config": ModelConfig(1, 40, 20, 160).to_json()}, "has shape|not part"),
        ({"config": '{"num_layers": 1e9, "embed_dim": 1, "num_heads": 1, "ffn_dim": 1}'}, "num_layers"),
    ],
)
def test_wrong_metadata(tmp_path, tiny, change, message):
    path = tmp_path / "x.safetensors"
    save_canonical(path, tiny)
    tensors, metadata = read_safetensors(path)
    metadata = {key: value for key, value in (metadata | change).items() if value is not None}
    write_safetensors(tmp_path / "y.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "y.safetensors")
    assert "y.safetensors" in str(caught.value)


def test_float16_overflow(tmp_path, tiny):
    big = tiny.array("layers.0.fc1.weight").copy()
    big[0, 0] = 1e6
    tensors = dict(tiny.tensors) | {"layers.0.fc1.weight": StoredTensor(big)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight.*fp16.*bf16"):
        save_canonical(tmp_path / "x.safetensors", Checkpoint(TINY, tensors, source="big"), precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_unknown_precision(tmp_path, tiny):
    with pytest.raises(InvalidOption, match="fp8"):
        save_canonical(tmp_path / "x.safetensors", tiny, precision="fp8")


def test_synthetic_is_deterministic():
    first, again, other = (random_checkpoint(TINY, seed) for seed in (3, 3, 4))
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.raw, again.tensors[name].raw)
    assert not np.array_equal(first.array("embed_tokens.weight"), other.array("embed_tokens.weight"))
    used = np.count_nonzero(random_checkpoint(ModelConfig(12, 40, 20, 160)).array("contact_head.weight"))
    assert 40 <= used <= 80


@pytest.mark.parametrize("spec", ["synthetic:", "synthetic:esm2-4b", "synthetic:esm2-8m:x", "synthetic:esm2-8m:-1",
                                  "synthetic:esm2-8m:1:2", "synthetic:esm2-8m:", "other"])  # fmt: skip
def test_bad_synthetic_specs(spec):
    with pytest.raises(InvalidOption, match="synthetic"):
        parse_synthetic(spec)


def test_opening_a_canonical_file_imports_little(tmp_path, tiny):
    save_canonical(tmp_path / "x.safetensors", tiny)
    code = (
        "import sys; from numpyesm.weights import load_checkpoint, resolve\n"
        f"load_checkpoint(resolve({str(tmp_path / 'x.safetensors')!r}))\n"
        "heavy = {'huggingface_hub', 'torch', 'numpyesm.weights.torch_file', 'numpyesm.weights.hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
