"""Inputs that an attacker or an accident makes: each ends in one sentence, quickly, and harms nothing.

A terminal gets nothing that it would obey, and nothing at all where nobody listens. Pickles of
strangers come out whole if they are plain data, and nothing in them is called.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from numpyesm.errors import CheckpointError
from numpyesm.printable import printable, quoted
from numpyesm.weights import save_canonical
from numpyesm.weights.safe_pickle import Inert, read_pickle
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
    [],
    # Keys of a state dict.
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
    save_canonical("x.safetensors", replace(random_checkpoint(SMALL), source="from\x1b[2J\x9b", synthetic=False))
    code, out, _ = run("info", "--weights", "x.safetensors")
    assert (code, r"from\x1b[2J\x9b" in out.decode()) == (0, True)


@pytest.mark.parametrize("command", ["encode", "contacts", "log-prob"])
def test_input_is_never_overwritten_by_its_output(run: Any, command: str) -> None:
    Path("x.txt").write_text(">a\nMKT\n")
    code, _, err = run(command, "x.txt", "-o", "x.txt")
    assert (code, "is the input itself" in err) == (2, True)
    assert Path("x.txt").read_text() == ">a\nMKT\n"


# -- pickles ----------------------------------------------------------------------------------------------------------

PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**62, -(2**100), 1.5, -0.0, float("inf")],
    "text": ["", "a", "ünï\n'\"\\", "x" * 300, "\ud800"],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [{"c": ()}]}},
    1: "integer key",
    2.5: "float key",
    None: "none key",
    (0, "a"): "tuple key",
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data(protocol: int) -> None:
    circular: list[Any] = []
    circular.append(circular)
    value = PLAIN | {"ordered": collections.OrderedDict(b=1, a=[2]), "default": collections.defaultdict(list, x=[1])}
    result, inner = read_pickle(pickle.dumps([value, circular], protocol))
    assert result == value
    assert list(result["ordered"]) == ["b", "a"]
    assert inner[0] is inner


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_other_classes_are_records(protocol: int) -> None:
    value = {
        "args": Namespace(encoder_layers=12, deep=Namespace(x=1)),
        "count": collections.Counter("aab"),
        "numpy": [np.float64(1.5), np.arange(3), np.dtype("f4")],
        "set": {1, 2},
        "partial": partial(print, 1, end=""),
        "path": Path("a/b"),
        "error": ValueError("x"),
        "class": Fraction,
    }
    result = read_pickle(pickle.dumps(value, protocol))
    assert isinstance(result["args"], Inert)
    assert result["args"].get("encoder_layers") == 12
    assert result["args"].get("deep").get("x") == 1
    assert result["args"].get("absent", 7) == 7
    assert read_pickle(b"\x80\x02ca\nb\n)\x81U\x01xK\x02s.").get("x") == 2  # an item that was set on one
    assert str(result["class"]) == "fractions.Fraction"
    assert str(read_pickle(b"cno.such.module\nthing.of\n.")) == "no.such.module.thing.of"
    assert all(isinstance(item, Inert) for item in [*result["numpy"], result["partial"], result["error"]])


class Call:
    """What is pickled as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduction = function, args

    def __reduce__(self) -> Any:
        return self.reduction

    def __call__(self) -> None:
        """So that pickle takes one as the function of another."""


def payloads(marker: Path) -> Iterator[bytes]:
    """Every way from a global to a call, as raw pickles."""
    command = f"touch {marker}"
    text = command.encode()
    short = b"\x8c" + bytes([len(text)]) + text
    system = b"\x8c\x05posix\x8c\x06system\x93"  # STACK_GLOBAL
    for protocol in range(6):
        for payload in (
            Call(os.system, command),
            Call(eval, f"__import__('os').system({command!r})"),
            Call(exec, f"__import__('os').system({command!r})"),
            Call(Call(partial, os.system, command)),
            Call(Call(getattr, Call(importlib.import_module, "os"), "system"), command),
        ):
            yield pickle.dumps(payload, protocol)
            yield pickle.dumps({"model": [payload]}, protocol)
    yield b"cos\nsystem\n(S'" + text + b"'\ntR."  # GLOBAL, REDUCE
    yield b"\x80\x04" + system + short + b"\x85R."
    yield b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93" + short + b"\x85R."  # a dotted name
    yield b"\x80\x04" + system + short + b"\x85\x81."  # NEWOBJ
    yield b"\x80\x04" + system + short + b"\x85}\x92."  # NEWOBJ_EX
    yield b"(S'" + text + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS'" + text + b"'\no."  # OBJ
    # attributes that pickle itself would look up and call
    namespace = b"\x80\x04cargparse\nNamespace\n)\x81}X"
    yield namespace + b"\x0c\x00\x00\x00__setstate__cos\nsystem\nsb" + short + b"b."
    yield namespace + b"\x06\x00\x00\x00appendcos\nsystem\nsb" + short + b"a."
    yield namespace + b"\x06\x00\x00\x00extendcbuiltins\nexec\nsb" + short + b"a."
    yield namespace + b"\x03\x00\x00\x00addcos\nsystem\nsb(" + short + b"\x90."
    # as a key, which is hashed
    yield b"\x80\x04}" + system + short + b"\x85RNs."
    # through the names that are built by our own code
    yield b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85RS'" + text + b"'\nK\x01s."
    yield b"\x80\x04ccollections\nOrderedDict\n" + system + short + b"\x85R\x85R."
    yield b"\x80\x04ccollections\nOrderedDict\n" + b"N}\x8c\x07__new__" + system + b"s\x86b" + short + b"\x85R."


def test_no_payload_runs(tmp_path: Path) -> None:
    """Under Python's own reader they do: otherwise this would show nothing."""
    marker = tmp_path / "ran"
    ran = 0
    for data in payloads(marker):
        modules = set(sys.modules)
        with contextlib.suppress(CheckpointError):
            read_pickle(data)
        assert not marker.exists(), data
        assert set(sys.modules) == modules
        with contextlib.suppress(Exception):
            pickle.loads(data)  # noqa: S301
        ran += marker.exists()
        marker.unlink(missing_ok=True)
    assert ran > 65
    assert read_pickle(pickle.dumps(collections.OrderedDict(a=1))) == {"a": 1}  # no class was changed


# A tuple of a tuple of a tuple ..., each element twice: its hash takes 2**64 steps.
BILLION_LAUGHS = b"\x80\x02)" + b"q\x00h\x00\x86" * 64
COLLIDING = [((2**61 - 1) * i).to_bytes(11, "little") for i in range(50_000)]  # all of hash 0
LONG = b"X\x00\x00\x10\x00" + b"a" * (1 << 20)
KEYWORDS = b"".join(b"X\x04\x00\x00\x00%04dN" % i for i in range(9999))
UNUSUAL = [b"\x82\1", b"\x83\1\0", b"\x84\1\0\0\0", b"\x97", b"\x98"]  # a registry of the writer, buffers out of band

HOSTILE_PICKLES = {
    "no stop": b"\x80\x02}",
    "empty stack": b".",
    **{f"opcode {code[0]}": b"\x80\x05N" + code + b"." for code in UNUSUAL},
    "text": b"hello world, this is no pickle",
    "memo of nothing": b"q\x00.",
    "negative memo": b"Np-1\n.",
    "absurd memo index": b"Np" + b"9" * 5000 + b"\n.",
    "memo of 2**31": b"\x80\x02Nr\x00\x00\x00\x80.",
    "huge string": b"X\xff\xff\xff\xff.",
    "huge long": b"\x8b\x00\x00\x01\x00" + b"\x01" * 65536 + b".",
    "huge number text": b"I" + b"9" * 100_000 + b"\n.",
    "unhashable key": b"}]Ns.",
    "billion laughs as key": b"}" + BILLION_LAUGHS + b"Ns.",
    "billion laughs in a set": b"\x8f(" + BILLION_LAUGHS + b"\x90.",
    "billion laughs in a frozenset": b"(" + BILLION_LAUGHS + b"\x91.",
    "billion laughs as an argument": b"cos\nsystem\n" + BILLION_LAUGHS + b"R.",
    "deep tuple as key": b"})" + b"\x85" * 100_000 + b"Ns.",
    "colliding integers": b"}" + b"".join(b"\x8a\x0b" + number + b"Ns" for number in COLLIDING) + b".",
    "equal keys of a megabyte": b"}" + LONG + b"q\x00Ns" + LONG + b"q\x01Ns" + b"h\x00Nsh\x01Ns" * 9999 + b".",
    "missing mark": b"NNt.",
    "call of a string": b"U\x01a)R.",
    "globals without end": b"".join(b"ca\n%d\n0" % i for i in range(2000)) + b"N.",
    "state of a global": b"cos\nsystem\n}b.",
    "attributes of a class": b"\x80\x04ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aNs\x86b.",
    "persistent id": b"NQ.",
    "a dict from Python 2": b"ccollections\nOrderedDict\n](K\x01K\x02K\x03\x87e\x85R.",
    "copies of a tuple": b"\x80\x02(" + b"N" * 10_000 + b"tq\x00ca\nb\nq\x01" + b"h\x01h\x00\x81" * 10_000 + b".",
    "copies of keywords": b"\x80\x04}(" + KEYWORDS + b"uq\x00ca\nb\nq\x01" + b"h\x01)h\x00\x92" * 9999 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_input_is_one_clear_error(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_pickle(HOSTILE_PICKLES[name], origin="the pickle in x.pt")
    assert str(caught.value).startswith("the pickle in x.pt is damaged or not a pickle")
    assert len(str(caught.value)) < 200


NESTED = {
    "tuples": b"(" * 100_000 + b"t" * 100_000,
    "lists": b"]" * 100_000 + b"a" * 99_999,
    "states": b"ca\nb\nq\x00)\x81" + b"q\x01h\x00)\x81h\x01b" * 30_000,
    "items": b"}q\x00" + b"h\x00K\x01h\x00s0" * 30_000,
    "marks": b"(" * 100_000 + b"N",
    "too many sets": b"\x80\x04" + b"\x8f" * 1_000_000,
    "as many sets as may be": b"\x80\x04(" + b"\x8f" * 400_000 + b"t",
}
READ_ALONE = """
import resource, sys
from numpyesm.errors import CheckpointError
from numpyesm.weights.safe_pickle import read_pickle
for path in sys.argv[1:]:
    try:
        read_pickle(open(path, "rb").read())
    except CheckpointError:
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures the memory of a process")
@pytest.mark.slow
def test_built_and_freed_without_recursion_in_little_memory(tmp_path: Path) -> None:
    """In a process of its own, because an overflow of the stack would end it."""
    pickles = {"nothing": b"N"} | NESTED
    for name, data in pickles.items():
        (tmp_path / name).write_bytes(data + b".")
    done = subprocess.run([sys.executable, "-c", READ_ALONE, *pickles], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done
    before, *peaks = map(int, done.stdout.split())
    assert len(peaks) == len(NESTED)
    assert max(peaks) - before < 200 << 10, peaks  # kilobytes


SEEDS = [pickle.dumps(PLAIN | {"o": collections.OrderedDict(a=1), "n": Namespace(a=1)}, p) for p in range(6)]
OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3), max_size=60).map(b"".join),
    st.sampled_from(SEEDS),
    st.integers(0, 2000),
)
def test_any_opcodes_alone_and_inside_a_pickle(new: bytes, seed: bytes, where: int) -> None:
    for data in (b"\x80\x04" + new + b".", seed[:where] + new + seed[where + 1 :]):
        with contextlib.suppress(CheckpointError):
            read_pickle(data, persistent_load=lambda identity: None)
