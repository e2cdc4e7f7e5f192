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
from safetensors.numpy import save_file

from numpyesm.errors import CheckpointError, WeightsNotFound
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


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"who": "me", "ünï": "cödé"})
    return path


def test_round_trip(tmp_path, written):
    tensors, metadata = read_safetensors(written)
    assert metadata == {"who": "me", "ünï": "cödé"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
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


def test_official_library_reads_what_we_write(written):
    torch = pytest.importorskip("torch")  # the NumPy side of safetensors has no bfloat16
    from safetensors.torch import load_file

    theirs = load_file(written)
    assert theirs.keys() == TENSORS.keys()
    assert theirs["a.first"].dtype == torch.bfloat16
    np.testing.assert_array_equal(theirs["a.first"].view(torch.uint16).numpy(), TENSORS["a.first"].raw)
    np.testing.assert_array_equal(theirs["b.second"].numpy(), TENSORS["b.second"].raw)


def test_we_read_what_the_official_library_writes(tmp_path):
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(4), "odd": np.zeros(3, np.float16)}
    save_file(arrays, tmp_path / "y.safetensors", metadata={"format": "pt"})
    tensors, metadata = read_safetensors(tmp_path / "y.safetensors")
    assert metadata == {"format": "pt"}
    assert tensors["ids"].dtype == "I64"
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors[name].raw, array)


def test_misaligned_data_are_copied(tmp_path):
    values = np.array([1, 2, 3], np.float32)
    header = {"x": entry([3], 1, 13), "pad": entry([1], 0, 1, "U8")}
    tensors, _ = read_safetensors(raw_file(tmp_path / "m.safetensors", header, b"\0" + values.tobytes()))
    np.testing.assert_array_equal(tensors["x"].raw, values)
    assert tensors["x"].raw.flags.aligned


def test_every_truncation_is_an_error(tmp_path, written):
    whole = written.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_safetensors(cut)
    cut.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        read_safetensors(cut)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[]", b""),
        (b"[" * 100_000, b""),
        ({"x": {"dtype": "F32"}}, b""),
        ({"x": entry([2], 0, 4)}, b"1234"),
        ({"x": entry([-1], 0, 4)}, b"1234"),
        ({"x": entry([1], 4, 0)}, b"1234"),
        ({"x": entry([1], -4, 0)}, b"1234"),
        ({"x": entry([1], 0, 8, "C64")}, b"12345678"),
        ({"x": entry([1 << 62, 1 << 62], 0, 4)}, b"1234"),
        ({"x": entry([1 << 40], 0, 1 << 42)}, b"1234"),
        ({"x": entry([1] * 100, 0, 4)}, b"1234"),
        ({"x": entry([1], 4, 8)}, b"12345678"),  # a hole
        ({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, b"1234"),  # an overlap
        ({"__metadata__": {"a": 1}}, b""),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        (b'{"x":%b,"x":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"1234"),  # a name twice
    ],
)  # fmt: skip
def test_impossible_headers(tmp_path, header, data):
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read_safetensors(path)
    assert len(str(caught.value)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 63, (1 << 64) - 1])
def test_impossible_header_lengths(tmp_path, length):
    path = raw_file(tmp_path / "bad.safetensors", {"x": entry([1], 0, 4)}, b"1234", length=length)
    with pytest.raises(CheckpointError):
        read_safetensors(path)
    header = {f"t{i}": entry([0], 0, 0) for i in range(10_000)}
    with pytest.raises(CheckpointError, match="too long"):  # for so small a file
        read_safetensors(raw_file(path, header))


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


def test_absent_and_empty_files(tmp_path):
    with pytest.raises(WeightsNotFound, match="does not exist"):
        read_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match="is empty"):
        read_safetensors(tmp_path / "empty.safetensors")


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
