"""`numpyesm layers`: scores by layer, and tables that cannot be scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import random_sequence

from numpyesm.cli import main

pytest.importorskip("sklearn")

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")

SEQUENCES = [random_sequence(20 + seed % 7, seed) for seed in range(40)]
NUMBERS = [str(sequence.count("K") / len(sequence)) for sequence in SEQUENCES]
NAMES = ["many" if float(number) > 0.05 else "few" for number in NUMBERS]


def run(folder: Path, labels: list[str], *options: str, sequences: list[str] = SEQUENCES) -> int:
    table = folder / "train.csv"
    lines = (f"{sequence},{label}" for sequence, label in zip(sequences, labels, strict=True))
    table.write_text("\n".join(["sequence,target", *lines]) + "\n")
    return main(["layers", str(table), "--target", "target", "--weights", "synthetic:esm2-8m", "--backend", "numpy",
                 *options])  # fmt: skip


@pytest.mark.parametrize(("labels", "score"), [(NUMBERS, "spearman"), (NAMES, "accuracy")])
def test_composition_is_read_from_the_embedding(
    tmp_path: Path, labels: list[str], score: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, labels, "-o", str(tmp_path / "out.tsv")) == 0
    header, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert header == ["layer", score, "std"]
    assert [row[0] for row in rows] == [str(layer) for layer in range(7)]
    assert float(rows[0][1]) > 0.7
    capsys.readouterr()
    assert run(tmp_path, labels) == 0
    said = capsys.readouterr()
    lines = [line.split() for line in said.out.splitlines()]
    assert [line[0] for line in lines] == ["layer", *map(str, range(7))]
    (best,) = [line for line in lines if line[-1] == "best"]
    assert float(best[1]) == max(float(line[1]) for line in lines[1:])  # not the file's: a class may flip between runs
    assert f"layer {best[0]} is best" in said.err


@pytest.mark.parametrize(
    ("labels", "options", "code", "said"),
    [
        ([*NUMBERS[:6], "high", *NUMBERS[7:]], (), 1, "line 8: target is 'high', expected a number"),
        (NAMES, ("--task", "regression"), 1, "line 2: target is 'few', expected a number"),
        ([*NUMBERS[:6], "nan", *NUMBERS[7:]], (), 1, "line 8: target is 'nan', expected a number"),
        (["x", *NAMES[1:]], (), 1, "1 different sequences of the rarest class, fewer than the 5 --folds"),
        (["1"] * 40, (), 1, "target is '1' in every row"),
        (NUMBERS, ("--target", "absent"), 1, "has no column 'absent'; its columns are 'sequence', 'target'"),
        (NUMBERS, ("--folds", "1"), 2, "--folds 1: expected 2 or more"),
        (NUMBERS, ("-o", "x.png"), 2, ".tsv"),
    ],
)
def test_tables_that_cannot_be_scored(
    tmp_path: Path,
    labels: list[str],
    options: tuple[str, ...],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, labels, "-o", str(tmp_path / "out.tsv"), *options) == code
    error = capsys.readouterr().err
    assert (said in error, error.count("\n")) == (True, 1), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.csv"]


def test_a_bad_sequence_is_named_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, NUMBERS, sequences=[*SEQUENCES[:3], "MK1", *SEQUENCES[4:]]) == 1
    assert "line 5" in capsys.readouterr().err


def test_equal_sequences_stay_in_one_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers that say nothing cannot be predicted, although each sequence is there twice."""
    noise = [str((37 * row) % 41) for row in range(20)]
    assert run(tmp_path, noise * 2, "-o", str(tmp_path / "out.tsv"), sequences=SEQUENCES[:20] * 2) == 0
    assert max(float(row.split("\t")[1]) for row in (tmp_path / "out.tsv").read_text().splitlines()[1:]) < 0.5
    capsys.readouterr()
    assert run(tmp_path, NUMBERS, sequences=SEQUENCES[:4] * 10) == 1
    assert "has 4 different sequences, fewer than the 5 --folds" in capsys.readouterr().err
