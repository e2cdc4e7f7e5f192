"""`numpyesm score` and `scan`: mutations of one protein, those of a table or all of them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidMutation, InvalidOption, InvalidSequence, MissingExtra
from ..files import is_stream
from ..formats import json_pieces
from ..options import SCORING_METHODS
from ..printable import listed
from ..scoring.correlation import spearman
from ..scoring.methods import MutationScan
from ..scoring.notation import Substitution, check_fit, check_same_terms, check_wild_type, mutated, parse_mutant
from . import outputs
from .inputs import check_output_is_another, load_model, read_records
from .variant_table import VariantTable, read_table

# ProteinGym's names; fair-esm's example uses the first, too.
_MUTANT, _SEQUENCE, _MEASURED = "mutant", "mutated_sequence", "DMS_score"
_ENDINGS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv"}
_MUTATION_COL, _MEASURED_COL = "--mutation-col", "--measured-col"
# Positions in one strip of the heat map.
_STRIP = 100
# A picture cannot be higher.
_MOST_STRIPS = 150


def score(arguments: argparse.Namespace) -> int:
    """Check the whole table, then load the model, score, and write the table with its new column."""
    wild_text, table_text = _inputs(arguments)
    endings = _ENDINGS | {".txt": "as it was"}
    target = outputs.destination(arguments, endings, terminal="as it was", otherwise="as it was")
    check_output_is_another(table_text, target.path)
    wild_type = _read_wild_type(wild_text, target.path)
    column = arguments.column or arguments.method
    table = read_table(table_text, [arguments.mutation_col or _MUTANT, _SEQUENCE])
    if column in table.columns:
        raise InvalidOption(f"{table.name} has a column {column!r} already: choose another name with --column")
    if "\n" in column or "\r" in column:
        raise InvalidOption("--column: the name must not contain line breaks")
    mutants = _mutants(table, arguments, wild_type)
    measured = _measured(table, arguments.measured_col)

    good = [mutant for mutant in mutants if mutant is not None]
    model = load_model(arguments)
    unit = "residues" if arguments.method == "pseudo-ppl" else "passes"
    scores = iter(model.score_mutations(wild_type, good, **_options(arguments, unit)).tolist())
    values = [math.nan if mutant is None else next(scores) for mutant in mutants]
    texts = ["" if math.isnan(value) else repr(value) for value in values]
    target.write(table.with_column(column, texts, outputs.DELIMITERS.get(target.form)))
    if measured is not None:
        _report(column, values, *measured)
    return 0


def _inputs(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return wild type and table, given by position or by fair-esm's option names."""
    places = [text for text in (arguments.wild_type, arguments.variants) if text is not None]
    wild_type = arguments.sequence if arguments.sequence is not None else (places.pop(0) if places else None)
    table = arguments.dms_input if arguments.dms_input is not None else (places.pop(0) if places else None)
    if places and arguments.sequence is not None and arguments.dms_input is not None:
        # As in fair-esm's own example, which names five models.
        raise InvalidOption(
            f"unexpected {places[0]!r} beside --sequence and --dms-input; to compare several models, "
            "score with one at a time and name each column with --column"
        )
    if wild_type is None or table is None or places:
        raise InvalidOption("expected a wild type and a table of variants: numpyesm score WILD_TYPE VARIANTS.csv")
    if wild_type == table == "-":
        raise InvalidOption("the wild type and the variants cannot both come from standard input")
    return wild_type, table


def _mutants(table: VariantTable, arguments: argparse.Namespace, wild_type: str) -> list[str | None]:
    """Return a mutation for each row; None for those that `--skip-invalid` leaves out."""
    name = arguments.mutation_col or _MUTANT
    sequences = table.column(_SEQUENCE, _MUTATION_COL)
    find = table.require if arguments.mutation_col or sequences is None else table.column
    column = find(name, _MUTATION_COL)
    if column is not None:
        parsed = [_attempt(parse_mutant, text) for text in column]
    else:
        parsed = [_attempt(_from_sequence, wild_type, text, arguments.offset) for text in sequences or []]
    readable = [mutant for mutant in parsed if not isinstance(mutant, InvalidMutation)]
    mutants: list[str | None] = []
    problems: list[str] = []
    for i, (row, mutant) in enumerate(zip(table.rows, parsed, strict=True)):
        try:
            if isinstance(mutant, InvalidMutation):
                raise mutant
            # Only the first problem gets a hint about the offset: finding it costs as much as checking all rows.
            check_fit(wild_type, mutant, arguments.offset, others=[mutant] if problems else readable)
            if arguments.method == "log-prob":
                check_same_terms(mutant)
            if column and sequences and sequences[i].strip() not in ("", mutated(wild_type, mutant, arguments.offset)):
                raise InvalidMutation(
                    f"{column[i]} does not turn the wild type into the row's {_SEQUENCE}: is it the right wild type?"
                )
            mutants.append(":".join(map(str, mutant)) or "WT")
        except InvalidMutation as error:
            problem = f"{table.name}, line {row.line}: {error.reason}"
            if column and not readable and not problems:
                problem += f" (nothing in column {name!r} is a mutation: choose another with {_MUTATION_COL} NAME)"
            if not arguments.skip_invalid:
                raise InvalidMutation(problem) from error
            problems.append(problem)
            mutants.append(None)
    if problems:
        print(f"numpyesm: {len(problems)} of {len(mutants)} rows left without a score:", file=sys.stderr)
        print("".join(f"  {problem}\n" for problem in problems[:10]), end="", file=sys.stderr)
    return mutants


def _attempt(parse: Callable[..., tuple[Substitution, ...]], *given: Any) -> tuple[Substitution, ...] | InvalidMutation:
    """Parse one mutant; return an error instead of raising it, because the other rows matter, too."""
    try:
        return parse(*given)
    except InvalidMutation as error:
        return error


def _from_sequence(wild_type: str, sequence: str, offset: int) -> tuple[Substitution, ...]:
    """Find where a whole mutated sequence differs from the wild type."""
    sequence = sequence.strip()
    if len(sequence) != len(wild_type):
        raise InvalidMutation(
            f"the {_SEQUENCE} has {len(sequence)} residues, the wild type {len(wild_type)}: "
            "insertions and deletions cannot be scored, only substitutions can"
        )
    pairs = enumerate(zip(wild_type, sequence, strict=True), start=offset)
    text = ":".join(f"{wild}{position}{letter}" for position, (wild, letter) in pairs if wild != letter)
    return parse_mutant(text or "WT")


def _measured(table: VariantTable, name: str | None) -> tuple[str, list[float]] | None:
    """Return the measured column's name and numbers (NaN where there is none); None if there is no such column."""
    if name is None:
        name = _MEASURED if table.column(_MEASURED, _MEASURED_COL) is not None else _only_numbers(table)
    if name is None:
        return None
    numbers = table.numbers(name, _MEASURED_COL)
    unread = [row.line for row, number in zip(table.rows, numbers, strict=True) if number is None]
    if unread:
        print(
            f"numpyesm: {table.name}: {len(unread)} values of {name} are not numbers (first in line "
            f"{unread[0]}) and are left out of the correlation",
            file=sys.stderr,
        )
    return name, [math.nan if number is None else number for number in numbers]


def _only_numbers(table: VariantTable) -> str | None:
    """Return the name of the only column of numbers; None if there are several. (fair-esm's example has `2500`.)"""
    found = []
    for name in table.columns:
        if name and name not in SCORING_METHODS and table.columns.count(name) == 1:
            numbers = table.numbers(name, _MEASURED_COL)
            if None not in numbers and not all(number != number for number in numbers):
                found.append(name)
    if len(found) > 1:
        names = listed(map(repr, found))
        print(f"numpyesm: no correlation: say with --measured-col which of {names} is measured", file=sys.stderr)
    return found[0] if len(found) == 1 else None


def _report(column: str, scores: Sequence[float], name: str, measured: Sequence[float]) -> None:
    used = sum(not (math.isnan(a) or math.isnan(b)) for a, b in zip(scores, measured, strict=True))
    rho = spearman(scores, measured)
    said = "not defined: fewer than two values, or all equal" if math.isnan(rho) else f"{rho:.4f}"
    print(f"Spearman of {column} and {name}: {said} ({used} of {len(scores)} rows)", file=sys.stderr)


def scan(arguments: argparse.Namespace) -> int:
    """Write the matrix of every substitution, and the picture next to it."""
    target, picture = _scan_outputs(arguments)
    wild_type = _read_wild_type(arguments.input, target.path)
    if picture is not None:
        check_output_is_another(arguments.input, picture, "--heatmap")
        try:
            outputs.figure_class()  # before the model runs, so that a missing extra costs no time
        except MissingExtra as error:
            if arguments.heatmap:
                raise
            print(f"numpyesm: no heat map: {error}", file=sys.stderr)
            picture = None
    model = load_model(arguments)
    found = model.scan_mutations(wild_type, **_options(arguments, "positions"))
    target.write(_matrix(found, target.form))
    if picture is not None:
        outputs.write(_heat_map(found, "SYNTHETIC WEIGHTS" if model.checkpoint.synthetic else ""), picture)
    return 0


def _scan_outputs(arguments: argparse.Namespace) -> tuple[outputs.Destination, Path | None]:
    """Return where the table and the heat map go; by default the picture is next to the table."""
    output = arguments.output
    if output and output != "-" and outputs.names_folder(output):
        arguments.output = str(Path(output) / "scan.csv")
    target = outputs.destination(arguments, _ENDINGS | {".json": "json"}, terminal="csv", otherwise="csv")
    if arguments.no_heatmap and arguments.heatmap:
        raise InvalidOption("--heatmap and --no-heatmap contradict each other")
    if arguments.heatmap:
        picture = Path(arguments.heatmap)
        if picture.suffix.lower() != ".png":
            raise InvalidOption(f"--heatmap {picture}: expected a name that ends in .png")
        outputs.check_writable(picture)
        return target, picture
    if arguments.no_heatmap or target.path is None or is_stream(target.path):
        return target, None
    return target, Path(target.path[: len(target.path) - len(target.compression)]).with_suffix(".png")


def _matrix(scan: MutationScan, form: str) -> Iterator[bytes]:
    """Write `position,wild_type,A,C,…,Y`, one row per position, or all of it as JSON."""
    if form == "json":
        document = {
            "method": scan.method,
            "wild_type": scan.wild_type,
            "positions": scan.positions,
            "amino_acids": list(scan.amino_acids),
            "scores": scan.scores,
        }
        return chain(json_pieces(document), [b"\n"])
    rows = zip(scan.positions, scan.wild_type, scan.scores.tolist(), strict=True)
    header = ["position", "wild_type", *scan.amino_acids]
    return outputs.csv_pieces(header, ([position, letter, *row] for position, letter, row in rows), form)


def _heat_map(scan: MutationScan, note: str) -> bytes:
    """Draw amino acids against positions, in strips; red is worse than the wild type, which is marked by dots."""
    length = len(scan.wild_type)
    strip = max(_STRIP, -(-length // _MOST_STRIPS))
    strips = range(0, length, strip)
    figure = outputs.figure_class()(figsize=(14, 0.8 + 3.0 * len(strips)), dpi=110, layout="constrained")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    limit = max(float(np.abs(scan.scores).max()), 1e-6)
    letters = scan.amino_acids
    for ax, start in zip(axes, strips, strict=True):
        part = scan.scores[start : start + strip]
        image = ax.imshow(part.T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
        own = [(i, letters.index(w)) for i, w in enumerate(scan.wild_type[start : start + strip]) if w in letters]
        ax.plot(*zip(*own, strict=True), "k.", markersize=3) if own else None
        ax.set_xlim(-0.5, min(strip, length) - 0.5)
        ax.set_yticks(range(len(letters)), letters, fontsize=7)
        ticks = [i for i in range(len(part)) if (scan.positions[start + i]) % 10 == 0] or [0]
        ax.set_xticks(ticks, [f"{scan.wild_type[start + i]}{scan.positions[start + i]}" for i in ticks], fontsize=8)
    axes[0].set_title(f"{scan.method}, {length} residues{f' ({note})' if note else ''}; dots: the wild type")
    figure.colorbar(image, ax=list(axes), label="log p(mutant) − log p(wild type)", shrink=min(1.0, 2 / len(strips)))
    return outputs.png_bytes(figure)


def _read_wild_type(text: str, output: str | None) -> str:
    """Read the one sequence of a FASTA file or of standard input, or take the text itself."""
    records = read_records([text], output)
    if len(records) != 1:
        names = listed(record.id for record in records)
        raise InvalidSequence(f"{text}: {len(records)} sequences ({names}), expected one wild type")
    return check_wild_type(records[0].sequence)


def _options(arguments: argparse.Namespace, unit: str) -> dict[str, Any]:
    """Return the options of both commands as the model takes them; with progress, in units, if stderr is a terminal."""

    def show(done: int, total: int) -> None:
        print(f"\r{done} of {total} {unit}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    options = {name: getattr(arguments, name) for name in ("method", "offset", "window")}
    return options | {"progress": show if sys.stderr.isatty() else None}
