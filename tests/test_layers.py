"""`numpyesm layers`: scores by layer, and tables that cannot be scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Done, random_sequence

pytest.importorskip("sklearn")

SEQUENCES = [random_sequence(20 + seed % 7, seed) for seed in range(40)]
NUMBERS = [str(sequence.count("K") / len(sequence)) for sequence in SEQUENCES]
NAMES = ["many" if float(number) > 0.05 else "few" for number in NUMBERS]


@pytest.fixture
def layers(run: Callable[..., Done], tmp_path: Path) -> Callable[..., Done]:
    """Run the command on a table of sequences and labels."""

    def call(labels: list[str], *options: str, sequences: list[str] = SEQUENCES) -> Done:
        lines = (f"{sequence},{label}" for sequence, label in zip(sequences, labels, strict=True))
        (tmp_path / "train.csv").write_text("\n".join(["sequence,target", *lines]) + "\n")
        return run("layers", "train.csv", "--target", "target", *options)

    return call


@pytest.mark.parametrize(("labels", "score"), [(NUMBERS, "spearman"), (NAMES, "accuracy")])
@pytest.mark.slow
def test_composition_is_read_from_the_embedding(
    layers: Callable[..., Done], tmp_path: Path, labels: list[str], score: str
) -> None:
    assert layers(labels, "-o", "out.tsv").code == 0
    header, *rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    names = [str(layer) for layer in range(SMALL.num_layers + 1)]
    assert header == ["layer", score, "std"]
    assert [row[0] for row in rows] == names
    assert float(rows[0][1]) > 0.7
    said = layers(labels)
    lines = [line.split() for line in said.out.decode().splitlines()]
    assert (said.code, [line[0] for line in lines]) == (0, ["layer", *names])
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
        (NUMBERS, ("-o", "train.csv"), 2, "-o train.csv is the input itself"),
    ],
)
def test_tables_that_cannot_be_scored(
    layers: Callable[..., Done], tmp_path: Path, labels: list[str], options: tuple[str, ...], code: int, said: str
) -> None:
    done = layers(labels, "-o", "out.tsv", *options)
    assert (done.code, said in done.err, done.err.count("\n")) == (code, True, 1), done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.csv"]


def test_a_bad_sequence_is_named_by_its_line(layers: Callable[..., Done]) -> None:
    done = layers(NUMBERS, sequences=[*SEQUENCES[:3], "MK1", *SEQUENCES[4:]])
    assert (done.code, "line 5" in done.err) == (1, True)


def test_equal_sequences_stay_in_one_fold(layers: Callable[..., Done], tmp_path: Path) -> None:
    """Numbers that say nothing cannot be predicted, although each sequence is there twice."""
    noise = [str((37 * row) % 41) for row in range(20)]
    assert layers(noise * 2, "-o", "out.tsv", sequences=SEQUENCES[:20] * 2).code == 0
    assert max(float(row.split("\t")[1]) for row in (tmp_path / "out.tsv").read_text().splitlines()[1:]) < 0.5
    done = layers(NUMBERS, sequences=SEQUENCES[:4] * 10)
    assert (done.code, "has 4 different sequences, fewer than the 5 --folds" in done.err) == (1, True)
