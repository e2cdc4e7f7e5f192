"""`numpyesm demo`: embeddings, a masked prediction and a contact map of real proteins, with timings."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from ..errors import MissingExtra, WeightsNotFound
from ..fasta import packaged
from ..formats import npz_results
from ..model import ESM2
from .contacts import contact_png, contact_text, map_title
from .inference import most_probable
from .inputs import load_model
from .outputs import table, write

_BANNER = """\
======================================================================
  SYNTHETIC WEIGHTS: no official ESM-2 weights were found.
  The model below is random: timings are real, numbers MEAN NOTHING.
  With a network: numpyesm fetch esm2-35m  Without: weights/README.md
======================================================================"""


def run(arguments: argparse.Namespace) -> int:
    """Run with official weights if they can be found or fetched, else with synthetic ones and a banner that says so."""
    output = Path(arguments.output)
    records = packaged("example_proteins.fasta")
    start = time.perf_counter()
    model = _load(arguments)
    print(f"{model!r}\nloaded in {time.perf_counter() - start:.2f} s\n")

    start = time.perf_counter()
    results = model.encode([record.sequence for record in records])
    seconds = time.perf_counter() - start
    residues = sum(len(record.sequence) for record in records)
    print(
        f"Embeddings of {len(records)} proteins, {residues} residues: "
        f"{seconds:.2f} s, {residues / seconds:.0f} residues/s"
    )
    rows = []
    for record, result in zip(records, results, strict=True):
        (mean,) = result.to_arrays().values()
        rows.append((record.id, len(record.sequence), " ".join(f"{value:8.4f}" for value in mean[:5]) + " …"))
    print(table(("protein", "residues", "mean embedding, last layer"), rows))
    write(npz_results(results, [record.id for record in records]), output / "embeddings.npz")

    shortest = min(records, key=lambda record: len(record.sequence))
    middle = len(shortest.sequence) // 2
    masked = f"{shortest.sequence[:middle]}<mask>{shortest.sequence[middle + 1 :]}"
    start = time.perf_counter()
    predicted = model.predict([masked], positions="masked")
    print(
        f"Which residue is at position {middle + 1} of {shortest.id} (in fact {shortest.sequence[middle]})? "
        f"{time.perf_counter() - start:.3f} s"
    )
    print(table(*most_probable([shortest], predicted)))

    start = time.perf_counter()
    contacts = model.encode([shortest.sequence], include=["contacts"])[0].contacts
    assert contacts is not None
    print(f"Contact map of {shortest.id}, {len(contacts)} residues: {time.perf_counter() - start:.3f} s")
    title = map_title(shortest.id, model.checkpoint.synthetic)
    print(contact_text(title, contacts, width=64))
    try:
        write(contact_png(title, contacts), output / "contacts.png")
        print(f"picture: {output / 'contacts.png'}")
    except MissingExtra as error:
        print(f"no picture: {error}")
    write(contact_text(title, contacts, width=160), output / "contacts.txt")
    print(f"all results: {output}/\nnext: {sys.argv[0]} encode FILE.fasta -o FILE.npz, and docs/tutorial.md")
    return 0


def _load(arguments: argparse.Namespace) -> ESM2:
    try:
        return load_model(arguments)
    except WeightsNotFound as error:
        if arguments.weights or "NUMPYESM_WEIGHTS" in os.environ:
            raise
        print(f"numpyesm: {error}\n\n{_BANNER}\n", file=sys.stderr, flush=True)
    arguments.weights = "synthetic:esm2-35m:0"
    return load_model(arguments)
