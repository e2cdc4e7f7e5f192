"""The readers on damaged files: a short, seeded run of `tools/fuzz_readers.py`, and hostile files made by hand."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from numpyesm.errors import CheckpointError, InvalidSequence
from numpyesm.fasta import read_fasta
from numpyesm.weights.load import load_checkpoint
from numpyesm.weights.pickle_reader import read_pickle
from numpyesm.weights.safetensors_file import read_safetensors
from numpyesm.weights.torch_file import read_torch

ROOT = Path(__file__).parents[1]


def _load_tool():
    spec = importlib.util.spec_from_file_location("fuzz_readers", ROOT / "tools" / "fuzz_readers.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


tool = _load_tool()


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="limits of a child process")
@pytest.mark.parametrize("reader", tool.READERS)
def test_a_short_run_finds_nothing(reader, tmp_path) -> None:
    assert tool.fuzz([reader], minutes=2, seed=20, keep=tmp_path / "findings", seconds=20, most=150) == []


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="limits of a child process")
@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("[0] * 30_000_000", "allocated"),
        ("while True: pass", "took longer"),
    ],
)
def test_the_tool_finds_what_is_there(fault, finding, tmp_path, monkeypatch) -> None:
    (tmp_path / "case").write_bytes(b">a\nMKT\n")
    monkeypatch.setattr(tool, "read", lambda reader, path: exec(fault))
    tracemalloc.start()
    try:
        with pytest.raises(tool.Finding, match=finding):
            tool.check("fasta", tmp_path / "case", 1.0)
    finally:
        tracemalloc.stop()


def test_the_seeds_are_valid(tmp_path) -> None:
    for content in tool.seeds("safetensors", tmp_path):
        (tmp_path / "x").write_bytes(content)
        read_safetensors(tmp_path / "x")
    for content in tool.seeds("torch", tmp_path):
        (tmp_path / "x").write_bytes(content)
        assert read_torch(tmp_path / "x")["model"]["b"].shape == (5,)
    for content in tool.seeds("fasta", tmp_path):
        (tmp_path / "x").write_bytes(content)
        assert list(read_fasta(tmp_path / "x"))
    assert read_pickle(tool.seeds("pickle", tmp_path)[2])["a"][0] == 1


def test_mutations_are_repeatable_and_of_every_kind(tmp_path) -> None:
    import random

    valid = tool.seeds("pickle", tmp_path)
    once, again = ([tool.mutate(valid[0], valid, random.Random(i)) for i in range(60)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 50
    assert min(map(len, once)) < len(valid[0]) < max(map(len, once))


# -- made by hand --------------------------------------------------------------------------------------------------


def peak(call) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises((CheckpointError, InvalidSequence)):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "opcode", [b"}", b"]", b"\x8f", b"(", b")\x94", b"(t", b"(l", b"G" + bytes(8), b"X\0\0\0\0", b"N0", b"2"]
)
def test_a_pickle_builds_no_more_than_its_size_allows(opcode) -> None:
    data = b"\x80\x04N" + opcode * (2_000_000 // len(opcode))
    assert peak(lambda: read_pickle(data)) < 4 * len(data) + tool.SLACK


def test_an_honest_pickle_of_the_largest_model_is_read() -> None:
    data = tool._torch_pickle({f"encoder.layers.{i}.self_attn.k_proj.weight": (1280, 1280) for i in range(900)}, 2)
    storages: list[object] = []

    def storage(identity: object) -> object:
        storages.append(identity)
        return None

    read_pickle(data, persistent_load=storage)
    assert len(storages) == 900


def test_a_gzip_bomb_of_fasta_costs_nothing(tmp_path) -> None:
    for name, text in (("line", b">a\n" + b"A" * (1 << 26)), ("lines", b">a\n" + b"AAAAAAAAA\n" * (1 << 22))):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(text, 9))
        assert peak(lambda path=path: list(read_fasta(path))) < tool.SLACK


def test_a_long_header_in_a_small_file_is_refused(tmp_path) -> None:
    text = json.dumps({f"t{i}": {} for i in range(100_000)}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert peak(lambda: load_checkpoint(tmp_path / "x.safetensors")) < 4 * len(text) + tool.SLACK


def test_a_zip_bomb_is_refused(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        pickle = tool._torch_pickle({"w": (5_000_000,)}, 2)
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/data/0", bytes(20_000_000))
    assert peak(lambda: load_checkpoint(tmp_path / "x.pt")) < tool.SLACK


def test_a_line_that_is_only_a_stop_is_named(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"MKT\n*\n")
    with pytest.raises(InvalidSequence, match="line 2 has no letters"):
        list(read_fasta(tmp_path / "x"))
