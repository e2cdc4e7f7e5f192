"""What `embed_fasta` and `embed_iter` give: the numbers of `encode`, in each format, for every odd input."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_runs import DIM, LAST, rows, write_fasta
from conftest import random_sequence

from numpyesm import ESM2, InvalidOption, InvalidSequence, MissingExtra
from numpyesm.bulk import Progress, Summary, embed_fasta
from numpyesm.errors import BulkError
from numpyesm.fasta import Record
from numpyesm.passes import Passes

pytest.importorskip("pyarrow")
h5py = pytest.importorskip("h5py")

ALL = ["mean", "per_token", "bos", "contacts", "logits", "attentions"]
LONG = random_sequence(5000)


def fasta(path: Path, *records: tuple[str, str]) -> Path:
    path.write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))
    return path


class Counting(Progress):
    """Counts what was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_parquet_in_input_order_and_read_by_all(model: ESM2, tmp_path: Path) -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    duckdb = pytest.importorskip("duckdb")
    source = write_fasta(tmp_path / "in.fasta", 50, duplicates=30)
    out = tmp_path / "out.parquet"
    summary = embed_fasta(source, out, model, repr_layers=[0, -1], tokens_per_batch=300)
    assert (summary.records, summary.sequences, summary.rejected, summary.computed) == (80, 50, 0, 50)
    records = [record.split("\n") for record in source.read_text().split(">")[1:]]
    expected = model.encode([record[1] for record in records], [0, -1], ["mean", "bos"])

    table = pandas.read_parquet(out)
    assert list(table["id"]) == [record[0].split()[0] for record in records]
    assert list(table["description"]) == [record[0] for record in records]
    assert list(table["length"]) == [len(record[1]) for record in records]
    assert list(table["record"]) == list(range(1, 81))
    for layer in (0, LAST):
        np.testing.assert_array_equal(np.stack(table[f"mean_{layer}"]), [r.embeddings[layer] for r in expected])
        np.testing.assert_array_equal(np.stack(table[f"bos_{layer}"]), [r.bos_embeddings[layer] for r in expected])
    frame = polars.read_parquet(out)
    assert frame.schema[f"mean_{LAST}"] == polars.Array(polars.Float32, DIM)
    np.testing.assert_array_equal(frame[f"mean_{LAST}"].to_numpy(), [r.embeddings[LAST] for r in expected])
    found = duckdb.sql(f"SELECT id, mean_{LAST}, sequence_hash FROM '{out}' ORDER BY record").fetchall()
    np.testing.assert_array_equal(
        np.array([row[1] for row in found], np.float32), [r.embeddings[LAST] for r in expected]
    )
    assert found[0][2] == duckdb.sql(f"SELECT sha256('{records[0][1]}')").fetchall()[0][0]

    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(out)
    assert schema.field(f"mean_{LAST}").type == pyarrow.list_(pyarrow.float32(), DIM)
    about = json.loads(schema.metadata[b"numpyesm"])
    assert len(about["weights"]["sha256"]) == 64
    assert about["weights"]["synthetic"] is True
    assert about["version"]
    assert about["parameters"]["repr_layers"] == [0, LAST]
    assert list(tmp_path.iterdir()) == [source, out] or set(tmp_path.iterdir()) == {source, out}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_output_in_parquet(model: ESM2, tmp_path: Path, dtype: str) -> None:
    sequences = [random_sequence(n, n) for n in (1, 30, 7)]
    source = fasta(tmp_path / "in.fasta", *((f"s{i}", s) for i, s in enumerate(sequences)))
    embed_fasta(source, tmp_path / "o.parquet", model, include=ALL, dtype=dtype)
    number = np.float32 if dtype == "fp32" else np.float16
    for row, result in zip(rows(tmp_path / "o.parquet"), model.encode(sequences, include=ALL), strict=True):
        for name, array in result.to_arrays().items():
            value = np.array(row[name], dtype=number)
            if array.ndim == 2:
                value = value.reshape(row[f"{name}_shape"])
            np.testing.assert_array_equal(value, array.astype(number))
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    duckdb = pytest.importorskip("duckdb")
    path, name = tmp_path / "o.parquet", f"mean_{LAST}"
    found = [
        np.stack(pandas.read_parquet(path)[name]),
        np.stack([np.array(value) for value in polars.read_parquet(path)[name].to_list()]),
        np.array([row[0] for row in duckdb.sql(f"SELECT {name} FROM '{path}'").fetchall()]),
    ]
    for one in found:
        np.testing.assert_array_equal(one.astype(number), found[0].astype(number))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_hdf5_as_uniprot_has_it(model: ESM2, tmp_path: Path, dtype: str) -> None:
    sequences = [random_sequence(n, n) for n in (12, 30, 7, 12, 9)]
    ids = ["P1", "a/b", "P1", ".", "%"]
    long_header = "x" * 100_000
    source = fasta(tmp_path / "in.fasta", *((f"{i} {long_header}", s) for i, s in zip(ids, sequences, strict=True)))
    embed_fasta(source, tmp_path / "o.h5", model, dtype=dtype)
    results = model.encode(sequences, include=["mean", "per_token"])
    with h5py.File(tmp_path / "o.h5") as file:
        # UniProt's own example reads its files in this way.
        assert {key: dataset.shape for key, dataset in file.items()} == {
            key: (len(s), DIM) for key, s in zip(["P1", "a%2Fb", "P1#2", "%2E", "%25"], sequences, strict=True)
        }
        for key, id, result in zip(["P1", "a%2Fb", "P1#2", "%2E", "%25"], ids, results, strict=True):
            assert file[key].dtype == {"fp32": np.float32, "fp16": np.float16}[dtype]
            np.testing.assert_array_equal(file[key][...], result.per_token_embeddings[LAST].astype(file[key].dtype))
            np.testing.assert_array_equal(
                file[key].attrs[f"mean_{LAST}"], result.embeddings[LAST].astype(file[key].dtype)
            )
            assert file[key].attrs["original_id"] == id
            assert file[key].attrs["description"] == f"{id} {long_header}"
        assert json.loads(file.attrs["numpyesm"])["counts"]["records"] == 5


def test_hdf5_of_means_and_of_everything(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("contacts", "MKTAYI"), ("b", "MKT"))
    embed_fasta(source, tmp_path / "mean.h5", model, include=["mean"])
    embed_fasta(source, tmp_path / "all.h5", model, include=ALL, repr_layers=[1, -1])
    result = model.encode(["MKTAYI"], [1, -1], ALL)[0].to_arrays()
    with h5py.File(tmp_path / "mean.h5") as file:
        assert {key: dataset.shape for key, dataset in file.items()} == {"contacts": (DIM,), "b": (DIM,)}
    with h5py.File(tmp_path / "all.h5") as file:
        main = file["contacts#2"]  # the group of contact maps has the name
        assert main.attrs["original_id"] == "contacts"
        np.testing.assert_array_equal(main[...], result[f"per_token_{LAST}"])
        for name in ("mean_1", f"bos_{LAST}"):
            np.testing.assert_array_equal(main.attrs[name], result[name])
        for name in ("per_token_1", "contacts", "logits", "attentions"):
            np.testing.assert_array_equal(file[f"{name}/contacts#2"][...], result[name])


def test_folder_with_a_file_a_record(model: ESM2, tmp_path: Path) -> None:
    ids = ["sp|P1|X", "sp/P1/X", "SP_p1_x", "../escape", "..", "a"]
    source = fasta(tmp_path / "in.fasta", *((id, random_sequence(5 + i)) for i, id in enumerate(ids)))
    embed_fasta(source, f"{tmp_path}/out/", model, include=ALL)
    names = [path.name.lower() for path in (tmp_path / "out").iterdir()]
    assert len(set(names)) == len(ids) + 2
    assert set(tmp_path.iterdir()) == {source, tmp_path / "out"}
    for id, row, i in zip(ids, rows(tmp_path / "out"), range(6), strict=True):
        assert row["id"] == id
        result = model.encode([random_sequence(5 + i)], include=ALL)[0]
        for name, array in result.to_arrays().items():
            np.testing.assert_array_equal(row[name], array)


def test_odd_records(model: ESM2, tmp_path: Path) -> None:
    source = tmp_path / "odd.fasta"
    source.write_bytes(
        b"\xef\xbb\xbf;comment\r\n>first one\r\nmkta\r\n\r\nyi*\r\n>\r\nMK-X\r\n>dup\r\nMKTAYI\r\n"
        b">dup again\r\nMKT AYI\n>empty\n"
        b">star\n*\n>inner\nMK*T\n>digit\nMK7\n>j\nMKTJ\n>mask\nMK<mask>\n"
        b">Esp\xe8ce in Latin-1\nMKU\n>\xc3\xa9 in UTF-8\tand a tab\nMKO\n>dot\nMK.T\n>long\n"
        + LONG.encode()
        + b"\n>last\nW"
    )
    summary = embed_fasta(source, tmp_path / "o.parquet", model, include=["mean"])
    found = rows(tmp_path / "o.parquet")
    assert [row["id"] for row in found] == ["first", "sequence_2", "dup", "dup", "Espèce", "é", "last"]
    assert [row["length"] for row in found] == [6, 4, 6, 6, 3, 3, 1]
    assert [row["record"] for row in found] == [1, 2, 3, 4, 11, 12, 15]
    assert found[4]["description"] == "Espèce in Latin-1"
    assert found[0]["sequence_hash"] == found[2]["sequence_hash"] == found[3]["sequence_hash"]
    assert (summary.records, summary.sequences, summary.rejected) == (7, 5, 8)
    expected = model.encode(["MKTAYI", "MK-X", "MKTAYI", "MKTAYI", "MKU", "MKO", "W"])
    np.testing.assert_array_equal([row[f"mean_{LAST}"] for row in found], [r.embeddings[LAST] for r in expected])
    lines = [line.split("\t") for line in (tmp_path / "o.rejected.tsv").read_text().splitlines()]
    assert lines[0] == ["record", "id", "description", "length", "reason"]
    reasons = {line[1]: line[4] for line in lines[1:]}
    assert all(len(line) == 5 for line in lines)
    expected_reasons = {
        "empty": "no sequence",
        "star": "no sequence",
        "inner": "'*' at position 3",
        "digit": "'7' at position 3",
        "j": "'J' at position 4",
        "mask": "<mask>",
        "dot": "'.' at position 3",
        "long": "5000 residues, at most 2048",
    }
    for id, reason in expected_reasons.items():
        assert reason in reasons.pop(id)
    assert not reasons


def test_strict_stops_at_the_first_and_leaves_nothing(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"), ("bad", "MKJ"), ("worse", "1"))
    with pytest.raises(InvalidSequence, match=r"record 2 \(bad\): 'J' at position 3"):
        embed_fasta(source, tmp_path / "o.parquet", model, strict=True)
    assert list(tmp_path.iterdir()) == [source]


def test_all_rejected_is_an_empty_table_and_none_at_all_an_error(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("bad", "J"))
    for name in ("o.parquet", "o.h5", "o"):
        summary = embed_fasta(source, tmp_path / name, model)
        assert (summary.records, summary.rejected) == (0, 1)
        assert rows(tmp_path / name) == []
    empty = tmp_path / "empty.fasta"
    empty.write_bytes(b"\n\n")
    with pytest.raises(InvalidSequence, match="no sequences"):
        embed_fasta(empty, tmp_path / "e.parquet", model)
    assert not list(tmp_path.glob("e.*"))


@pytest.mark.parametrize("line", [2_000_001, 60, 1_000_000], ids=["one-line", "wrapped", "at-the-limit"])
@pytest.mark.parametrize("long", ["error", "truncate"])
def test_endless_record_is_rejected_and_the_others_are_embedded(
    model: ESM2, tmp_path: Path, line: int, long: str
) -> None:
    endless = "MKTQ*" * 400_001
    wrapped = "\n".join(endless[at : at + line] for at in range(0, len(endless), line))
    source = tmp_path / "in.fasta"
    source.write_text(f">good\nMKT\n>endless\n{wrapped}\n>last\nMK\n")
    summary = embed_fasta(source, tmp_path / "o.parquet", model, long=long)
    assert (summary.records, summary.rejected) == (2, 1)
    assert [row["id"] for row in rows(tmp_path / "o.parquet")] == ["good", "last"]
    assert "more than 1000000 letters" in (tmp_path / "o.rejected.tsv").read_text()


def test_outputs_of_one_stem_keep_their_own_lists(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"), ("long", LONG))
    assert embed_fasta(source, tmp_path / "p.parquet", model).rejected_file == tmp_path / "p.rejected.tsv"
    assert embed_fasta(source, tmp_path / "p.h5", model, long="truncate").rejected == 0
    assert "5000 residues" in (tmp_path / "p.rejected.tsv").read_text()
    (tmp_path / "bad.fasta").write_text(">bad\nJ\n")
    other = embed_fasta(tmp_path / "bad.fasta", tmp_path / "p.h5", model, overwrite=True)
    assert other.rejected_file == tmp_path / "p.h5.rejected.tsv"
    folder = embed_fasta(tmp_path / "bad.fasta", tmp_path / "p", model)
    assert folder.rejected_file == tmp_path / "p.folder.rejected.tsv"
    before = (tmp_path / "p.rejected.tsv").read_text()
    (tmp_path / "p.rejected.tsv").unlink()
    again = embed_fasta(source, tmp_path / "p.parquet", model)
    assert again.already_complete
    assert again.rejected_file == tmp_path / "p.rejected.tsv"
    assert (tmp_path / "p.rejected.tsv").read_text() == before


def test_foreign_folders_and_mount_points_are_refused(
    model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"))
    (tmp_path / "o.parquet.partial").mkdir()
    (tmp_path / "o.parquet.partial" / "mine.txt").write_text("mine")
    with pytest.raises(BulkError, match=r"o\.parquet\.partial is not of numpyesm embed"):
        embed_fasta(source, tmp_path / "o.parquet", model)
    assert (tmp_path / "o.parquet.partial" / "mine.txt").read_text() == "mine"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    (tmp_path / "mine.h5").write_text("mine")
    for name, said in (("mine", "choose another"), ("mine.h5", "--overwrite replaces it")):
        with pytest.raises(BulkError, match=f"exists and is not of numpyesm embed; {said}"):
            embed_fasta(source, tmp_path / name, model)
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(InvalidOption, match=r"mount point.*mounted/embeddings/"):
        embed_fasta(source, tmp_path / "mounted", model)


def test_long_sequences(model: ESM2, tmp_path: Path) -> None:
    source = fasta(tmp_path / "in.fasta", ("short", "MKT"), ("long", LONG), ("edge", LONG[:2048]), ("bad", LONG + "J"))
    cut = embed_fasta(source, tmp_path / "cut.parquet", model, include=["mean", "bos"], long="truncate")
    assert (cut.records, cut.rejected) == (3, 1)
    assert "'J' at position 5001" in (tmp_path / "cut.rejected.tsv").read_text()
    _, long, edge = rows(tmp_path / "cut.parquet")
    assert (long["length"], long["residues"]) == (5000, 2048)
    assert long[f"mean_{LAST}"] == edge[f"mean_{LAST}"]

    include = ["mean", "per_token", "bos", "logits", "attentions", "contacts"]
    embed_fasta(source, tmp_path / "win.h5", model, include=include, long="windows", overlap=500)
    starts = [0, 1476, 2952]
    parts = [model.encode([LONG[a : a + 2048]], include=include)[0] for a in starts]
    total, seen = np.zeros((5000, DIM)), np.zeros(5000)
    pairs, maps = np.zeros((5000, 5000)), np.zeros((5000, 5000))
    for start, part in zip(starts, parts, strict=True):
        total[start : start + 2048] += part.per_token_embeddings[LAST]
        seen[start : start + 2048] += 1
        maps[start : start + 2048, start : start + 2048] += part.contacts
        pairs[start : start + 2048, start : start + 2048] += 1
    average = total / seen[:, None]
    with h5py.File(tmp_path / "win.h5") as file, np.errstate(invalid="ignore"):
        np.testing.assert_allclose(file["long"][...], average, atol=1e-5)
        np.testing.assert_allclose(file["long"].attrs[f"mean_{LAST}"], average.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(file["contacts/long"][...], maps / pairs, atol=1e-5)
        np.testing.assert_allclose(
            file["long"].attrs[f"bos_{LAST}"], np.mean([p.bos_embeddings[LAST] for p in parts], axis=0), atol=1e-5
        )
        np.testing.assert_allclose(file["logits/long"][:1476], parts[0].logits[:1476], atol=1e-5)
        np.testing.assert_allclose(file["attentions/long"][:, -400:], parts[2].attentions[:, -400:], atol=1e-5)
        np.testing.assert_array_equal(
            file["edge"][...], model.encode([LONG[:2048]], include=include)[0].per_token_embeddings[LAST]
        )


def test_several_inputs_gzip_and_shards(model: ESM2, tmp_path: Path) -> None:
    one, two = (
        write_fasta(tmp_path / "1.fasta", 20, seed=1),
        write_fasta(tmp_path / "2.fasta", 20, seed=2, duplicates=9),
    )
    data = two.read_bytes()
    two = tmp_path / "2.fasta.gz"
    two.write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))  # two members, as bgzip writes them
    whole = embed_fasta([one, two], tmp_path / "whole.parquet", model)
    assert whole.records == 49
    shards = [embed_fasta([one, two], tmp_path / f"s-{i}.parquet", model, shard=f"{i}/5") for i in range(1, 6)]
    assert sum(s.records for s in shards) == 49
    assert sum(s.sequences for s in shards) == whole.sequences == 40  # twins are computed once over all shards
    polars = pytest.importorskip("polars")
    together = polars.read_parquet(tmp_path / "s-*.parquet").sort("record")
    assert together.equals(polars.read_parquet(tmp_path / "whole.parquet"))
    two.write_bytes(two.read_bytes()[:-20])
    with pytest.raises(InvalidSequence, match="cut short"):
        embed_fasta([one, two], tmp_path / "x.parquet", model)


def test_a_finished_output_is_not_computed_again(model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "J"))
    out = tmp_path / "o.parquet"

    def run(**options: Any) -> Summary:
        return embed_fasta(source, out, model, **options)

    assert not run().already_complete
    before = out.stat().st_mtime_ns
    again = run()
    assert again.already_complete
    assert (again.records, again.rejected, again.computed) == (1, 1, 0)
    with pytest.raises(BulkError, match=r"of another run \(dtype \"fp16\" instead of|of another run \(dtype"):
        run(dtype="fp16")
    source.write_text(">a\nMKTA\n")
    with pytest.raises(BulkError, match="another input"):
        run()
    assert out.stat().st_mtime_ns == before
    assert (tmp_path / "o.rejected.tsv").exists()
    assert run(overwrite=True).records == 1
    assert not (tmp_path / "o.rejected.tsv").exists()  # it was of the run before
    out.write_bytes(b"something else")
    with pytest.raises(BulkError, match="not of numpyesm"):
        run()
    assert out.read_bytes() == b"something else"
    run(overwrite=True)
    (tmp_path / "o.rejected.tsv").write_text("mine\n")
    run(overwrite=True)
    assert (tmp_path / "o.rejected.tsv").read_text() == "mine\n"
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "precious").write_text("x")
    with pytest.raises(BulkError, match="not of numpyesm"):
        embed_fasta(source, folder, model)
    with pytest.raises(BulkError, match="Remove it yourself"):
        embed_fasta(source, folder, model, overwrite=True)
    assert (folder / "precious").exists()
    embed_fasta(source, tmp_path / "mine", model)
    embed_fasta(source, tmp_path / "mine", model, dtype="fp16", overwrite=True)
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(BulkError, match=r"other files \(notes.txt\)"):
        embed_fasta(source, tmp_path / "mine", model, overwrite=True)
    assert len(rows(tmp_path / "mine")) == 1


def test_asking_for_what_is_done_does_not_undo_what_is_begun(
    model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is to replace the output is interrupted; the old command is given once more."""
    source = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "MKTA"))
    out = tmp_path / "o.parquet"
    embed_fasta(source, out, model)
    with monkeypatch.context() as patch:
        patch.setattr("numpyesm.bulk.writers.parquet.ParquetWriter.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert embed_fasta(source, out, model).already_complete
    summary = embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert (summary.records, summary.computed) == (2, 0)
    assert set(tmp_path.iterdir()) == {source, out}


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "o.csv"}, "expected .parquet"),
        ({"dtype": "fp64"}, "dtype"),
        ({"long": "cut"}, "long"),
        ({"overlap": 2000}, "overlap"),
        ({"include": ["means"]}, "include"),
        ({"repr_layers": [99]}, "layers"),
        ({"shard": "5/4"}, "shard"),
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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x28\xb5\x2f\xfdabc", "zstd"),
        (b"BZh91AY", "bzip2"),
        (b"MKT\0\xff\n", "not a text file"),
        (b"\x1f\x8b\x08\0garbage", "gzip"),
        (b"MKT\n>a\nMKT\n", "line 2"),
        (None, "No such file"),
        ("folder", "folder"),
    ],
)
def test_files_that_are_no_fasta(model: ESM2, tmp_path: Path, data: Any, message: str) -> None:
    source = tmp_path / "in.fasta"
    if data == "folder":
        source.mkdir()
    elif data is not None:
        source.write_bytes(data)
    with pytest.raises((InvalidSequence, OSError), match=message):
        embed_fasta(source, tmp_path / "o.parquet", model)
    assert not list(tmp_path.glob("o*"))


def test_missing_libraries_name_the_extra(model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    source = fasta(tmp_path / "in.fasta", ("a", "MKT"))
    for library, output, options, extra in [
        ("pyarrow.parquet", "o.parquet", {}, "bulk"),
        ("h5py", "o.h5", {}, "bulk"),
        ("ray", "o", {"engine": "ray"}, "ray"),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)
            with pytest.raises(MissingExtra, match=rf"numpyesm\[{extra}\]"):
                embed_fasta(source, tmp_path / output, model, **options)  # type: ignore[arg-type]
    embed_fasta(source, tmp_path / "o", model)  # a folder needs NumPy only


def test_memory_does_not_grow_with_the_file(model: ESM2, tmp_path: Path) -> None:
    """What Python holds at most, of 500 and of 4,000 records; a journal in memory would show."""
    peaks = []
    for count in (500, 500, 4000):
        source = write_fasta(tmp_path / f"{count}.fasta", count, longest=12)
        tracemalloc.start()
        embed_fasta(source, tmp_path / f"{count}.parquet", model, overwrite=True, tokens_per_batch=600)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Row groups grow to 2048 rows.
    assert peaks[2] < peaks[1] + (5 << 20)


# -- embed_iter ---------------------------------------------------------------------------------------------------


def test_embed_iter_is_lazy_ordered_and_equal_to_encode(model: ESM2) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, str]]:
        nonlocal taken
        for i in itertools.count():
            taken += 1
            yield f"s{i}", random_sequence(5 + i % 40, i % 60)

    found = list(itertools.islice(model.embed_iter(endless(), [0, -1], ["mean", "bos"], tokens_per_batch=200), 100))
    assert taken < 200
    expected = model.encode([record.sequence for record, _ in found], [0, -1], ["mean", "bos"])
    for i, ((record, result), wanted) in enumerate(zip(found, expected, strict=True)):
        assert record.id == f"s{i}"
        assert result.sequence_index == i
        assert result.to_dict() == wanted.to_dict()


def test_embed_iter_computes_twins_once(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    encode = Passes.encode
    monkeypatch.setattr(
        Passes, "encode", lambda self, tokens, *rest: counts.append(len(tokens)) or encode(self, tokens, *rest)
    )
    assert len(list(model.embed_iter(["MKT", "MKTA", "MKT", "MKT"]))) == 4
    assert sum(counts) == 2


def test_embed_iter_and_what_it_refuses(model: ESM2) -> None:
    records = [Record("a", "a one", "MKT"), ("b", "MKJ"), "MK", ("c", LONG)]
    stream = model.embed_iter(records)
    assert next(stream)[0].id == "a"
    with pytest.raises(InvalidSequence, match=r"item 1: b: 'J' at position 3"):
        next(stream)
    refused: list[str] = []
    kept = list(model.embed_iter(records, rejected=lambda record, error: refused.append(record.id)))
    assert [record.id for record, _ in kept] == ["a", "sequence_3"]
    assert [result.sequence_index for _, result in kept] == [0, 2]
    assert refused == ["b", "c"]
    assert len(list(model.embed_iter([("c", LONG)], long="windows"))) == 1
    (_, cut), (_, first) = model.embed_iter([("c", LONG), ("d", LONG[:2048])], long="truncate")
    assert cut.to_dict()["embeddings"] == first.to_dict()["embeddings"]
    assert list(model.embed_iter([])) == []
    with pytest.raises(InvalidOption):
        model.embed_iter([], include=["means"])  # at once, not at the first record
    with pytest.raises(InvalidSequence, match="one str"):
        model.embed_iter("MKT")
    for wrong in (7, None, ("a", "b", "c", "d"), b"MKT"):
        with pytest.raises(InvalidSequence, match="item 0"):
            list(model.embed_iter([wrong]))  # type: ignore[list-item]


# -- who reads it -------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_protspace_reads_it(model: ESM2, tmp_path: Path) -> None:
    """Its own loader, from the wheel on PyPI, without its dependencies."""
    wheel = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "protspace==4.8.2"]
    if subprocess.run(wheel, capture_output=True, timeout=120).returncode:
        pytest.skip("needs PyPI: pip download --no-deps protspace==4.8.2")
    source = fasta(tmp_path / "in.fasta", ("sp|P12345|A_HUMAN one", "MKTAYI"), ("two", "MKT"))
    embed_fasta(source, tmp_path / "mean.h5", model, include=["mean"], ids="accession")
    code = """
import json, sys; from pathlib import Path
sys.path.insert(0, sys.argv[1])
from protspace.data.loaders.h5 import load_h5
found = load_h5([Path(sys.argv[2])])
print(json.dumps([found.name, list(found.headers), found.data.tolist()]))
"""
    (package,) = tmp_path.glob("protspace-*.whl")
    done = subprocess.run(
        [sys.executable, "-c", code, str(package), str(tmp_path / "mean.h5")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name, headers, data = json.loads(done.stdout)
    assert (name, headers) == (model.name, ["P12345", "two"])
    expected = model.encode(["MKTAYI", "MKT"])
    np.testing.assert_array_equal(np.array(data, np.float32), [r.embeddings[LAST] for r in expected])


def test_every_item_of_hdf5_has_an_original_id(model: ESM2, tmp_path: Path) -> None:
    """As bio_embeddings writes its files, and it and biotrainer read them: `item.attrs["original_id"]` of each."""
    source = fasta(tmp_path / "in.fasta", ("tr|A0A1|B", "MKTAYI"), ("b/c", "MKT"))
    embed_fasta(source, tmp_path / "all.h5", model, include=ALL, ids="accession")
    with h5py.File(tmp_path / "all.h5") as file:
        assert file.attrs["model_name"] == model.name
        assert all(item.attrs["original_id"] for item in file.values())
        for group in (file, file["contacts"]):
            found = [item for item in group.values() if isinstance(item, h5py.Dataset)]
            assert {item.attrs["original_id"] for item in found} == {"A0A1", "b/c"}
