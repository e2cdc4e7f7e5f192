"""What `embed_fasta` and `embed_iter` give: the numbers of `encode`, in each format, for every odd input."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_runs import DIM, LAST, fasta, rows, write_fasta
from conftest import ALL, ROUNDING, assert_close, assert_same, random_sequence

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
        for name, array in result.to_arrays().items():
            value = np.reshape(row[name], row.get(f"{name}_shape", -1))
            assert_close(value, array, HALF if dtype == "fp16" else BATCHED)

    found = duckdb.sql(f"SELECT {MEAN}, sequence_hash FROM '{path}' ORDER BY record").fetchall()
    assert found[0][1] == duckdb.sql(f"SELECT sha256('{records[0][1]}')").fetchall()[0][0]
    for column in (pandas.read_parquet(path)[MEAN], polars.read_parquet(path)[MEAN], [row[0] for row in found]):
        assert_close(np.stack([np.array(value) for value in column]), means(expected), HALF)

    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    assert schema.field(MEAN).type == pyarrow.list_({"fp32": pyarrow.float32(), "fp16": pyarrow.float16()}[dtype], DIM)
    about = json.loads(schema.metadata[b"numpyesm"])
    assert len(about["weights"]["sha256"]) == 64
    assert about["weights"]["synthetic"] is True
    assert about["version"]
    assert about["parameters"]["repr_layers"] == [0, LAST]


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
    assert (summary.records, summary.sequences, summary.rejected) == (7, 5, 8)
    found = rows(tmp_path / "o.parquet")
    assert [row["id"] for row in found] == ["first", "sequence_2", "dup", "dup", "Espèce", "é", "last"]
    assert [row["length"] for row in found] == [6, 4, 6, 6, 3, 3, 1]
    assert [row["record"] for row in found] == [1, 2, 3, 4, 11, 12, 15]
    assert found[4]["description"] == "Espèce in Latin-1"
    assert found[0]["sequence_hash"] == found[2]["sequence_hash"] == found[3]["sequence_hash"]
    expected = model.encode(["MKTAYI", "MK-X", "MKTAYI", "MKTAYI", "MKU", "MKO", "W"])
    assert_close([row[MEAN] for row in found], means(expected))
    lines = [line.split("\t") for line in (tmp_path / "o.rejected.tsv").read_text().splitlines()]
    assert lines[0] == ["record", "id", "description", "length", "reason"]
    for (_, id, _, _, reason), expected_reason in zip(
        lines[1:],
        {"empty": "no sequence", "star": "no sequence", "inner": "'*' at position 3", "digit": "'7' at position 3",
         "j": "'J' at position 4", "mask": "<mask>", "dot": "'.' at position 3",
         "long": "2500 residues, at most 2048"}.items(),
        strict=True,
    ):  # fmt: skip
        assert id == expected_reason[0]
        assert expected_reason[1] in reason


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


@pytest.mark.parametrize(("line", "long"), [(2_000_001, "error"), (60, "truncate"), (1_000_000, "truncate")])
def test_endless_record_is_rejected_and_the_others_are_embedded(
    model: ESM2, tmp_path: Path, line: int, long: str
) -> None:
    endless = "MKTQ*" * 400_001
    wrapped = "\n".join(endless[at : at + line] for at in range(0, len(endless), line))
    source = fasta(tmp_path / "in.fasta", ("good", "MKT"), ("endless", wrapped), ("last", "MK"))
    summary = embed_fasta(source, tmp_path / "o.parquet", model, long=long)
    assert (summary.records, summary.rejected) == (2, 1)
    assert [row["id"] for row in rows(tmp_path / "o.parquet")] == ["good", "last"]
    assert "more than 1000000 letters" in (tmp_path / "o.rejected.tsv").read_text()


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
    total, seen = np.zeros((2500, 16)), np.zeros(2500)
    pairs, maps = np.zeros((2500, 2500)), np.zeros((2500, 2500))
    for start, part in zip((0, 452), parts, strict=True):
        window = slice(start, start + 2048)
        total[window] += part["per_token_1"]
        seen[window] += 1
        maps[window, window] += part["contacts"]
        pairs[window, window] += 1
    average = total / seen[:, None]
    with h5py.File(tmp_path / "win.h5") as file, np.errstate(invalid="ignore"):
        assert_close(file["long"], average)
        assert_close(file["long"].attrs["mean_1"], average.mean(axis=0))
        assert_close(file["long"].attrs["bos_1"], np.mean([part["bos_1"] for part in parts], axis=0))
        assert_close(file["contacts/long"], maps / pairs, 2e-5)
        assert_close(file["logits/long"][:452], parts[0]["logits"][:452])
        assert_close(file["attentions/long"][:, -452:], parts[1]["attentions"][:, -452:])
        assert_close(file["edge"], parts[0]["per_token_1"])


def test_several_inputs_gzip_and_shards(model: ESM2, tmp_path: Path) -> None:
    one = write_fasta(tmp_path / "1.fasta", 20, seed=1)
    data = write_fasta(tmp_path / "2.fasta", 20, seed=2, duplicates=9).read_bytes()
    two = tmp_path / "2.fasta.gz"
    two.write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))  # two members, as bgzip writes them
    whole = embed_fasta([one, two], tmp_path / "whole.parquet", model)
    assert whole.records == 49
    shards = [embed_fasta([one, two], tmp_path / f"s-{i}.parquet", model, shard=f"{i}/5") for i in range(1, 6)]
    assert sum(s.sequences for s in shards) == whole.sequences == 40  # twins are computed once over all shards
    together = sorted((row for s in shards for row in rows(s.output)), key=lambda row: row["record"])
    for row, expected in zip(together, rows(whole.output), strict=True):
        assert (row["record"], row["id"], row["sequence_hash"]) == tuple(
            expected[name] for name in ("record", "id", "sequence_hash")
        )
        assert_close(row[MEAN], expected[MEAN])
    two.write_bytes(two.read_bytes()[:-20])
    with pytest.raises(InvalidSequence, match="cut short"):
        embed_fasta([one, two], tmp_path / "x.parquet", model)


# -- what is there already ----------------------------------------------------------------------------------------


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

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    source, out = fasta(tmp_path / "in.fasta", ("a", "MKT"), ("b", "MKTA")), tmp_path / "o.parquet"
    embed_fasta(source, out, model)
    with monkeypatch.context() as patch:
        patch.setattr("numpyesm.bulk.writers.parquet.write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert embed_fasta(source, out, model).already_complete
    summary = embed_fasta(source, out, model, dtype="fp16", overwrite=True)
    assert (summary.records, summary.computed) == (2, 0)
    assert set(tmp_path.iterdir()) == {source, out}


# -- wrong use ----------------------------------------------------------------------------------------------------


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
        (b"MKT\n>a\nMKT\n", "line 2"),
        (b"\n\n", "no sequences"),
        (None, "folder"),
    ],
)
def test_files_that_are_no_fasta(model: ESM2, tmp_path: Path, data: bytes | None, message: str) -> None:
    source = tmp_path / "in.fasta"
    source.mkdir() if data is None else source.write_bytes(data)
    with pytest.raises(InvalidSequence, match=message):
        embed_fasta(source, tmp_path / "o.parquet", model)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize(
    ("library", "output", "engine", "extra"),
    [
        ("pyarrow.parquet", "o.parquet", "local", "bulk"),
        ("h5py", "o.h5", "local", "bulk"),
        ("filelock", "o", "local", "bulk"),
        ("ray", "o", "ray", "ray"),
    ],
)
def test_missing_libraries_name_the_extra(
    model: ESM2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, output: str, engine: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra, match=rf"numpyesm\[{extra}\]"):
        embed_fasta(fasta(tmp_path / "in.fasta", ("a", "MKT")), tmp_path / output, model, engine=engine)


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


# -- embed_iter ---------------------------------------------------------------------------------------------------


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


def test_embed_iter_computes_twins_once(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    encode = Passes.encode
    monkeypatch.setattr(
        Passes, "encode", lambda self, tokens, *rest: counts.append(len(tokens)) or encode(self, tokens, *rest)
    )
    assert len(list(model.embed_iter(["MKT", "MKTA", "MKT", "MKT"]))) == 4
    assert sum(counts) == 2


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
    command = [sys.executable, "-c", code, *tmp_path.glob("protspace-*.whl"), tmp_path / "mean.h5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    name, headers, data = json.loads(done.stdout)
    assert (name, headers) == (model.name, ["P12345", "two"])
    assert_close(data, means(model.encode(["MKTAYI", "MKT"])))
