"""What `embed_fasta` and `embed_iter` give: the numbers of `encode`, in each format, for every odd input."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from bulk_runs import DIM, LAST, fasta, rows, write_fasta
from conftest import ALL, ROUNDING, assert_close, assert_same, random_sequence

import numpyesm
from numpyesm import ESM2, InvalidOption, InvalidSequence, MissingExtra
from numpyesm.bulk import embed_fasta
from numpyesm.errors import BulkError
from numpyesm.fasta import Record
from numpyesm.passes import Passes
from numpyesm.results import EncodeResult

pytest.importorskip("pyarrow")
h5py = pytest.importorskip("h5py")

# What batch mates may change with NumPy on AVX2, see CONTRIBUTING.md: contacts move most.
BATCHED = 1e-5
MEAN = f"mean_{LAST}"
LONG = random_sequence(2500)
HALF = 1e-3  # what is left of a number in float16


def means(results: list[EncodeResult]) -> list[Any]:
    return [result.to_arrays()[MEAN] for result in results]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.slow
def test_parquet_in_input_order_and_read_by_all(model: ESM2, tmp_path: Path, dtype: str) -> None:
    pandas, polars, duckdb = (pytest.importorskip(name) for name in ("pandas", "polars", "duckdb"))
    source = write_fasta(tmp_path / "in.fasta", 20, duplicates=12, longest=60)
    path = tmp_path / "out.parquet"
    summary = embed_fasta(source, path, model, repr_layers=[0, -1], include=ALL, dtype=dtype, tokens_per_batch=300)
    assert (summary.records, summary.sequences, summary.rejected, summary.computed) == (32, 20, 0, 20)
    assert set(tmp_path.iterdir()) == {source, path}
    records = [record.split("\n") for record in source.read_text().split(">")[1:]]
    expected = model.encode([record[1] for record in records], [0, -1], ALL)

    for i, (row, (header, sequence, _), result) in enumerate(zip(rows(path), records, expected, strict=True), start=1):
        assert (row["record"], row["id"], row["description"]) == (i, header.split()[0], header)
        assert (row["length"], row["residues"]) == (len(sequence), len(sequence))
        assert row["sequence_hash"] == hashlib.sha256(sequence.encode()).hexdigest()
        for name, array in result.to_arrays().items():
            value = np.reshape(row[name], row.get(f"{name}_shape", -1))
            assert_close(value, array, HALF if dtype == "fp16" else BATCHED)

    queried = [row[0] for row in duckdb.sql(f"SELECT {MEAN} FROM '{path}' ORDER BY record").fetchall()]
    for column in (pandas.read_parquet(path)[MEAN], polars.read_parquet(path)[MEAN], queried):
        assert_close(np.stack([np.array(value) for value in column]), means(expected), HALF)

    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    assert schema.field(MEAN).type == pyarrow.list_({"fp32": pyarrow.float32(), "fp16": pyarrow.float16()}[dtype], DIM)
    about = json.loads(schema.metadata[b"numpyesm"])
    assert (about["weights"]["synthetic"], len(about["weights"]["sha256"])) == (True, 64)
    assert (about["version"], about["parameters"]["repr_layers"]) == (numpyesm.__version__, [0, LAST])


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_hdf5_as_uniprot_has_it(model: ESM2, tmp_path: Path, dtype: str) -> None:
    sequences = [random_sequence(n, n) for n in (12, 30, 7, 12, 9)]
    names = {"P1": "P1", "a%2Fb": "a/b", "P1#2": "P1", "%2E": ".", "%25": "%"}
    headers = [f"{id} {'x' * 100_000}" for id in names.values()]
    source = fasta(tmp_path / "in.fasta", *zip(headers, sequences, strict=True))
    embed_fasta(source, tmp_path / "o.h5", model, dtype=dtype)
    with h5py.File(tmp_path / "o.h5") as file:
        assert json.loads(file.attrs["numpyesm"])["counts"]["records"] == 5
        # UniProt's own example reads its files in this way.
        shapes = {key: dataset.shape for key, dataset in file.items()}
        assert shapes == {key: (len(s), DIM) for key, s in zip(names, sequences, strict=True)}
        results = model.encode(sequences, include=["mean", "per_token"])
        for (key, id), header, result in zip(names.items(), headers, results, strict=True):
            arrays, within = result.to_arrays(), HALF if dtype == "fp16" else BATCHED
            assert file[key].dtype == {"fp32": np.float32, "fp16": np.float16}[dtype]
            assert_close(file[key], arrays[f"per_token_{LAST}"], within)
            assert_close(file[key].attrs[MEAN], arrays[MEAN], within)
            assert (file[key].attrs["original_id"], file[key].attrs["description"]) == (id, header)


def test_hdf5_of_means_and_of_everything(model: ESM2, tmp_path: Path) -> None:
    """bio_embeddings and biotrainer read `original_id` of every item, groups included."""
    source = fasta(tmp_path / "in.fasta", ("contacts", "MKTAYI"), ("tr|A0A1|B", "MKT"))
    embed_fasta(source, tmp_path / "mean.h5", model, include=["mean"])
    with h5py.File(tmp_path / "mean.h5") as file:
        assert {key: item.shape for key, item in file.items()} == {"contacts": (DIM,), "tr|A0A1|B": (DIM,)}
    embed_fasta(source, tmp_path / "all.h5", model, include=ALL, repr_layers=[1, -1], ids="accession")
    result = model.encode(["MKTAYI"], [1, -1], ALL)[0].to_arrays()
    with h5py.File(tmp_path / "all.h5") as file:
        main = file["contacts#2"]  # the group of contact maps has the name
        assert_close(main, result[f"per_token_{LAST}"])
        for name in ("mean_1", f"bos_{LAST}"):
            assert_close(main.attrs[name], result[name])
        for name in ("per_token_1", "contacts", "logits", "attentions"):
            assert_close(file[f"{name}/contacts#2"], result[name])
        assert file.attrs["model_name"] == model.name
        assert all(item.attrs["original_id"] for item in file.values())
        for group in (file, file["contacts"]):
            found = [item.attrs["original_id"] for item in group.values() if isinstance(item, h5py.Dataset)]
            assert sorted(found) == ["A0A1", "contacts"]


def test_folder_with_a_file_a_record(model: ESM2, tmp_path: Path) -> None:
    ids = ["sp|P1|X", "sp/P1/X", "SP_p1_x", "../escape", "..", "a"]
    sequences = [random_sequence(5 + i) for i in range(len(ids))]
    source = fasta(tmp_path / "in.fasta", *zip(ids, sequences, strict=True))
    embed_fasta(source, f"{tmp_path}/out/", model, include=ALL)
    assert len({path.name.lower() for path in (tmp_path / "out").iterdir()}) == len(ids) + 2
    assert set(tmp_path.iterdir()) == {source, tmp_path / "out"}
    for id, row, result in zip(ids, rows(tmp_path / "out"), model.encode(sequences, include=ALL), strict=True):
        assert row["id"] == id
        for name, array in result.to_arrays().items():
            assert_close(row[name], array)


def test_odd_records(model: ESM2, tmp_path: Path) -> None:
    """See test_fasta.py for what a file may look like."""
    source = tmp_path / "odd.fasta"
    source.write_bytes(
        b">first one\r\nmkta\r\n\r\nyi*\r\n>\r\nMK-X\r\n>dup\r\nMKTAYI\n>dup again\r\nMKT AYI\n>empty\n>star\n*\n"
        b">inner\nMK*T\n>j\nMKTJ\n>mask\nMK<mask>\n>Esp\xe8ce in Latin-1\nMKU\n>\xc3\xa9 in UTF-8\tand a tab\nMKO\n"
        b">long\n%b\n>endless\n%b\n>last\nW" % (LONG.encode(), (b"MKTQ*" * 12 + b"\n") * 33_334)
    )
    summary = embed_fasta(source, tmp_path / "o.parquet", model, include=["mean"])
    assert (summary.records, summary.sequences, summary.rejected) == (7, 5, 7)
    found = rows(tmp_path / "o.parquet")
    sequences = ["MKTAYI", "MK-X", "MKTAYI", "MKTAYI", "MKU", "MKO", "W"]
    assert [row["id"] for row in found] == ["first", "sequence_2", "dup", "dup", "Espèce", "é", "last"]
    assert [row["length"] for row in found] == [*map(len, sequences)]
    assert [row["record"] for row in found] == [1, 2, 3, 4, 10, 11, 14]
    assert found[4]["description"] == "Espèce in Latin-1"
    assert_close([row[MEAN] for row in found], means(model.encode(sequences)))
    reasons = {
        "id": "reason", "empty": "no sequence", "star": "no sequence", "inner": "'*' at position 3",
        "j": "'J' at position 4", "mask": "<mask>", "long": "2500 residues, at most 2048", "endless": "1000000 letters",
    }  # fmt: skip
    lines = [line.split("\t") for line in (tmp_path / "o.rejected.tsv").read_text().splitlines()]
    assert [line[1] for line in lines] == list(reasons)
    assert all(reason in line[4] for line, reason in zip(lines, reasons.values(), strict=True))


def test_strict_stops_at_the_first_and_leaves_nothing(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"), ("bad", "MKJ"), ("worse", "1"))
    with pytest.raises(InvalidSequence, match=r"record 2 \(bad\): 'J' at position 3"):
        embed_fasta(source, tmp_path / "o.parquet", model, strict=True)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["o.parquet", "o.h5", "o"])
def test_all_rejected_is_an_empty_table(model: ESM2, tmp_path: Path, name: str) -> None:
    summary = embed_fasta(fasta(tmp_path / "in.fasta", ("bad", "J")), tmp_path / name, model)
    assert (summary.records, summary.rejected) == (0, 1)
    assert rows(tmp_path / name) == []


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
    assert listed.read_text() == before
    listed.unlink()
    assert embed_fasta(source, tmp_path / "p.parquet", model).already_complete
    assert listed.read_text() == before


@pytest.mark.slow
def test_long_sequences(tiny: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("short", "MKT"), ("long", LONG), ("edge", LONG[:2048]), ("bad", LONG + "J"))
    cut = embed_fasta(source, tmp_path / "cut.parquet", tiny, include=["mean", "bos"], long="truncate")
    assert (cut.records, cut.rejected) == (3, 1)
    assert "'J' at position 2501" in (tmp_path / "cut.rejected.tsv").read_text()
    _, long, edge = rows(tmp_path / "cut.parquet")
    assert (long["length"], long["residues"]) == (2500, 2048)
    assert_close(long["mean_1"], edge["mean_1"])

    embed_fasta(source, tmp_path / "win.h5", tiny, include=ALL, long="windows", overlap=500)
    parts = [one.to_arrays() for one in tiny.encode([LONG[:2048], LONG[452:]], include=ALL)]
    residues, maps = np.full((2, 2500, 16), np.nan), np.full((2, 2500, 2500), np.nan, np.float32)
    for i, window in enumerate((slice(0, 2048), slice(452, 2500))):
        residues[i, window], maps[i, window, window] = parts[i]["per_token_1"], parts[i]["contacts"]
    average = np.nanmean(residues, axis=0)
    with pytest.warns(RuntimeWarning, match="empty slice"):  # of pairs that no window contains
        mapped = np.nanmean(maps, axis=0)
    with h5py.File(tmp_path / "win.h5") as file:
        assert_close(file["long"], average)
        assert_close(file["long"].attrs["mean_1"], average.mean(axis=0))
        assert_close(file["long"].attrs["bos_1"], np.mean([part["bos_1"] for part in parts], axis=0))
        assert_close(file["contacts/long"], mapped, 2e-5)
        assert_close(file["logits/long"][:452], parts[0]["logits"][:452])
        assert_close(file["attentions/long"][:, -452:], parts[1]["attentions"][:, -452:])
        assert_close(file["edge"], parts[0]["per_token_1"])


def test_a_finished_output_is_not_computed_again(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "J"))
    out, rejected = tmp_path / "o.parquet", tmp_path / "o.rejected.tsv"
    run = partial(embed_fasta, source, out, model)
    assert not run().already_complete
    before = out.stat().st_mtime_ns
    again = run()
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
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "dtype"),
        ({"long": "cut"}, "long"),
        ({"overlap": 2000}, "overlap"),
        ({"include": ["means"]}, "include"),
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"engine": "spark"}, "engine"),
        ({"workers": 2}, "engine='ray'"),
        ({"engine": "ray", "address": "ray://host:10001"}, "Ray client"),
        ({"inputs": []}, "no input"),
        ({"inputs": ["-", "-"]}, "once"),
        ({"output": "in.parquet"}, "input itself"),
    ],
)
def test_wrong_options(model: ESM2, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("ray")
    source = fasta(tmp_path / "in.parquet", ("a", "MKT"))
    inputs = options.pop("inputs", [source])
    output = tmp_path / options.pop("output", "o.parquet")
    with pytest.raises(InvalidOption, match=message):
        embed_fasta(inputs, output, model, **options)
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

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield f"s{taken}", random_sequence(5 + taken % 40, taken % 60)

    found = list(itertools.islice(model.embed_iter(endless(), [0, -1], ["mean", "bos"], tokens_per_batch=200), 60))
    assert taken < 120
    assert [record.id for record, _ in found] == [f"s{i}" for i in range(1, 61)]
    assert [result.sequence_index for _, result in found] == list(range(60))
    expected = model.encode([record.sequence for record, _ in found], [0, -1], ["mean", "bos"])
    assert_same([result for _, result in found], expected, ROUNDING)


def test_embed_iter_computes_twins_once(model: ESM2) -> None:
    with mock.patch.object(Passes, "encode", autospec=True, side_effect=Passes.encode) as encode:
        assert len(list(model.embed_iter(["MKT", "MKTA", "MKT", "MKT"]))) == 4
    assert sum(len(call.args[1]) for call in encode.call_args_list) == 2


def test_embed_iter_and_what_it_refuses(tiny: ESM2) -> None:
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
    with pytest.raises(InvalidSequence, match="one str"):
        tiny.embed_iter("MKT")
    for wrong in (7, None, ("a", "b", "c", "d"), b"MKT"):
        with pytest.raises(InvalidSequence, match="item 0"):
            list(tiny.embed_iter([wrong]))  # type: ignore[list-item]
