"""The restricted pickle reader: plain data come out whole, code is never run, hostile input ends quickly."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import struct
import subprocess
import time
from argparse import Namespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numpyesm.errors import CheckpointError
from numpyesm.weights.pickle_reader import Global, Inert, read_pickle

PLAIN = {
    "none": None,
    "flags": [True, False],
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**62, -(2**100), 1.5, -0.0, float("inf")],
    "text": ["", "a", "ünï\n'\"\\", "x" * 300, "\ud800"],
    "bytes": [b"", b"abc\xff", b"y" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "set": {1, "two"},
    "frozen": frozenset({3}),
    "nested": {"a": {"b": [{"c": ()}]}},
    1: "integer key",
    2.5: "float key",
    None: "none key",
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data(protocol):
    assert read_pickle(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", range(6))
def test_ordered_dicts_become_dicts(protocol):
    result = read_pickle(pickle.dumps(collections.OrderedDict(b=1, a=[2]), protocol))
    assert type(result) is dict
    assert list(result.items()) == [("b", 1), ("a", [2])]


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_circular_references(protocol):
    inner: list = []
    inner.append(inner)
    result = read_pickle(pickle.dumps([inner, inner], protocol))
    assert result[0] is result[1]
    assert result[0][0] is result[0]


@pytest.mark.parametrize("protocol", range(6))
def test_namespaces_are_records(protocol):
    result = read_pickle(pickle.dumps(Namespace(encoder_layers=12, deep=Namespace(x=1)), protocol))
    assert isinstance(result, Inert)
    assert result.get("encoder_layers") == 12
    assert result.get("deep").get("x") == 1
    assert result.get("absent", 7) == 7


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text() | st.integers(-9, 9), inner) | st.tuples(inner, inner)
        ),
        max_leaves=20,
    ),
    st.integers(0, 5),
)
def test_any_plain_data(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)) == value


class Payload:
    """An object whose unpickling runs a command; where the command leaves a file."""

    def __init__(self, function, *args):
        self.reduction = function, args

    def __reduce__(self):
        return self.reduction


def payloads(marker):
    """Every opcode path from a global to a call, as raw pickles."""
    command = f"touch {marker}"
    text = command.encode()
    short = b"\x8c" + bytes([len(text)]) + text
    system = b"\x8c\x05posix\x8c\x06system\x93"  # STACK_GLOBAL
    for protocol in range(6):
        yield pickle.dumps(Payload(os.system, command), protocol)
        yield pickle.dumps(Payload(eval, f"__import__('os').system({command!r})"), protocol)
        yield pickle.dumps(Payload(exec, f"open({str(marker)!r}, 'w')"), protocol)
        yield pickle.dumps(Payload(subprocess.check_call, ["touch", str(marker)]), protocol)
        yield pickle.dumps({"model": [Payload(os.system, command)]}, protocol)
    yield b"cos\nsystem\n(S'" + text + b"'\ntR."  # GLOBAL, REDUCE
    yield b"\x80\x04" + system + short + b"\x85R."
    yield b"\x80\x04" + system + short + b"\x85\x81."  # NEWOBJ
    yield b"\x80\x04" + system + short + b"\x85}\x92."  # NEWOBJ_EX
    yield b"(S'" + text + b"'\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nS'" + text + b"'\no."  # OBJ
    # BUILD with a state that a real unpickler would set, or hand to __setstate__
    yield b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbS'" + text + b"'\nb."
    # a call of what a call returned
    yield b"\x80\x02cbuiltins\ngetattr\ncos\n__dict__\nX\x06\x00\x00\x00system\x86R" + short + b"\x85R."
    # through the names that are built by our own code
    yield b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85RS'" + text + b"'\nK\x01s."
    yield b"\x80\x02ccollections\nOrderedDict\ncos\nsystem\n" + short + b"\x85R\x85R."


def test_no_payload_runs(tmp_path):
    marker = tmp_path / "ran"
    count = 0
    for data in payloads(marker):
        count += 1
        try:
            result = read_pickle(data)
        except CheckpointError:
            result = None
        assert not marker.exists(), data
        assert result is None or isinstance(result, Inert | dict), data
    assert count > 35


def test_the_payloads_are_real(tmp_path):
    """The same pickles do run under Python's own reader: otherwise the test above would show nothing."""
    marker = tmp_path / "ran"
    ran = 0
    for data in payloads(marker):
        with contextlib.suppress(Exception):
            pickle.loads(data)  # noqa: S301
        if marker.exists():
            marker.unlink()
            ran += 1
    assert ran > 25


def test_globals_are_only_names():
    assert read_pickle(b"cno.such.module\nthing\n.") == Global("no.such.module", "thing")
    assert read_pickle(pickle.dumps(os.system)) == Global("posix" if os.name == "posix" else "nt", "system")


def binunicode(text):
    return b"X" + struct.pack("<I", len(text)) + text


# A tuple of a tuple of a tuple ..., each element twice: its hash takes 2**64 steps.
BILLION_LAUGHS = b"\x80\x02)" + b"q\x00h\x00\x86" * 64

HOSTILE = {
    "empty": b"",
    "no stop": b"\x80\x02}",
    "empty stack": b".",
    "text": b"hello world, this is no pickle",
    "unknown protocol": b"\x80\x63N.",
    "unknown opcode": b"\xff.",
    "extension registry": b"\x80\x02\x82\x01.",
    "extension registry 2": b"\x80\x02\x83\x01\x00.",
    "extension registry 4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05N\x98.",
    "memo index without entry": b"h\x05.",
    "memo get text": b"g99999999\n.",
    "memo of nothing": b"q\x00.",
    "negative memo": b"Np-1\n.",
    "absurd memo index": b"Np" + b"9" * 5000 + b"\n.",
    "huge string": b"X\xff\xff\xff\xff.",
    "huge string 8": b"\x8d" + b"\xff" * 8 + b".",
    "huge bytes": b"B\xff\xff\xff\x7f.",
    "huge bytes 8": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "huge bytearray": b"\x96" + b"\xff" * 7 + b"\x7f.",
    "negative string": b"T\xff\xff\xff\xff.",
    "negative long": b"\x8b\xff\xff\xff\xff.",
    "huge long": b"\x8b\x00\x00\x01\x00" + b"\x01" * 65536 + b".",
    "huge number text": b"I" + b"9" * 100_000 + b"\n.",
    "huge frame": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "unhashable key": b"}]Ns.",
    "dict as key": b"}}Ns.",
    "tuple as key": b"})Ns.",
    "billion laughs as key": b"}" + BILLION_LAUGHS + b"Ns.",
    "billion laughs in a set": b"\x8f(" + BILLION_LAUGHS + b"\x90.",
    "billion laughs in a frozenset": b"(" + BILLION_LAUGHS + b"\x91.",
    "colliding integer key": b"}\x8a\x09" + (2**61 - 1 << 4).to_bytes(9, "little") + b"Ns.",
    "key without value": b"}(Nu.",
    "item of a list": b"]NNs.",
    "append to a dict": b"}Na.",
    "add to a list": b"](N\x90.",
    "missing mark": b"NNt.",
    "mark of nothing": b"e.",
    "tuple of too much": b"N\x87.",
    "call of a string": b"U\x01a)R.",
    "call without a tuple": b"cos\nsystem\nNR.",
    "call of nothing": b")R.",
    "class without name": b"(o.",
    "global without end": b"cos\nsystem",
    "global of numbers": b"K\x01K\x02\x93.",
    "global not utf-8": b"c\xff\xff\n\xff\n.",
    "state of a global": b"cos\nsystem\nNb.",
    "persistent id": b"Pabc\n.",
    "binary persistent id": b"NQ.",
    "unquoted string": b"Sabc\n.",
    "bad escape": b"S'\\x'\n.",
    "bad float": b"Fabc\n.",
    "bad text": b"X\x01\x00\x00\x00\xff.",
    "bad pairs": b"ccollections\nOrderedDict\n](K\x01K\x02K\x03\x87e\x85R.",
    "pairs of an integer": b"ccollections\nOrderedDict\nK\x01\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_one_clear_error(name):
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        read_pickle(HOSTILE[name], origin="the pickle in x.pt")
    assert time.perf_counter() - start < 1
    assert str(caught.value).startswith("the pickle in x.pt")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 200_000 + b"t" * 200_000,  # tuples in tuples, closed one by one
        b"]" * 200_000 + b"a" * 199_999,
        b"(" * 300_000,
        b"N" + b"\x85" * 300_000,
        b"\x80\x02" + b"".join(b"r" + struct.pack("<I", i * 9999991 % 2**32) for i in range(1)) + b"N",
        b"N" + b"".join(b"r" + struct.pack("<I", i * 65536 % 2**32) for i in range(60_000)),
        b"]q\x00" + b"h\x00a" * 100_000,
    ],
    ids=["tuples", "lists", "marks", "one-tuples", "memo", "memo spread", "references"],
)  # fmt: skip
def test_time_is_linear_in_the_input(data):
    start = time.perf_counter()
    with contextlib.suppress(CheckpointError):
        read_pickle(data + b".")
    assert time.perf_counter() - start < 3


LIST = b"(" + b"N" * 1000 + b"l"
DICT = b"(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(1000)) + b"d"


@pytest.mark.parametrize("value", [LIST, DICT], ids=["list", "dict"])
def test_copying_the_same_data_over_and_over_is_refused(value):
    name = {LIST: b"c__builtin__\nlist\n", DICT: b"ccollections\nOrderedDict\n"}[value]
    start = value + b"\x85q\x00" + name + b"q\x01"
    read_pickle(start + b"h\x01h\x00R.")
    with pytest.raises(CheckpointError, match="over and over"):
        read_pickle(start + b"h\x01h\x00R0" * 100 + b".")


def test_every_truncation_is_an_error():
    whole = pickle.dumps({"a": [1, 2.5, "x", b"y", (1,), Namespace(z=1)]}, 2)
    for length in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_pickle(whole[:length])


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    with contextlib.suppress(CheckpointError):
        read_pickle(data)


OPCODES = [
    bytes([code]) for code in b"\x80\x95.(012N\x88\x89IJKMLFGSTUVXBC}])\x8fdlt\x85\x86\x87\x91suae\x90pqr\x94gjh"
]
OPCODES += [bytes([code]) for code in b"c\x93R\x81\x92boiPQ\x8a\x8b\x8c\x8d\x8e\x96"]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(OPCODES) | st.binary(max_size=3), max_size=60))
def test_any_opcodes(pieces):
    with contextlib.suppress(CheckpointError):
        read_pickle(b"\x80\x02" + b"".join(pieces) + b".", persistent_load=lambda identity: None)


def test_builders_and_persistent_ids():
    data = b"\x80\x02cmine\nmake\nK\x01K\x02\x86RU\x03keyQ\x86."
    result = read_pickle(data, builders={Global("mine", "make"): sum}, persistent_load=str.upper)
    assert result == (3, "KEY")


def test_unicode_text():
    assert read_pickle(binunicode("é".encode()) + b".") == "é"
