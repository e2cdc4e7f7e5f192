"""Files of torch.save, read without torch."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from numpyesm.errors import CheckpointError
from numpyesm.weights.load import load_checkpoint
from numpyesm.weights.safe_pickle import Inert
from numpyesm.weights.torch_file import read_torch

torch = pytest.importorskip("torch")


def rewrite(source, target, *, change=None, compression=zipfile.ZIP_STORED, prefix=None):
    """Copy a zip entry by entry; `change` maps names (without folder) to new content or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            folder, _, name = info.filename.partition("/")
            content = old.read(info.filename)
            if change and name in change:
                content = change[name]
            if content is not None:
                new.writestr(f"{folder if prefix is None else prefix}/{name}", content)
    return target


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "n": {"b": torch.ones(4, dtype=torch.float64)}}, path)
    return path


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "uint16"]
)
def test_dtypes(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    torch.save(tensor, tmp_path / "t.pt")
    stored = read_torch(tmp_path / "t.pt")
    if dtype == "bfloat16":
        np.testing.assert_array_equal(stored.raw, tensor.view(torch.uint16).numpy())
        np.testing.assert_array_equal(stored.astype(), tensor.float().numpy())
    else:
        np.testing.assert_array_equal(stored.raw, tensor.numpy())


def test_views_strides_sharing_and_parameters(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, 2:5],
        "column": base[:, 3],
        "scalar": torch.tensor(7.0),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "module": torch.nn.Linear(3, 2).state_dict(),
    }
    torch.save(content, tmp_path / "t.pt")
    result = read_torch(tmp_path / "t.pt")
    for name in ("base", "transposed", "slice", "column", "scalar", "parameter"):
        np.testing.assert_array_equal(result[name].raw, content[name].detach().numpy(), err_msg=name)
    assert result["none"].raw.size == 0
    np.testing.assert_array_equal(result["module"]["weight"].raw, content["module"]["weight"].numpy())
    assert np.shares_memory(result["base"].raw, result["slice"].raw)
    with pytest.raises(ValueError):
        result["base"].raw[0, 0] = 1


def test_compressed_entries_and_any_folder_name(tmp_path, saved):
    packed = rewrite(saved, tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED, prefix="any name")
    np.testing.assert_array_equal(read_torch(packed)["a"].raw, [[0, 1, 2], [3, 4, 5]])
    bz = rewrite(saved, tmp_path / "bz.pt", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(CheckpointError, match="unusual method"):
        read_torch(bz)


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


# A tuple of a tuple ..., each element twice, handed through a function that is known, as a key.
LAUGHS = b"\x80\x02}ctorch._utils\n_rebuild_parameter\n()" + b"q\x00h\x00\x86" * 9 + b"\x89}tRNs."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.pkl": None}, "not one that torch.save wrote"),
        ({"data/0": None}, "is missing"),
        ({"data/0": b"1234"}, "another size"),
        ({"data/0": b"123"}, "another size"),
        ({"data/0": bytes(4000)}, "another size"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"garbage"}, "damaged or not a pickle"),
        ({"data.pkl": LAUGHS}, "a key is not allowed"),
        ({"data.pkl": bytes(5 << 20)}, "much more than a model"),
    ],
)
def test_wrong_entries(tmp_path, saved, change, message):
    with pytest.raises(CheckpointError, match=message):
        read_torch(rewrite(saved, tmp_path / "y.pt", change=change))


def pickled(storage_count, offset, shape, strides, key="0", kind="FloatStorage"):
    text = lambda value: b"X" + struct.pack("<I", len(value)) + value.encode()  # noqa: E731
    number = lambda value: b"\x8a\x08" + struct.pack("<q", value)  # noqa: E731
    numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    storage = (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(storage_count) + b"tQ"
    )
    rest = number(offset) + numbers(shape) + numbers(strides) + b"\x89}"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        (7, 0, (2, 3), (3, 1)),
        (5, 0, (5,), (1,)),
        (6, 1, (2, 3), (3, 1)),
        (6, 0, (2, 3), (4, 1)),
        (6, -1, (2, 3), (3, 1)),
        (6, 0, (2, -3), (3, 1)),
        (6, 0, (2, 3), (-3, 1)),
        (6, 0, (2, 3), (1,)),
        (6, 0, (1 << 40,), (0,)),  # a small file that would fill the memory
        (6, 0, (1 << 40, 1 << 40), (0, 0)),
        (6, 1 << 60, (1,), (1,)),
        (6, 0, (1,) * 20, (1,) * 20),
        (6, 0, (2, 3), (3, 1), "../data.pkl"),
        (-6, 0, (2, 3), (3, 1)),
    ],
)
def test_impossible_tensors(tmp_path, saved, arguments):
    path = rewrite(saved, tmp_path / "y.pt", change={"data.pkl": pickled(*arguments)})
    with pytest.raises(CheckpointError, match="corrupted"):
        read_torch(path)


def test_unknown_storages_become_records(tmp_path, saved):
    content = pickled(3, 0, (3,), (1,), kind="ComplexFloatStorage")
    assert isinstance(read_torch(rewrite(saved, tmp_path / "y.pt", change={"data.pkl": content})), Inert)


def test_zip_bombs(tmp_path, saved):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/data.pkl", pickled(1 << 22, 0, (1 << 22,), (1,)))
        bomb.writestr("a/data/0", bytes(1 << 24))
    with pytest.raises(CheckpointError, match="implausible size"):
        read_torch(tmp_path / "bomb.pt")


def test_old_formats_say_how_to_resave(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="re-save it"):
        load_checkpoint(tmp_path / "old.pt")


def test_torchscript_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_torch(tmp_path / "script.pt")


def test_pickled_modules_are_not_checkpoints(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert str(type(read_torch(tmp_path / "module.pt"))) == "torch.nn.modules.linear.Linear"
    with pytest.raises(CheckpointError, match="save its state_dict"):
        load_checkpoint(tmp_path / "module.pt")


class Payload:
    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


def hidden(command):
    """Calls of a command, as they can hide in a checkpoint."""
    inner = io.BytesIO()
    torch.save(Payload(os.system, (command,)), inner)
    return {
        "plain": Payload(os.system, (command,)),
        "storage": Payload(torch.storage._load_from_bytes, (inner.getvalue(),)),
        "subclass": Payload(torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (command,), {})),
        "hooks": Payload(torch._utils._rebuild_parameter, (Payload(os.system, (command,)), True, {})),
    }


@pytest.mark.parametrize("kind", ["plain", "storage", "subclass", "hooks"])
def test_a_payload_in_a_checkpoint_does_nothing(tmp_path, kind):
    marker = tmp_path / "ran"
    payload = hidden(f"touch {marker}")[kind]
    path = tmp_path / "x.pt"
    for content in (
        {"cfg": {"model": payload}, "model": {"x": torch.ones(2)}},
        {"embed_tokens.weight": payload, "layers.0.fc1.weight": torch.ones(2, 2)},
    ):
        torch.save(content, path)
        read_torch(path)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        assert not marker.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists()  # the payload is a real one


def test_state_set_on_a_tensor_is_refused(tmp_path, saved):
    """A pickle could otherwise put anything in place of a tensor's numbers, behind every check."""
    tensor = pickled(6, 0, (2, 3), (3, 1)).removesuffix(b".")
    state = b"}X\x03\x00\x00\x00rawNs"
    for changed in (state + b"b.", b"N" + state + b"\x86b."):
        path = rewrite(saved, tmp_path / "y.pt", change={"data.pkl": tensor + changed})
        with pytest.raises(CheckpointError, match="state is set on a tensor"):
            read_torch(path)


def test_a_training_checkpoint_is_data(tmp_path):
    model = torch.nn.Linear(3, 2)
    content = {
        "state_dict": model.state_dict(),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3)}}}],
        "callbacks": {"ModelCheckpoint{'monitor': 'x'}": {"best": np.float64(1.5), "path": Path("a/b.ckpt")}},
        "hyper_parameters": Namespace(lr=1e-3, deep=collections.Counter("aab"), device=torch.device("cpu")),
        "rng": torch.get_rng_state(),
        "loops": {("fit", 0): {"seen": {1, 2}}},
    }
    torch.save(content, tmp_path / "last.ckpt")
    result = read_torch(tmp_path / "last.ckpt")
    np.testing.assert_array_equal(result["state_dict"]["weight"].raw, model.weight.detach().numpy())
    moment = result["optimizer_states"][0]["state"][0]["exp_avg"]
    assert moment.shape == (2, 3)
    assert result["hyper_parameters"].get("lr") == 1e-3
    assert isinstance(result["hyper_parameters"].get("device"), Inert)
    assert isinstance(result["callbacks"]["ModelCheckpoint{'monitor': 'x'}"]["best"], Inert)


@pytest.mark.slow
def test_an_honest_file_of_the_largest_model_is_read(tmp_path):
    names = [f"encoder.layers.{i}.{j}" for i in range(48) for j in range(16)]
    state = {name: torch.zeros(1) for name in names}
    moments = {i: {"step": torch.ones(1), "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)} for i in range(770)}
    torch.save({"model": state, "optimizer": {"state": moments}, "loss": [0.5] * 50_000}, tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt")["model"].keys() == state.keys()
