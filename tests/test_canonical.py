"""The canonical file, and `convert`, which makes it from whatever comes in, or ends in one clear sentence.

Its container, safetensors, is tested against the official library and against damage of every kind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors import deserialize

from numpyesm.config import ModelConfig
from numpyesm.errors import CheckpointError, InvalidOption, WeightsNotFound
from numpyesm.files import MappedFile
from numpyesm.weights import convert, load_checkpoint, save_canonical
from numpyesm.weights.checkpoint import Checkpoint
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.synthetic import parse_synthetic, random_checkpoint
from numpyesm.weights.tensor import GROUP, PRECISION_DTYPES, StoredTensor

TINY = ModelConfig(2, 40, 20, 160)
SCALE = "layers.0.fc1.weight.scale"
pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture
def tiny() -> Checkpoint:
    return random_checkpoint(TINY, seed=1)


@pytest.fixture
def canonical(tmp_path: Path, tiny: Checkpoint) -> Path:
    """A file that is not flagged synthetic."""
    path = tmp_path / "tiny.safetensors"
    save_canonical(path, replace(tiny, synthetic=False, source="m.pt", source_sha256="ab"))
    return path


# -- what a file holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISION_DTYPES)
def test_round_trip(tmp_path: Path, tiny: Checkpoint, precision: str) -> None:
    steps: list[tuple[int, int]] = []
    save_canonical(tmp_path / "x", tiny, precision=precision, progress=lambda *step: steps.append(step))
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {steps[-1][0]}
    loaded = load_checkpoint(tmp_path / "x")
    assert (loaded.config, loaded.source, loaded.precision, loaded.synthetic) == (TINY, tiny.source, precision, True)
    mapped = loaded.tensors["layers.1.fc1.weight"].raw
    assert (mapped.flags.owndata, mapped.flags.c_contiguous, mapped.flags.aligned) == (False, True, True)  # not copied
    for name, tensor in tiny.tensors.items():
        sensitive = tensor.raw.ndim == 1 or (precision in ("bf16", "int8") and not name.startswith("layers."))
        wanted = tensor if sensitive else tensor.stored_as(PRECISION_DTYPES[precision])
        assert loaded.tensors[name].dtype == wanted.dtype
        np.testing.assert_array_equal(loaded.tensors[name].raw, wanted.raw)
        np.testing.assert_array_equal(loaded.array(name), wanted.astype())
        rounding = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}.get(wanted.dtype)
        if rounding is not None:
            np.testing.assert_allclose(loaded.array(name), tensor.raw, rtol=rounding, atol=1e-7 if rounding else 0)


def test_groups_of_int8_are_rounded_to_half_a_level() -> None:
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


def test_quantising_again_changes_nothing(tmp_path: Path, tiny: Checkpoint) -> None:
    save_canonical(tmp_path / "a", tiny, precision="int8")
    once = load_checkpoint(tmp_path / "a")
    save_canonical(tmp_path / "b", once)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    save_canonical(tmp_path / "c", once, precision="fp32")
    again = load_checkpoint(tmp_path / "c").tensors["layers.0.fc1.weight"].stored_as("I8")
    np.testing.assert_array_equal(again.raw, once.tensors["layers.0.fc1.weight"].raw)


@pytest.mark.parametrize(
    ("precision", "change", "message"),
    [
        ("fp32", {"format_version": "1"}, "format version '1'.*convert the original checkpoint again"),
        ("fp32", {"format_version": "3"}, "format version '3'.*update numpyesm"),
        ("fp32", {"precision": "fp8"}, "precision 'fp8'"),
        ("fp32", {"precision": "fp16"}, "stored as F32, expected F16"),
        ("fp32", {"config": None}, "configuration"),
        ("fp32", {"config": "[]"}, "configuration"),
        ("fp32", {"config": "[" * 100_000}, "configuration"),
        ("fp32", {"config": ModelConfig(3, 40, 20, 160).to_json()}, "is missing"),
        ("fp32", {"config": ModelConfig(1, 40, 20, 160).to_json()}, "has shape|not part"),
        ("fp32", {"config": ModelConfig(10**9, 40, 20, 160).to_json()}, "1000000000 layers"),
        ("fp32", {"config": '{"num_layers": 1e9, "embed_dim": 1, "num_heads": 1, "ffn_dim": 1}'}, "num_layers"),
        ("int8", {SCALE: None}, r"layers\.0\.fc1\.weight\.scale"),
        ("int8", {SCALE: (160,)}, "wrong shape: convert the original again"),  # one a column, as it was stored before
    ],
)
def test_wrong_entries(tmp_path: Path, tiny: Checkpoint, precision: str, change: dict[str, Any], message: str) -> None:
    save_canonical(tmp_path / "x", tiny, precision=precision)
    tensors, metadata = read_safetensors(tmp_path / "x")
    for key, value in change.items():
        entries: dict[str, Any] = tensors if key == SCALE else metadata  # type: ignore[assignment]
        del entries[key]
        if value is not None:
            entries[key] = StoredTensor(np.ones(value, np.float32)) if key == SCALE else value
    write_safetensors(tmp_path / "y.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match=rf"y\.safetensors.*({message})"):
        load_checkpoint(tmp_path / "y.safetensors")


def test_what_cannot_be_stored(tmp_path: Path, tiny: Checkpoint) -> None:
    big = tiny.array("layers.0.fc1.weight").copy()
    big[0, 0] = 1e6
    tensors = dict(tiny.tensors) | {"layers.0.fc1.weight": StoredTensor(big)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc1\.weight.*fp16.*bf16"):
        save_canonical(tmp_path / "x", replace(tiny, tensors=tensors), precision="fp16")
    for output, precision in (("x", "fp8"), ("x.pt", "fp32")):
        with pytest.raises(InvalidOption, match=f"{precision}|x.pt must be"):
            convert("synthetic:esm2-8m", tmp_path / output, dtype=precision)
    assert list(tmp_path.iterdir()) == []


# -- synthetic weights -----------------------------------------------------------------------------------------------


def test_synthetic_is_deterministic() -> None:
    first, again, other = (random_checkpoint(TINY, seed) for seed in (3, 3, 4))
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.raw, again.tensors[name].raw)
    assert not np.array_equal(first.array("embed_tokens.weight"), other.array("embed_tokens.weight"))
    used = np.count_nonzero(random_checkpoint(ModelConfig(12, 40, 20, 160)).array("contact_head.weight"))
    assert 40 <= used <= 80


@pytest.mark.parametrize("spec", ["synthetic:", "synthetic:esm2-4b", "synthetic:esm2-8m:x", "synthetic:esm2-8m:-1",
                                  "synthetic:esm2-8m:1:2", "synthetic:esm2-8m:", "other"])  # fmt: skip
def test_bad_synthetic_specs(spec: str) -> None:
    with pytest.raises(InvalidOption, match="synthetic"):
        parse_synthetic(spec)


# -- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd.safetensors", "folder"])
def test_every_source_by_its_content_not_by_its_name(tmp_path: Path, name: str) -> None:
    mk = pytest.importorskip("make_checkpoints")
    source = weights = mk.write_fair_esm(tmp_path / "m.pt", mk.MODEL).rename(tmp_path / "odd.safetensors")
    regression: Path | None = tmp_path / "m-contact-regression.pt"
    if name == "folder":
        source, regression = mk.write_hugging_face(tmp_path / name, mk.hugging_face_state(mk.MODEL)), None
        weights = source / "model.safetensors"
    found = convert(source, tmp_path / "out" / "x.safetensors", regression=regression).checkpoint
    assert (found.source, found.source_sha256) == (name, hashlib.sha256(weights.read_bytes()).hexdigest())
    mk.expect_same_model(load_checkpoint(tmp_path / "out"), mk.MODEL)


def test_dtype_of_a_canonical_file_changes_and_provenance_stays(tmp_path: Path, canonical: Path) -> None:
    half = convert(canonical, tmp_path / "half.safetensors", dtype="fp16").checkpoint
    assert (half.precision, half.source, half.source_sha256, half.synthetic) == ("fp16", "m.pt", "ab", False)
    again = convert(canonical, tmp_path / "again.safetensors", dtype="fp16").path
    assert again.read_bytes() == (tmp_path / "half.safetensors").read_bytes()
    back = convert(tmp_path / "half.safetensors", tmp_path / "back.safetensors").checkpoint
    assert (back.precision, back.source, back.source_sha256) == ("fp32", "m.pt (through fp16)", "ab")
    np.testing.assert_array_equal(back.array("layers.0.qkv.weight"), half.array("layers.0.qkv.weight"))


def test_the_source_is_never_overwritten(tmp_path: Path, canonical: Path) -> None:
    os.link(canonical, tmp_path / "same.safetensors")
    before = canonical.read_bytes()
    for output in (canonical, tmp_path / "." / canonical.name, tmp_path / "same.safetensors"):
        with pytest.raises(InvalidOption, match="source itself"):
            convert(canonical, output, dtype="fp16")
    assert canonical.read_bytes() == before


def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, canonical: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("numpyesm.weights.rounding.calibration_sequences", lambda: asked.append(1) or ["MK"])
    with pytest.raises(OSError, match="cannot be written"):
        convert(canonical, canonical / "x.safetensors", dtype="int8")
    assert not asked
    convert(canonical, tmp_path / "x.safetensors", dtype="int8")
    assert asked


NOT_CHECKPOINTS = {
    "empty": (b"", "is empty"),
    "text": (b"hello\nworld\n", "text file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
    "pickle": (pickle.dumps({"a": 1}), "Python pickle"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "noise": (b"\xe0\x01\x02" * 99, "neither"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "header only": (b"\x02" + bytes(7) + b"{}", "no named tensors"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_no_checkpoint_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str, suffix: str) -> None:
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


def test_a_folder_without_weights_and_a_regression_too_many(tmp_path: Path, canonical: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsNotFound, match="holds no weights"):
        load_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="not a fair-esm checkpoint"):
        load_checkpoint(canonical, regression=canonical)


# -- safetensors ------------------------------------------------------------------------------------------------------


TENSORS = {
    "b.second": StoredTensor(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "a.first": StoredTensor(np.arange(5, dtype=np.uint16), "BF16"),
    "empty": StoredTensor(np.zeros((0, 3), np.float32)),
    "half": StoredTensor(np.array([1.5, -2], np.float16), "F16"),
    "double": StoredTensor(np.array([[1e300]]), "F64"),
}


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"who": "me", "ünï": "cödé"})
    return path


def test_tensors_and_metadata_come_back(tmp_path, written):
    tensors, metadata = read_safetensors(written)
    theirs = dict(deserialize(written.read_bytes()))  # by the official library
    assert metadata == {"who": "me", "ünï": "cödé"}
    assert tensors.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (theirs[name]["dtype"], theirs[name]["shape"]) == (tensor.dtype, list(tensor.shape))
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].raw.tobytes() == bytes(theirs[name]["data"]) == tensor.raw.tobytes()
    raw = tensors["b.second"].raw
    del tensors
    assert not raw.flags.owndata
    with pytest.raises(ValueError):
        raw[0, 0] = 1
    assert raw.sum() == 66  # the array alone keeps the map alive
    (length,) = struct.unpack("<Q", written.read_bytes()[:8])
    assert (8 + length) % 64 == 0  # data begin at a cache line
    write_safetensors(tmp_path / "again.safetensors", TENSORS, {"ünï": "cödé", "who": "me"})
    assert (tmp_path / "again.safetensors").read_bytes() == written.read_bytes()


def test_misaligned_data_are_copied(tmp_path):
    values = np.array([1, 2, 3], np.float32)
    x = {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]}
    header = {"x": x, "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    tensors, _ = read_safetensors(raw_file(tmp_path / "m.safetensors", header, b"\0" + values.tobytes()))
    np.testing.assert_array_equal(tensors["x"].raw, values)
    assert tensors["x"].raw.flags.aligned


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MANY = {f"t{i}": ONE | {"shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "damaged"),
        ({"x": ONE | {"shape": [1 << 62, 1 << 62]}}, "damaged"),
        ({"x": ONE, "y": ONE}, "damaged"),  # an overlap
        ({"x": ONE | {"shape": [2], "data_offsets": [0, 8]}}, "damaged, truncated"),
        (b'{"x":%b,"x":%b}' % ((json.dumps(ONE).encode(),) * 2), "a name appears twice"),
        ({"x": ONE | {"shape": [1] * 100}}, "of 100 dimensions"),
        ({"x": ONE | {"dtype": "F8_E8M0", "shape": [4]}}, "stored as 'F8_E8M0'|damaged"),  # of older versions
        (MANY, "too long"),  # for so small a file
    ],
)
def test_impossible_headers(tmp_path, header, message):
    path = raw_file(tmp_path / "bad.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors .*{message}") as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_mapped_are_checked(written, monkeypatch):
    """That they are read: test_small_memory.py."""
    monkeypatch.setattr(MappedFile, "open", Mock(side_effect=OSError(errno.ENODEV, "no such device")))
    written.write_bytes(written.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        read_safetensors(written)
    assert MappedFile.open.called
