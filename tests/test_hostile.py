"""Inputs that an attacker or an accident makes: each ends in one sentence, quickly, and harms nothing.

A terminal gets nothing that it would obey, and nothing at all where nobody listens.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL

from numpyesm import ESM2, CheckpointError, InvalidOption, InvalidSequence
from numpyesm.printable import printable, quoted
from numpyesm.threads import check_threads
from numpyesm.weights import load_checkpoint, save_canonical
from numpyesm.weights.locate import candidate_names
from numpyesm.weights.safetensors_file import read_safetensors, write_safetensors
from numpyesm.weights.synthetic import random_checkpoint

FULL = "numpyesm: error: standard output or an open file cannot be used (No space left on device)\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("protéine α 🧬\n\t1", "protéine α 🧬\n\t1"),
        ("\x1b[31mred\x07\r", r"\x1b[31mred\x07\r"),
        ("\x9b2J\x00\u202e", r"\x9b2J\x00\u202e"),
        ("half \ud83e of a pair", r"half \ud83e of a pair"),
    ],
)
def test_control_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_quoted_values_are_short() -> None:
    assert quoted("a\x1bb") == r"'a\x1bb'"
    assert quoted("x" * 10_000_000) == "'" + "x" * 76 + "..."
    assert quoted([["deep"]]) == "list"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="shells and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "said", "code"),
    [
        (">&-", None, 0),
        (">&- 2>&-", "", 0),
        ("> /dev/full", FULL, 1),
    ],
)
def test_closed_and_full_streams(redirection: str, said: str | None, code: int, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m numpyesm info {redirection}'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert said in (None, done.stderr)


OURS = {"format": "numpyesm", "format_version": "2", "precision": "fp32"}


HOSTILE: list[Any] = [
    OURS | {"config": "\x1b[31m"},
    OURS | {"config": "[" * 100_000},
    OURS | {"config": "{}", "source": "\x9b2J"},
    OURS | {"config": "\ud800"},
    OURS | {"format_version": "\x1b]0;title\x07"},
    OURS | {"precision": "\x1b[2J"},
    {"format": 3},
    [],
    # Keys of a state dict.
    (1,),
    (None, ("a",)),
    ("\ud800",),
    (3, b"x", "\udc00\x1b[2J"),
    ("\x9b2J", ""),
]


@pytest.mark.parametrize("content", HOSTILE)
def test_hostile_weights_are_a_sentence(content: Any, run: Any) -> None:
    if isinstance(content, tuple):
        torch = pytest.importorskip("torch")
        torch.save({"model": {key: torch.ones(2) for key in content}}, "x")
    else:
        tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        header = json.dumps({"__metadata__": content, "a": tensor}).encode()
        Path("x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    path = "x.pt" if isinstance(content, tuple) else "x.safetensors"
    Path("x").rename(path)
    for command in ("info", "verify"):
        code, out, err = run(command, "--weights", path)
        assert code in (1, 2)
        (error,) = filter(None, err.splitlines())
        assert error.startswith("numpyesm: error: ")
        assert path in error
        assert printable(out.decode() + err) == out.decode() + err


def test_info_shows_the_source_of_a_file_tamed(run: Any) -> None:
    checkpoint = random_checkpoint(SMALL)
    save_canonical("x.safetensors", replace(checkpoint, source="from\x1b[2J\x9b", synthetic=False))
    code, out, _ = run("info", "--weights", "x.safetensors")
    assert (code, r"from\x1b[2J\x9b" in out.decode()) == (0, True)


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
