"""`numpyesm contacts`: a list of contacts, a map in characters, a picture, or the numbers."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..fasta import Record
from ..files import safe_stem
from ..model import ESM2
from .inputs import load_model, on_records, read_records
from .outputs import chosen_format, json_pieces, write, write_npz
from .pictures import figure_class, png_bytes

_ENDINGS = {".png": "png", ".npz": "npz", ".json": "json", ".tsv": "tsv", ".txt": "map"}
_SHADES = " .:-=+*#%@"


def run(arguments: argparse.Namespace) -> int:
    """One map a sequence."""
    if arguments.output == "-":
        arguments.output = None
    form = chosen_format(arguments, _ENDINGS, "map", "tsv")
    records = read_records(arguments.input, arguments.output)
    if form == "png":
        figure_class()  # before the model runs: a missing extra should not cost minutes
        if arguments.output is None:
            raise InvalidOption("a picture needs a file: -o map.png")
    folder = Path(arguments.output) if arguments.output and len(records) > 1 and form in ("png", "tsv", "map") else None
    if folder is not None and (folder.is_file() or folder.suffix.lower() in _ENDINGS):
        raise InvalidOption(f"{len(records)} sequences give {len(records)} files: -o must be a folder")
    model = load_model(arguments)
    results = on_records(records, lambda s: model.encode(s, include=["contacts"]))
    maps = [result.contacts for result in results if result.contacts is not None]
    if form == "json":
        write(json_pieces({"results": [result.to_dict(arrays=True) for result in results]}), arguments.output)
        return 0
    if form == "npz":
        arrays: dict[str, npt.NDArray[Any]] = {f"contacts_{i}": contacts for i, contacts in enumerate(maps)}
        write_npz({"ids": np.array([record.id[:200] for record in records])} | arrays, arguments.output)
        return 0
    render: dict[str, Callable[[Record, npt.NDArray[np.float32]], bytes]] = {
        "tsv": lambda record, c: contact_list(record, c, arguments.threshold, arguments.min_separation).encode(),
        "map": lambda record, c: contact_text(titled(record, model), c).encode(),
        "png": lambda record, c: contact_png(titled(record, model), c),
    }
    pages = [render[form](record, contacts) for record, contacts in zip(records, maps, strict=True)]
    if folder is None:
        if form == "tsv":  # one header for all
            pages[1:] = [page.partition(b"\n")[2] for page in pages[1:]]
        write(b"".join(pages), arguments.output)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    ending = {"map": "txt"}.get(form, form)
    for number, (record, page) in enumerate(zip(records, pages, strict=True), start=1):
        write(page, folder / f"{number:03d}_{safe_stem(record.id or 'sequence')}.{ending}")
    return 0


def titled(record: Record, model: ESM2) -> Record:
    """The record under the name that stands above its map: it says so if the weights are synthetic."""
    return record._replace(id=f"{record.id} (SYNTHETIC WEIGHTS)") if model.checkpoint.synthetic else record


def contact_list(record: Record, contacts: npt.NDArray[np.float32], threshold: float, min_separation: int) -> str:
    """Tab-separated: id, i, residue, j, residue, probability; most probable first, positions counted from 1."""
    i, j = np.triu_indices(len(contacts), k=max(1, min_separation))
    keep = contacts[i, j] >= threshold
    i, j = i[keep], j[keep]
    order = np.argsort(-contacts[i, j], kind="stable")
    lines = ["id\ti\tresidue_i\tj\tresidue_j\tprobability"]
    lines += [
        f"{record.id}\t{a + 1}\t{record.sequence[a]}\t{b + 1}\t{record.sequence[b]}\t{contacts[a, b]:.4f}"
        for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True)
    ]
    return "\n".join(lines) + "\n"


def contact_text(record: Record, contacts: npt.NDArray[np.float32], width: int | None = None) -> str:
    """The map in characters, shrunk to the terminal by taking the highest probability of each cell."""
    columns = width or min(120, shutil.get_terminal_size((80, 24)).columns) - 2
    cells = min(len(contacts), max(10, columns // 2))
    edges = np.arange(cells + 1) * len(contacts) // cells
    shrunk = np.maximum.reduceat(np.maximum.reduceat(contacts, edges[:-1], axis=0), edges[:-1], axis=1)
    shade = np.minimum((shrunk * len(_SHADES)).astype(int), len(_SHADES) - 1)
    rows = ("".join(_SHADES[value] * 2 for value in row) for row in shade)
    title = f"{record.id}: {len(contacts)} residues, contacts 0 to 1 as {_SHADES!r}"
    return "\n".join([title, *(f"|{row}|" for row in rows)]) + "\n"


def contact_png(record: Record, contacts: npt.NDArray[np.float32]) -> bytes:
    """The map as a picture."""
    figure = figure_class()(figsize=(6.4, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    length = len(contacts)
    image = axes.imshow(
        contacts,
        vmin=0,
        vmax=1,
        cmap="Blues",
        origin="lower",
        extent=(0.5, length + 0.5, 0.5, length + 0.5),
        interpolation="nearest" if length > 400 else "none",
    )
    axes.set(xlabel="residue", ylabel="residue", title=f"{record.id}: {length} residues")
    figure.colorbar(image, label="contact probability")
    return png_bytes(figure)
