"""The safetensors reader and writer, against the official library and against damage of every kind."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numpyesm.errors import CheckpointError
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.tensor import StoredTensor

TENSORS = {
    "b.second": StoredTensor(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "a.first": StoredTensor(np.arange(5, dtype=np.uint16), "BF16"),
    "empty": StoredTensor(np.zeros((0, 3), np.float32)),
    "half": StoredTensor(np.array([1.5, -2], np.float16), "F16"),
    "double": StoredTensor(np.array([[1e300]]), "F64"),
}


def raw_file(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"who": "me", "ünï": "cödé"})
    return path


def test_round_trip(tmp_path, written):
    tensors, metadata = read_safetensors(written)
    assert metadata == {"who": "me", "ünï": "cödé"}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {name: t.dtype for name, t in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert tensors[name].raw.size == tensor.raw.size
        if tensor.raw.size:
            np.testing.assert_array_equal(tensors[name].raw, tensor.raw)
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


def test_the_official_library_reads_what_we_write_and_writes_what_we_read(tmp_path, written):
    torch = pytest.importorskip("torch")  # the NumPy side of safetensors has no bfloat16
    from safetensors.torch import load_file, save_file

    theirs = load_file(written)
    assert theirs["a.first"].dtype == torch.bfloat16
    save_file(theirs | {"ids": torch.arange(4)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    tensors, metadata = read_safetensors(tmp_path / "theirs.safetensors")
    assert metadata == {"format": "pt"}
    assert tensors.pop("ids").dtype == "I64"
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].raw.tobytes() == tensor.raw.tobytes()


def test_misaligned_data_are_copied(tmp_path):
    values = np.array([1, 2, 3], np.float32)
    x = {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]}
    header = {"x": x, "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    tensors, _ = read_safetensors(raw_file(tmp_path / "m.safetensors", header, b"\0" + values.tobytes()))
    np.testing.assert_array_equal(tensors["x"].raw, values)
    assert tensors["x"].raw.flags.aligned


def test_every_truncation_is_an_error(tmp_path, written):
    whole = written.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for content in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        cut.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cut\.safetensors is (empty|damaged, truncated|not an intact)"):
            read_safetensors(cut)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "damaged"),
        ({"x": {"dtype": "F32"}}, "damaged"),
        ({"x": ONE | {"shape": [2]}}, "damaged"),
        ({"x": ONE | {"shape": [1 << 62, 1 << 62]}}, "damaged"),
        ({"x": ONE, "y": ONE}, "damaged"),  # an overlap
        ({"x": ONE, "__metadata__": {"a": 1}}, "damaged"),
        (b'{"\\ud800":%b}' % json.dumps(ONE).encode(), "damaged"),
        (b'{"x":%b,"x":%b}' % ((json.dumps(ONE).encode(),) * 2), "a name appears twice"),
        ({"x": ONE | {"shape": [1] * 100}}, "of 100 dimensions"),
        ({"x": ONE | {"dtype": "F8_E8M0", "shape": [4]}}, "stored as 'F8_E8M0', as quantised models are"),
    ],
)
def test_impossible_headers(tmp_path, header, message):
    path = raw_file(tmp_path / "bad.safetensors", header, b"1234")
    with pytest.raises(CheckpointError, match=rf"bad\.safetensors .*{message}") as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 400


def test_headers_out_of_proportion(tmp_path):
    path = tmp_path / "bad.safetensors"
    for length in (0, 1, 1 << 20, 1 << 63, (1 << 64) - 1):
        with pytest.raises(CheckpointError):
            read_safetensors(raw_file(path, {"x": ONE}, b"1234", length=length))
    with pytest.raises(CheckpointError, match="too long"):  # for so small a file
        read_safetensors(raw_file(path, {f"t{i}": ONE | {"shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}))


def test_files_that_cannot_be_mapped_are_read(written, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENODEV, "no such device")

    monkeypatch.setattr(mmap, "mmap", type("NoMap", (mmap.mmap,), {"__new__": refuse}))
    tensors, metadata = read_safetensors(written)
    assert metadata["who"] == "me"
    np.testing.assert_array_equal(tensors["b.second"].raw, TENSORS["b.second"].raw)
    written.write_bytes(written.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        read_safetensors(written)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_never_do_anything_else(written, changes):
    content = bytearray(written.read_bytes())
    for where, byte in changes:
        content[where % len(content)] = byte
    damaged = written.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        tensors, metadata = read_safetensors(damaged)
        assert all(tensor.raw.sum() is not None for tensor in tensors.values())
        assert all(isinstance(value, str) for value in metadata.values())
