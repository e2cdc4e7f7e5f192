"""`numpyesm scan`: every substitution of a protein as a matrix, and as a heat map."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import InvalidOption, MissingExtra
from ..files import is_stream
from ..formats import json_pieces
from ..scoring.methods import MutationScan
from . import outputs
from .inputs import check_output_is_another, load_model
from .score import progress_line, read_wild_type

_ENDINGS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json"}
# Positions in one strip of the heat map.
_STRIP = 100
# A picture cannot be higher.
_MOST_STRIPS = 150


def run(arguments: argparse.Namespace) -> int:
    """Write the matrix, and the picture next to it."""
    target, picture = _outputs(arguments)
    wild_type = read_wild_type(arguments.input, target.path)
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
    scan = model.scan_mutations(
        wild_type,
        arguments.method,
        offset=arguments.offset,
        window=arguments.window,
        progress=progress_line("positions"),
    )
    target.write(_pieces(scan, target.form))
    if picture is not None:
        outputs.write(_png(scan, "SYNTHETIC WEIGHTS" if model.checkpoint.synthetic else ""), picture)
    return 0


def _outputs(arguments: argparse.Namespace) -> tuple[outputs.Destination, Path | None]:
    """Return where the table and the heat map go; by default the picture is next to the table."""
    output = arguments.output
    if output and output != "-" and outputs.names_folder(output):
        arguments.output = str(Path(output) / "scan.csv")
    target = outputs.destination(arguments, _ENDINGS, terminal="csv", otherwise="csv")
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
    return target, Path(target.path.removesuffix(target.compression)).with_suffix(".png")


def _pieces(scan: MutationScan, form: str) -> Iterator[bytes]:
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


def _png(scan: MutationScan, note: str) -> bytes:
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
