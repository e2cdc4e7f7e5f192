"""What `embed_fasta` and `embed_iter` give: the numbers of `encode`, in each format, for every odd input; and parts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import ALL, DIM, LAST, ROUNDING, assert_close, assert_same, fasta, random_sequence, rows, write_fasta
from hypothesis import given
from hypothesis import strategies as st

import numpyesm
from numpyesm import ESM2, InvalidOption, InvalidSequence, MissingExtra
from numpyesm.bulk import embed_fasta
from numpyesm.bulk.lock import FolderLock
from numpyesm.bulk.ray_engine import pool_size
from numpyesm.bulk.settings import Shard
from numpyesm.bulk.writers import free_name, output_format, tsv_line
from numpyesm.bulk.writers.hdf5 import hdf5_name
from numpyesm.config import PRESETS
from numpyesm.errors import BulkError
from numpyesm.fasta import Record
from numpyesm.files import safe_stem
from numpyesm.options import Outputs
from numpyesm.passes import Passes
from numpyesm.streaming.batches import cuts
from numpyesm.streaming.packing import check_budget, pack, token_budget

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")

# What batch mates may change with NumPy on AVX2, see CONTRIBUTING.md: contacts move most.
BATCHED = 1e-5
MEAN = f"mean_{LAST}"
LONG = random_sequence(2500)
HALF = 1e-3  # what is left of a number in float16


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["out.parquet", "out.h5", "out"])
def test_the_numbers_of_encode_in_input_order(model: ESM2, tmp_path: Path, name: str, dtype: str) -> None:
    source, path = write_fasta(tmp_path / "in.fasta", 20, duplicates=12, longest=60), tmp_path / name
    summary = embed_fasta(source, path, model, repr_layers=[0, -1], include=ALL, dtype=dtype, tokens_per_batch=300)
    assert (summary.records, summary.sequences, summary.rejected, summary.computed) == (32, 20, 0, 20)
    assert set(tmp_path.iterdir()) == {source, path}
    records = [record.split("\n") for record in source.read_text().split(">")[1:]]
    expected = model.encode([record[1] for record in records], [0, -1], ALL)
    for i, (row, (header, sequence, _), result) in enumerate(zip(rows(path), records, expected, strict=True), start=1):
        assert (int(row["record"]), row["id"], row["description"]) == (i, header.split()[0], header)
        assert (int(row["length"]), int(row["residues"])) == (len(sequence), len(sequence))
        assert row["sequence_hash"] == hashlib.sha256(sequence.encode()).hexdigest()
        for kind, array in result.to_arrays().items():
            assert_close(row[kind], array, HALF if dtype == "fp16" else BATCHED)
    if name == "out.parquet":
        schema = pyarrow.parquet.read_schema(path)
        assert schema.field(MEAN).type == pyarrow.list_(getattr(pyarrow, dtype.replace("fp", "float"))(), DIM)
        about = json.loads(schema.metadata[b"numpyesm"])
        assert (about["weights"]["synthetic"], len(about["weights"]["sha256"])) == (True, 64)
        assert (about["version"], about["parameters"]["repr_layers"]) == (numpyesm.__version__, [0, LAST])


def test_odd_names_and_hdf5_as_uniprot_has_it(model: ESM2, tmp_path: Path) -> None:
    """A data set per id; bio_embeddings and biotrainer read `original_id` of every item, groups included."""
    names = {"P1": "P1", "a%2Fb": "a/b", "P1#2": "P1", "%2E": ".", "%25": "%", "contacts#2": "contacts", "p1": "p1",
             "..%2Fescape": "../escape", "%2E%2E": ".."}  # fmt: skip
    sequences = [random_sequence(n, n) for n in (12, 30, 7, 12, 9, 5, 3, 4, 6)]
    headers = [f"{id} {'x' * 100_000}" for id in names.values()]
    source = fasta(tmp_path / "in.fasta", *zip(headers, sequences, strict=True))
    embed_fasta(source, tmp_path / "o.h5", model, include=["per_token", "contacts"], dtype="fp16")
    with h5py.File(tmp_path / "o.h5") as file:
        assert (json.loads(file.attrs["numpyesm"])["counts"]["records"], file.attrs["model_name"]) == (9, model.name)
        for group in (file, file["contacts"]):
            found = {key: item for key, item in group.items() if isinstance(item, h5py.Dataset)}
            assert {key: item.attrs["original_id"] for key, item in found.items()} == names
            assert {item.dtype for item in found.values()} == {np.dtype(np.float16)}
        assert {key: file[key].attrs["description"] for key in names} == dict(zip(names, headers, strict=True))
        assert {key: file[key].shape for key in names} == {
            key: (len(s), DIM) for key, s in zip(names, sequences, strict=True)
        }
        assert file["contacts"].attrs["original_id"] == "contacts"
    embed_fasta(source, tmp_path / "mean.h5", model, include=["mean", "bos"])
    assert {row[MEAN].shape for row in rows(tmp_path / "mean.h5")} == {(DIM,)}
    embed_fasta(source, f"{tmp_path}/out/", model)
    assert [row["id"] for row in rows(tmp_path / "out")] == [*names.values()]
    assert len({path.name.lower() for path in (tmp_path / "out").iterdir()}) == len(names) + 2
    assert {path.name for path in tmp_path.iterdir()} == {"in.fasta", "o.h5", "mean.h5", "out"}


def test_odd_records(model: ESM2, tmp_path: Path) -> None:
    """See test_text.py for what a file may look like."""
    source = tmp_path / "odd.fasta"
    source.write_bytes(
        b">first one\r\nmkta\r\n\r\nyi*\r\n>\r\nMK-X\r\n>dup\r\nMKTAYI\n>dup again\r\nMKT AYI\n>empty\n>star\n*\n"
        b">inner\nMK*T\n>j\nMKTJ\n>mask\nMK<mask>\n>Esp\xe8ce in Latin-1\nMKU\n>\xc3\xa9 in UTF-8\tand a tab\nMKO\n"
        b">words\nno such thing\nMK\n>gaps\n----\n>long\n%b\n>endless\n%b\n>last\nW"
        % (LONG.encode(), (b"MKTQ*" * 12 + b"\n") * 33_334)
    )
    summary = embed_fasta(source, tmp_path / "o.parquet", model, include=["mean"])
    assert (summary.records, summary.sequences, summary.rejected) == (7, 5, 9)
    found = rows(tmp_path / "o.parquet")
    sequences = ["MKTAYI", "MK-X", "MKTAYI", "MKTAYI", "MKU", "MKO", "W"]
    assert [row["id"] for row in found] == ["first", "sequence_2", "dup", "dup", "Espèce", "é", "last"]
    assert [row["length"] for row in found] == [*map(len, sequences)]
    assert [row["record"] for row in found] == [1, 2, 3, 4, 10, 11, 16]
    assert found[4]["description"] == "Espèce in Latin-1"
    assert_close([row[MEAN] for row in found], [result.embeddings[LAST] for result in model.encode(sequences)])
    reasons = {
        "id": "reason", "empty": "no sequence", "star": "no sequence", "inner": "'*' at position 3",
        "j": "'J' at position 4", "mask": "<mask>", "words": "is text or a table", "gaps": "only gaps",
        "long": "2500 residues, at most 2048", "endless": "1000000 letters",
    }  # fmt: skip
    lines = [line.split("\t") for line in (tmp_path / "o.rejected.tsv").read_text().splitlines()]
    assert [line[1] for line in lines] == list(reasons)
    assert all(reason in line[4] for line, reason in zip(lines, reasons.values(), strict=True))


@pytest.mark.slow
def test_outputs_of_one_stem_keep_their_own_lists(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"), ("long", LONG))
    bad = fasta(tmp_path / "bad.fasta", ("bad", "J"))
    listed = tmp_path / "p.rejected.tsv"
    assert embed_fasta(source, tmp_path / "p.parquet", model).rejected_file == listed
    before = listed.read_text()
    assert "2500 residues" in before
    assert embed_fasta(source, tmp_path / "p.h5", model, long="truncate").rejected == 0
    assert embed_fasta(bad, tmp_path / "p.h5", model, overwrite=True).rejected_file == tmp_path / "p.h5.rejected.tsv"
    assert embed_fasta(bad, tmp_path / "p", model).rejected_file == tmp_path / "p.folder.rejected.tsv"
    assert rows(tmp_path / "p.h5") == rows(tmp_path / "p") == []
    assert listed.read_text() == before
    listed.unlink()
    assert embed_fasta(source, tmp_path / "p.parquet", model).already_complete
    assert listed.read_text() == before
    assert embed_fasta(bad, tmp_path / "p.parquet", model, overwrite=True).records == 0
    assert rows(tmp_path / "p.parquet") == []


@pytest.mark.slow
def test_long_sequences(tiny: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("short", "MKT"), ("long", LONG), ("edge", LONG[:2048]), ("bad", LONG + "J"))
    cut = embed_fasta(source, tmp_path / "cut.parquet", tiny, include=["mean", "bos"], long="truncate")
    assert (cut.records, cut.rejected) == (3, 1)
    assert "'J' at position 2501" in (tmp_path / "cut.rejected.tsv").read_text()
    _, long, edge = rows(tmp_path / "cut.parquet")
    assert (long["length"], long["residues"]) == (2500, 2048)
    assert_close(long["mean_1"], edge["mean_1"])

    embed_fasta(source, tmp_path / "windows", tiny, include=ALL, long="windows", overlap=500)
    _, long, edge = rows(tmp_path / "windows")
    first, last = (one.to_arrays() for one in tiny.encode([LONG[:2048], LONG[452:]], include=ALL))
    for name, axis in (("per_token_1", 0), ("logits", 0), ("attentions", 1)):
        (alone, ours), (theirs, rest) = np.split(first[name], [452], axis), np.split(last[name], [1596], axis)
        assert_close(long[name], np.concatenate([alone, (ours + theirs) / 2, rest], axis))
    assert_close(long["mean_1"], long["per_token_1"].mean(axis=0))
    assert_close(long["bos_1"], (first["bos_1"] + last["bos_1"]) / 2)
    found, ours, theirs = long["contacts"], first["contacts"], last["contacts"]
    assert_close(found[452:2048, 452:2048], (ours[452:, 452:] + theirs[:1596, :1596]) / 2, 2e-5)
    assert_close(found[:452, :2048], ours[:452], 2e-5)
    assert_close(found[2048:, 452:], theirs[1596:], 2e-5)
    assert np.isnan(found[:452, 2048:]).all()  # no window has these pairs
    assert_close(edge["per_token_1"], first["per_token_1"])


def test_a_finished_output_is_not_computed_again(model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "J"))
    out, rejected = tmp_path / "o.parquet", tmp_path / "o.rejected.tsv"
    run = partial(embed_fasta, source, out, model)
    assert not run().already_complete
    before = out.stat().st_mtime_ns
    rejected.unlink()
    monkeypatch.setattr(sys, "stdin", source.open())  # can be read only once
    again = embed_fasta("-", out, model)
    assert again.already_complete
    assert (again.records, again.rejected, again.computed) == (1, 1, 0)
    with pytest.raises(BulkError, match=r"to another run \(dtype \"fp32\" instead of \"fp16\"\)"):
        run(dtype="fp16")
    fasta(source, ("a", "MKTA"))
    with pytest.raises(BulkError, match="another input"):
        run()
    assert out.stat().st_mtime_ns == before
    assert rejected.exists()
    assert run(overwrite=True).records == 1
    assert not rejected.exists()  # it was of the run before
    rejected.write_text("mine\n")
    run(overwrite=True)
    assert rejected.read_text() == "mine\n"


def test_what_is_not_ours_is_refused(model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = partial(embed_fasta, fasta(tmp_path / "in.fasta", ("good", "MKT")), model=model)
    for name in ("o.parquet.partial", "full", "mounted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "mine.h5").write_text("mine")
    ours = run(output=tmp_path / "ours").output
    (ours / "notes.txt").write_text("mine")
    for name, overwrite, said in (
        ("o.parquet", False, r"o\.parquet\.partial was not made by numpyesm embed, which needs that name"),
        ("full", False, "exists and was not made by numpyesm embed; choose another"),
        ("full", True, "remove it yourself"),
        ("mine.h5", False, "exists and was not made by numpyesm embed; --overwrite replaces it"),
        ("ours", True, r"other files \(notes.txt\)"),
    ):
        with pytest.raises(BulkError, match=said):
            run(output=tmp_path / name, overwrite=overwrite)
    (tmp_path / "file.partial").write_text("mine")
    (tmp_path / "link.partial").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            run(output=tmp_path / name)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(InvalidOption, match=r"mount point.*mounted/embeddings/"):
        run(output=tmp_path / "mounted")
    mine = [*tmp_path.glob("*/mine.txt"), ours / "notes.txt", tmp_path / "mine.h5"]
    assert [path.read_text() for path in mine] == ["mine"] * 5
    assert len(rows(ours)) == 1
    assert run(output=tmp_path / "mine.h5", overwrite=True).records == 1


def test_asking_for_what_is_done_does_not_undo_what_is_begun(
    model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is to replace the output is interrupted; the old command is given once more."""
    source, out = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "MKTA")), tmp_path / "o.parquet"
    embed_fasta(source, out, model)
    with monkeypatch.context() as patch:
        patch.setattr("numpyesm.bulk.writers.parquet.write", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert embed_fasta(source, out, model).already_complete
    summary = embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert (summary.records, summary.computed) == (2, 0)
    assert set(tmp_path.iterdir()) == {source, out}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "fp64"}, InvalidOption, "dtype"),
        ({"long": "cut"}, InvalidOption, "long"),
        ({"overlap": 2000}, InvalidOption, "overlap"),
        ({"engine": "spark"}, InvalidOption, "engine"),
        ({"workers": 2}, InvalidOption, "engine='ray'"),
        ({"engine": "ray", "address": "ray://host:10001"}, InvalidOption, "Ray client"),
        ({"engine": "ray", "address": "127.0.0.1:1"}, BulkError, r"no Ray cluster at 127\.0\.0\.1:1"),
        ({"inputs": []}, InvalidOption, "no input"),
        ({"inputs": ["-", "-"]}, InvalidOption, "once"),
        ({"output": "in.parquet"}, InvalidOption, "input itself"),
        ({"strict": True}, InvalidSequence, r"record 2 \(bad\): 'J' at position 3"),
    ],
)
def test_what_leaves_nothing_behind(
    model: ESM2, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    pytest.importorskip("ray")
    source = fasta(tmp_path / "in.parquet", ("good", "MKT"), ("bad", "MKJ"), ("worse", "1"))
    options = {"inputs": [source], "output": "o.parquet"} | options
    with pytest.raises(error, match=message):
        embed_fasta(model=model, **options | {"output": tmp_path / options["output"]})
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("library", ["pyarrow.parquet", "h5py", "filelock", "ray"])
def test_missing_libraries_name_the_extra(
    model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    source, engine = fasta(tmp_path / "in.fasta", ("a", "MKT")), "ray" if library == "ray" else "local"
    output = {"pyarrow.parquet": "o.parquet", "h5py": "o.h5"}.get(library, "o")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=r"numpyesm\[ray\]" if engine == "ray" else r"numpyesm\[bulk\]"):
        embed_fasta(source, tmp_path / output, model, engine=engine)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tiny: ESM2, tmp_path: Path) -> None:
    """What Python holds at most, of 200 and of 2,000 records; a journal in memory would show."""
    peaks = []
    for count in (200, 200, 2000):
        source = write_fasta(tmp_path / f"{count}.fasta", count, longest=12)
        tracemalloc.start()
        embed_fasta(source, tmp_path / f"{count}.parquet", tiny, overwrite=True, tokens_per_batch=600)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + (5 << 20)  # row groups grow to 2048 rows


def test_embed_iter_is_lazy_ordered_and_equal_to_encode(model: ESM2) -> None:
    taken = 0

    def many() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for taken in range(1, 1000):  # many enough to show that all were read
            yield f"s{taken}", random_sequence(5 + taken % 40, taken % 60)

    found = list(itertools.islice(model.embed_iter(many(), [0, -1], ["mean", "bos"], tokens_per_batch=200), 60))
    assert taken < 120
    assert [record.id for record, _ in found] == [f"s{i}" for i in range(1, 61)]
    assert [result.sequence_index for _, result in found] == list(range(60))
    expected = model.encode([record.sequence for record, _ in found], [0, -1], ["mean", "bos"])
    assert_same([result for _, result in found], expected, ROUNDING)
    with mock.patch.object(Passes, "encode", autospec=True, side_effect=Passes.encode) as encode:
        assert len(list(model.embed_iter(["MKT", "MKTA", "MKT", "MKT"]))) == 4
    assert sum(len(call.args[1]) for call in encode.call_args_list) == 2  # twins are computed once


def test_embed_iter_and_what_it_refuses(tiny: ESM2) -> None:
    """See also test_given.py."""
    records = [Record("a", "a one", "MKT"), ("b", "MKJ"), "MK", ("c", LONG)]
    stream = tiny.embed_iter(records)
    assert next(stream)[0].id == "a"
    with pytest.raises(InvalidSequence, match=r"item 1: b: 'J' at position 3"):
        next(stream)
    refused: list[str] = []
    kept = list(tiny.embed_iter(records, rejected=lambda record, error: refused.append(record.id)))
    assert [(record.id, result.sequence_index) for record, result in kept] == [("a", 0), ("sequence_3", 2)]
    assert refused == ["b", "c"]
    assert len(list(tiny.embed_iter([("c", LONG)], long="windows"))) == 1
    (_, cut), (_, first) = tiny.embed_iter([("c", LONG), ("d", LONG[:2048])], long="truncate")
    assert_close(cut.to_arrays()["mean_1"], first.to_arrays()["mean_1"])
    assert list(tiny.embed_iter([])) == []
    with pytest.raises(InvalidOption):
        tiny.embed_iter([], include=["means"])  # at once, not at the first record


# -- parts on their own ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3000), max_size=200), st.integers(1, 5000))
def test_packing_loses_and_doubles_nothing(lengths: list[int], budget: int) -> None:
    items = list(enumerate(lengths))
    batches = list(pack(items, lambda item: item[1], budget))
    assert sorted(item for batch in batches for item in batch) == items
    assert all(batch for batch in batches)
    assert all(len(batch) == 1 or sum(n + 2 for _, n in batch) <= budget for batch in batches)


def test_packing_fills_batches() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).lognormal(5.7, 0.7, 5000).clip(30, 2000)]
    batches = [sum(n + 2 for n in batch) for batch in pack(lengths, lambda n: n, 4096)]
    assert np.mean(batches) > 0.85 * 4096


def test_budget_follows_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, mean = PRESETS["esm2-35m"], Outputs(("mean",), (12,))
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 64 << 30)
    assert token_budget(config, 1, mean) == token_budget(config, 2, mean) == 4096
    assert token_budget(config, 16, mean) == 32768
    assert token_budget(config, 1000, mean) == 65536
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 1 << 30)
    assert 2050 <= token_budget(config, 16, mean) < 32768
    assert token_budget(config, 16, Outputs(("contacts",))) < token_budget(config, 16, mean)
    monkeypatch.setattr("numpyesm.streaming.packing.available_memory", lambda: 0)
    assert token_budget(config, 16, mean) == 2050
    for wrong in (0, -1, 1.5, "4096", True):
        with pytest.raises(InvalidOption, match="tokens_per_batch"):
            check_budget(wrong)


@given(st.integers(1, 40000), st.integers(0, 1024))
def test_windows_cover_everything_and_overlap(length: int, overlap: int) -> None:
    windows = cuts(length, overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    assert all(stop - start == min(length, 2048) for start, stop in windows)
    assert all(a[1] - b[0] >= overlap for a, b in itertools.pairwise(windows))
    if length > 2048:
        assert len(windows) == -(-(length - overlap) // (2048 - overlap))  # no more than it takes


def test_a_pool_that_fits_the_nodes() -> None:
    """What does not fit is refused: Ray would wait for it for ever."""
    for nodes, workers, threads, pool in (
        ([2], None, None, (1, 2)),
        ([2], 2, None, (2, 1)),
        ([0, 64, 64], None, None, (32, 4)),
        ([0, 64, 64], 4, None, (4, 32)),
        ([8, 3], None, None, (3, 3)),
        ([8, 8], None, 8, (2, 8)),
        ([4, 4, 4], 1, None, (1, 4)),
    ):
        assert pool_size(nodes, workers, threads) == pool
    for workers, threads in ((3, 8), (None, 16)):
        with pytest.raises(InvalidOption, match="room for"):
            pool_size([8, 8], workers, threads)


def test_shards_are_a_partition_and_keep_twins_together() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(1000)]
    taken = [[Shard(i, 7).takes(digest) for i in range(1, 8)] for digest in digests]
    assert all(sum(row) == 1 for row in taken)
    assert all(80 < sum(column) < 220 for column in zip(*taken, strict=True))
    assert Shard.parse("3/8") == Shard(3, 8)
    assert Shard.parse(None).takes(digests[0])
    for wrong in ("0/3", "4/3", "1/0", "1", "a/b", "1/2/3", "-1/2", "1 / 2", ""):
        with pytest.raises(InvalidOption, match="shard"):
            Shard.parse(wrong)


def test_names_and_cells() -> None:
    for id, key, file in (
        ("sp|P1|X_HUMAN", "sp|P1|X_HUMAN", "sp_P1_X_HUMAN"),
        ("a/b", "a%2Fb", "a_b"),
        ("../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "etc_passwd"),
        ("..", "%2E%2E", "record"),
        ("100%", "100%25", "100"),
        ("-rf", "-rf", "_-rf"),
        ("CON", "CON", "_CON"),
        ("nul.1", "nul.1", "_nul.1"),
        ("é\0ß", "é%00ß", "record"),
        ("x" * 300, "x" * 300, "x" * 120),
    ):
        assert (hdf5_name(id), safe_stem(id)) == (key, file)
    taken: set[str] = set()
    for _ in range(100):
        taken.add(free_name(taken.__contains__, "x", "#"))
    assert taken == {"x", *(f"x#{i}" for i in range(2, 101))}
    assert tsv_line(1, "a\tb\r\nc", "d\u2028e") == "1\ta b  c\td e\n"  # whatever stands in a header


def test_output_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.h5").mkdir()
    forms = {"a.parquet": "parquet", "a.PQ": "parquet", "b.h5": "hdf5", "c.hdf5": "hdf5", "d/": "folder", "d": "folder",
             "v1.2/": "folder", "folder.h5": "folder"}  # fmt: skip
    assert {output: output_format(output) for output in forms} == forms
    for other in ("", "-", "a.csv", "a.npz", "a.parquet.gz", "file", "file/"):
        with pytest.raises(InvalidOption, match=r"\.parquet, \.h5 or a folder"):
            output_format(other)


def test_one_holder_of_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "x.partial"
    with FolderLock(folder):
        with pytest.raises(BulkError, match=f"another run.*process {os.getpid()} on"), FolderLock(folder):
            pass
        (folder / "journal.sqlite").write_bytes(b"")
        (folder / "output").mkdir()
    assert folder.exists()
    with FolderLock(folder) as lock:
        lock.empty()
    assert list(tmp_path.iterdir()) == []


def test_locks_are_exclusive_while_folders_come_and_go(tmp_path: Path) -> None:
    """Many runs that end and begin at once: never two inside, and nothing goes wrong but that one is refused."""
    inside = threading.Lock()

    def run(_: int) -> None:
        with suppress(BulkError), FolderLock(tmp_path / "x.partial"):
            assert inside.acquire(blocking=False)
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(run, range(400)))) == 400
