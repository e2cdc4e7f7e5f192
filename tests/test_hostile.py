"""Inputs that an attacker or an accident makes: each ends in one sentence, quickly, and harms nothing.

A terminal gets nothing that it would obey, and nothing at all where nobody listens.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL

from numpyesm import ESM2, InvalidOption
from numpyesm.printable import printable, quoted
from numpyesm.threads import check_threads
from numpyesm.weights import save_canonical
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
    [(">&-", None, 0), (">&- 2>&-", "", 0), ("> /dev/full", FULL, 1)],
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
    path = "x.pt" if isinstance(content, tuple) else "x.safetensors"
    if isinstance(content, tuple):
        torch = pytest.importorskip("torch")
        torch.save({"model": {key: torch.ones(2) for key in content}}, path)
    else:
        tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
        header = json.dumps({"__metadata__": content, "a": tensor}).encode()
        Path(path).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
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


@pytest.mark.parametrize("command", ["encode", "contacts", "log-prob"])
def test_input_is_never_overwritten_by_its_output(run: Any, command: str) -> None:
    Path("x.txt").write_text(">a\nMKT\n")
    code, _, err = run(command, "x.txt", "-o", "x.txt")
    assert (code, "is the input itself" in err) == (2, True)
    assert Path("x.txt").read_text() == ">a\nMKT\n"


def test_repr_shows_narrow_storage(tmp_path: Path) -> None:
    save_canonical(tmp_path / "x.safetensors", random_checkpoint(SMALL), precision="int8")
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        assert "stored as int8" in repr(ESM2.from_pretrained(tmp_path / "x.safetensors", backend="numpy"))


def test_threads_as_numpy_integer() -> None:
    assert check_threads(np.int64(2)) == 2
    for bad in (True, 1.0, None, "two", -1, 10**6):
        with pytest.raises(InvalidOption, match="whole number"):
            check_threads(bad)
