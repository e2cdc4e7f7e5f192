"""`convert` and `load_checkpoint`: whatever comes in, one canonical file or one clear sentence."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle

import numpy as np
import pytest

from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import Checkpoint
from numpyesm.weights.synthetic import random_checkpoint

TINY = ModelConfig(2, 40, 20, 160)
pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture
def canonical(tmp_path):
    synthetic = random_checkpoint(TINY)
    save_canonical(
        tmp_path / "tiny.safetensors", Checkpoint(TINY, synthetic.tensors, source="m.pt", source_sha256="ab")
    )
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize("name", ["in.pt", "folder", "folder/pytorch_model.bin"])
def test_every_source(tmp_path, name):
    mk = pytest.importorskip("make_checkpoints")
    model = mk.fair_esm_model()
    source = weights = mk.write_fair_esm(tmp_path / "in.pt", model)
    if name != "in.pt":
        mk.write_hugging_face(tmp_path / "folder", mk.hugging_face_state(model), binary=name != "folder")
        source = weights = tmp_path / name
        weights = source / "model.safetensors" if name == "folder" else source
    result = convert(source, tmp_path / "out" / "x.safetensors")
    mk.expect_same_model(result.checkpoint, model)
    assert result.path == tmp_path / "out" / "x.safetensors"
    assert result.checkpoint.source == source.name
    assert result.checkpoint.source_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    mk.expect_same_model(load_checkpoint(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["weights.dat", "weights.safetensors", "weights"])
def test_content_counts_not_the_name(tmp_path, name):
    mk = pytest.importorskip("make_checkpoints")
    model = mk.fair_esm_model()
    mk.write_fair_esm(tmp_path / "in.pt", model)
    (tmp_path / "in.pt").rename(tmp_path / name)
    regression = tmp_path / "in-contact-regression.pt"
    mk.expect_same_model(load_checkpoint(tmp_path / name, regression=regression), model)


def test_dtype_of_a_canonical_file_changes_and_provenance_stays(tmp_path, canonical):
    half = convert(canonical, tmp_path / "half.safetensors", dtype="fp16").checkpoint
    assert (half.precision, half.source, half.source_sha256) == ("fp16", "m.pt", "ab")
    back = convert(tmp_path / "half.safetensors", tmp_path / "back.safetensors").checkpoint
    assert (back.precision, back.source, back.source_sha256) == ("fp32", "m.pt (through fp16)", "ab")
    np.testing.assert_array_equal(back.array("layers.0.qkv.weight"), half.array("layers.0.qkv.weight"))


def test_synthetic_source_and_folder_output(tmp_path):
    result = convert("synthetic:esm2-8m:5", tmp_path / "weights", dtype="bf16")
    assert result.path == tmp_path / "weights" / "synthetic-esm2-8m-bf16.safetensors"  # not a real model's name
    assert result.checkpoint.synthetic
    assert result.checkpoint.source == "synthetic:esm2-8m:5"
    assert load_checkpoint("synthetic:esm2-8m:5").config == result.checkpoint.config


def test_converting_twice_gives_the_same_bytes(tmp_path, canonical):
    for name in "ab":
        convert(canonical, tmp_path / f"{name}.safetensors", dtype="bf16")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_source_is_never_overwritten(tmp_path, canonical):
    os.link(canonical, tmp_path / "same.safetensors")
    before = canonical.read_bytes()
    for output in (canonical, tmp_path / "." / canonical.name, tmp_path / "same.safetensors"):
        with pytest.raises(InvalidOption, match="source itself"):
            convert(canonical, output, dtype="fp16")
    assert canonical.read_bytes() == before


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path, canonical, monkeypatch):
    asked = []
    monkeypatch.setattr("numpyesm.weights.rounding.calibration_sequences", lambda: asked.append(1) or ["MK"])
    with pytest.raises(OSError, match="cannot be written"):
        convert(canonical, canonical / "x.safetensors", dtype="int8")
    assert not asked
    convert(canonical, tmp_path / "x.safetensors", dtype="int8")
    assert asked


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"output": "x.pt"}, {"source": "synthetic:x"}])
def test_wrong_use(tmp_path, canonical, options):
    arguments = {"source": canonical, "output": "x.safetensors", "dtype": "fp32"} | options
    with pytest.raises(InvalidOption):
        convert(arguments["source"], tmp_path / arguments["output"], dtype=arguments["dtype"])
    assert os.listdir(tmp_path) == ["tiny.safetensors"]


NOT_CHECKPOINTS = {
    "empty": (b"", "is empty"),
    "text": (b"hello\nworld\n", "text file"),
    "short": (b"x", "text file"),
    "fasta": (b">a\nMKTAYIAKQR\n", "text file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
    "gzip": (gzip.compress(b"x" * 99), "gzip-compressed"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "pickle": (pickle.dumps({"a": 1}), "Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "not one that torch.save wrote"),
    "noise": (b"\xe0\x01\x02" * 99, "neither"),
    "zeros": (bytes(1000), "neither"),
    "header only": (b"\x02" + bytes(7) + b"{}", "no named tensors"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_no_checkpoint_is_one_sentence_and_leaves_nothing(tmp_path, name, suffix):
    content, message = NOT_CHECKPOINTS[name]
    path = tmp_path / f"in{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "out.safetensors")
    text = str(caught.value)
    assert message in text or (suffix == ".safetensors" and "safetensors" in text)
    assert str(path) in text
    assert "\n" not in text
    assert os.listdir(tmp_path) == [path.name]


def test_places_without_weights(tmp_path, canonical):
    with pytest.raises(WeightsNotFound, match=r"none\.pt does not exist"):
        convert(tmp_path / "none.pt", tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFound, match="holds no weights"):
        load_checkpoint(tmp_path / "empty")
    convert(canonical, tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a fair-esm checkpoint"):
        load_checkpoint(canonical, regression=canonical)
