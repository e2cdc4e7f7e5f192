"""Files of torch.save, read without torch."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from functools import partial

import numpy as np
import pytest
from test_hostile import Call

from numpyesm.errors import CheckpointError
from numpyesm.weights.load import load_checkpoint
from numpyesm.weights.safe_pickle import Inert
from numpyesm.weights.torch_file import read_torch

torch = pytest.importorskip("torch")


def rewrite(source, target, change=(), compression=zipfile.ZIP_STORED, folder="x"):
    """Copy a zip entry by entry; `change` maps names (without folder) to new content or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        entries = {name.partition("/")[2]: old.read(name) for name in old.namelist()} | dict(change)
        for name, content in entries.items():
            if content is not None:
                new.writestr(f"{folder}/{name}", content)
    return target


DTYPES = ["float16", "float64", "int64", "int32", "uint8", "bool", "uint16"]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "n": {"b": torch.ones(4, dtype=torch.float64)}}, path)
    return path


def test_dtypes_views_strides_sharing_and_parameters(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "column": base[:, 3],
        "scalar": torch.tensor(7.0),
        "parameter": torch.nn.Parameter(base[0].clone()),
        **{dtype: base.to(getattr(torch, dtype)) for dtype in DTYPES},
    }
    torch.save(content | {"none": torch.zeros(0, 3), "bfloat16": base.bfloat16()}, tmp_path / "t.pt")
    result = read_torch(tmp_path / "t.pt")
    assert result.pop("none").raw.size == 0
    np.testing.assert_array_equal(result.pop("bfloat16").raw, base.bfloat16().view(torch.uint16).numpy())
    for name, tensor in content.items():
        np.testing.assert_array_equal(result[name].raw, tensor.detach().numpy(), err_msg=name, strict=name != "bool")
    assert np.shares_memory(result["base"].raw, result["slice"].raw)
    with pytest.raises(ValueError):
        result["base"].raw[0, 0] = 1


def test_compressed_entries_and_any_folder_name(tmp_path, saved):
    packed = rewrite(saved, tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED, folder="any name")
    np.testing.assert_array_equal(read_torch(packed)["a"].raw, [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(CheckpointError, match="unusual method"):
        read_torch(rewrite(saved, tmp_path / "bz.pt", compression=zipfile.ZIP_BZIP2))


def test_every_truncation_is_an_error(tmp_path, saved):
    whole = saved.read_bytes()
    cut = tmp_path / "cut.pt"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            read_torch(cut)


@pytest.mark.slow
def test_no_flipped_bit_changes_a_number(tmp_path, saved):
    whole = saved.read_bytes()
    expected = np.arange(6.0).reshape(2, 3)
    flipped = tmp_path / "flipped.pt"
    refused = 0
    for position in range(0, len(whole), 2):
        content = bytearray(whole)
        content[position] ^= 1 << position // 2 % 8
        flipped.write_bytes(content)
        try:
            result = read_torch(flipped)
        except CheckpointError:
            refused += 1
            continue
        np.testing.assert_array_equal(result["a"].raw, expected)  # padding, dates and the like were hit
        np.testing.assert_array_equal(result["n"]["b"].raw, np.ones(4))
    assert refused > 150


def pickled(count, offset, shape, strides, key="0", kind="FloatStorage"):
    """A tensor as torch.save pickles it, with numbers that it would not write."""
    raw = lambda *values: b"".join(pickle.dumps(value, 2)[2:-1] for value in values)  # noqa: E731
    storage = b"(" + raw("storage") + f"ctorch\n{kind}\n".encode() + raw(key, "cpu", count) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + raw(offset, shape, strides, False, {}) + b"tR."


# A tuple of a tuple ..., each element twice, handed through a function that is known, as a key.
LAUGHS = b"\x80\x02}ctorch._utils\n_rebuild_parameter\n()" + b"q\x00h\x00\x86" * 9 + b"\x89}tRNs."
# A state could put anything in place of a tensor's numbers, behind every check.
TENSOR, STATE = pickled(6, 0, (2, 3), (3, 1)).removesuffix(b"."), b"}X\x03\x00\x00\x00rawNs"
# Tensors that are not in the six numbers of the file.
IMPOSSIBLE = [
    (7, 0, (2, 3), (3, 1)),
    (6, 1, (2, 3), (3, 1)),
    (6, -1, (2, 3), (3, 1)),
    (6, 0, (2, -3), (3, 1)),
    (6, 0, (2, 3), (-3, 1)),
    (6, 0, (2, 3), (1,)),
    (6, 0, (1 << 40,), (0,)),  # a small file that would fill the memory
    (6, 0, (1,) * 20, (1,) * 20),
    (6, 0, (2, 3), (3, 1), "../data.pkl"),
    (-6, 0, (2, 3), (3, 1)),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.pkl": TENSOR + STATE + b"b."}, "state is set on a tensor"),
        ({"data.pkl": TENSOR + b"N" + STATE + b"\x86b."}, "state is set on a tensor"),
        ({"data.pkl": None}, "not one that torch.save wrote"),
        ({"data/0": None}, "is missing"),
        ({"data/0": b"1234"}, "another size"),
        ({"data/0": b"123"}, "another size"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"garbage"}, "damaged or not a pickle"),
        ({"data.pkl": LAUGHS}, "a key is not allowed"),
        ({"data.pkl": bytes(5 << 20)}, "much more than a model"),
        *(({"data.pkl": pickled(*arguments)}, "corrupted") for arguments in IMPOSSIBLE),
    ],
)
def test_wrong_entries_and_impossible_tensors(tmp_path, saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch(rewrite(saved, tmp_path / "y.pt", change))


def test_unknown_storages_become_records(tmp_path, saved):
    content = pickled(3, 0, (3,), (1,), kind="ComplexFloatStorage")
    assert isinstance(read_torch(rewrite(saved, tmp_path / "y.pt", {"data.pkl": content})), Inert)


def test_zip_bombs(tmp_path, saved):
    change = {"data.pkl": pickled(1 << 22, 0, (1 << 22,), (1,)), "data/0": bytes(1 << 24)}
    with pytest.raises(CheckpointError, match="implausible size"):
        read_torch(rewrite(saved, tmp_path / "bomb.pt", change, zipfile.ZIP_DEFLATED))


MODULE = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (partial(torch.save, {"a": torch.ones(3)}, _use_new_zipfile_serialization=False), "re-save it"),
        (torch.jit.script(MODULE).save, "TorchScript"),
        (partial(torch.save, MODULE), r"\(torch.nn.modules.linear.Linear\), .* save its state_dict"),
    ],
)
def test_files_of_torch_that_are_no_checkpoints(tmp_path, write, message):
    write(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "x.pt")


def hidden(command):
    """Calls of a command, as they can hide in a checkpoint."""
    call, inner = Call(os.system, command), io.BytesIO()
    torch.save(call, inner)
    yield call
    yield Call(torch.storage._load_from_bytes, inner.getvalue())
    yield Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (command,), {})
    yield Call(torch._utils._rebuild_parameter, call, True, {})


def test_a_payload_in_a_checkpoint_does_nothing(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.pt"
    for payload in hidden(f"touch {marker}"):
        state = {"embed_tokens.weight": payload, "layers.0.fc1.weight": torch.ones(2, 2)}
        torch.save({"cfg": {"model": payload}, "model": state}, path)
        read_torch(path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        assert not marker.exists()
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        marker.unlink()  # the payload is a real one


@pytest.mark.slow
def test_an_honest_file_of_the_largest_model_is_read(tmp_path):
    state = {f"encoder.layers.{i}.{j}": torch.zeros(1) for i in range(48) for j in range(16)}
    moments = {i: {"step": torch.ones(1), "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)} for i in range(770)}
    torch.save({"model": state, "optimizer": {"state": moments}, "loss": [0.5] * 50_000}, tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt")["model"].keys() == state.keys()
