"""Inputs that an attacker or an accident makes: each ends in one sentence, quickly, and harms nothing."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL

from numpyesm import ESM2, CheckpointError, InvalidOption, InvalidSequence
from numpyesm.threads import check_threads
from numpyesm.weights import load_checkpoint
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.locate import candidate_names
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.synthetic import random_checkpoint


def test_header_that_states_a_billion_layers(tmp_path: Path) -> None:
    save_canonical(tmp_path / "a.safetensors", random_checkpoint(SMALL))
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    config = json.loads(metadata["config"]) | {"num_layers": 10**9}
    write_safetensors(tmp_path / "b.safetensors", tensors, metadata | {"config": json.dumps(config)})
    with pytest.raises(CheckpointError, match="1000000000 layers"):
        load_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.timeout(20)
def test_pickle_of_nested_tuples_takes_no_time(tmp_path: Path) -> None:
    """Hashing or printing this object would take 2^60 steps."""
    nested = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + b")" + b"2\x86" * 60 + b"N)NtR."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", nested)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("command", ["encode", "contacts", "log-prob"])
def test_input_is_never_overwritten_by_its_output(run: Any, command: str) -> None:
    Path("x.txt").write_text(">a\nMKT\n")
    code, _, err = run(command, "x.txt", "-o", "x.txt")
    assert (code, "is the input itself" in err) == (2, True)
    assert Path("x.txt").read_text() == ">a\nMKT\n"


def test_exact_weights_come_before_those_that_lost_digits() -> None:
    names = candidate_names("esm2-35m")
    assert names[0] == "esm2-35m.safetensors"
    assert all("fp16" in n or "bf16" in n or "int8" in n for n in names[-3:])
    assert names.index("esm2_t12_35M_UR50D.pt") < names.index("esm2-35m-fp16.safetensors")


def test_repr_shows_narrow_storage(tmp_path: Path) -> None:
    save_canonical(tmp_path / "x.safetensors", random_checkpoint(SMALL), precision="int8")
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        assert "stored as int8" in repr(ESM2.from_pretrained(tmp_path / "x.safetensors", backend="numpy"))


@pytest.mark.parametrize("batch", [None, 5, b"M<mask>"])
def test_predict_refuses_what_is_no_batch(model: ESM2, batch: Any) -> None:
    with pytest.raises(InvalidSequence, match="list of sequences"):
        model.predict(batch)


@pytest.mark.parametrize("source", ["", None, 5, b"esm2-35m"])
def test_what_names_no_weights(source: Any) -> None:
    with pytest.raises(InvalidOption, match="names no weights"):
        ESM2.from_pretrained(source)


def test_threads_as_numpy_integer() -> None:
    assert check_threads(np.int64(2)) == 2
    for bad in (True, 1.0, None, "two", -1, 10**6):
        with pytest.raises(InvalidOption, match="whole number"):
            check_threads(bad)
