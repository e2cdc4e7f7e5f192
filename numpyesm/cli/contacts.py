"""`numpyesm contacts`: a list of contacts, a map in characters, a picture, or the numbers."""

from __future__ import annotations

import argparse
import os
import shutil
import textwrap
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import InvalidOption
from ..fasta import Record
from ..files import is_stream, safe_stem
from . import outputs
from .inputs import compute, read_records

_ENDINGS = {".png": "png", ".npz": "npz", ".json": "json", ".tsv": "tsv", ".csv": "csv", ".txt": "map"}
_ONE_FILE_EACH = {"png": ".png", "tsv": ".tsv", "csv": ".csv", "map": ".txt"}
_SHADES = " .:-=+*#%@"
_COLUMNS = ("id", "i", "residue_i", "j", "residue_j", "probability")

Contacts: TypeAlias = npt.NDArray[np.float32]


def run(arguments: argparse.Namespace) -> int:
    """Write one map per sequence: into one file, or into a folder with a file for each."""
    folder = _folder(arguments)
    if folder is None:
        target = outputs.destination(arguments, _ENDINGS, terminal="map", otherwise="tsv")
    else:
        target = outputs.Destination(arguments.format or "tsv", str(folder))
        outputs.check_writable(folder / "001_map.txt")
    options = {name: getattr(arguments, name) for name in ("threshold", "min_separation")}
    chosen = {name: value for name, value in options.items() if value is not None}
    if chosen and target.form not in outputs.DELIMITERS:
        named = next(iter(chosen)).replace("_", "-")
        raise InvalidOption(f"--{named} chooses what is listed in tsv and csv, and {target.form} holds the whole map")
    if target.form == "png":
        outputs.figure_class()  # before the model runs, so that a missing extra costs no time
        if target.path is None:
            raise InvalidOption("a picture needs a file: -o map.png")
    records = read_records(arguments.input, target.path, arguments.ids)
    if folder is None and target.form == "png" and len(records) > 1:
        raise InvalidOption(f"{len(records)} sequences give {len(records)} pictures: -o FOLDER/ --format png")
    model, results = compute(arguments, records, lambda model, s: model.encode(s, include=["contacts"]))
    if target.form in ("json", "npz"):
        target.write(outputs.result_pieces(target.form, results, [record.id for record in records]))
        return 0
    maps = [(record, one.contacts) for record, one in zip(records, results, strict=True) if one.contacts is not None]
    synthetic = model.checkpoint.synthetic
    if folder is None:
        target.write(_pieces(maps, target.form, chosen, synthetic))
        return 0
    for number, (record, contacts) in enumerate(maps, start=1):
        path = folder / f"{number:03d}_{safe_stem(record.id)}{_ONE_FILE_EACH[target.form]}"
        outputs.write(_pieces([(record, contacts)], target.form, chosen, synthetic), path)
    return 0


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Return the folder that `-o` names: an existing one, or a name that ends in a slash or has no ending."""
    output = arguments.output
    if not output or output == "-" or is_stream(output):
        return None
    bare = not Path(output).suffix and arguments.format in _ONE_FILE_EACH and not os.path.exists(output)
    if not (bare or outputs.names_folder(output)):
        return None
    if arguments.format in ("npz", "json"):
        raise InvalidOption(f"-o {output} is a folder, and {arguments.format} holds all maps in one file")
    return Path(output)


def _pieces(
    maps: Iterable[tuple[Record, Contacts]], form: str, chosen: dict[str, Any], synthetic: bool
) -> Iterable[bytes]:
    """Write maps into one file: as one table of what is `chosen` (see `contact_list`), or one behind the other."""
    if form in outputs.DELIMITERS:
        listed = (contact_list(*one, **chosen) for one in maps)
        return outputs.csv_pieces(_COLUMNS, chain.from_iterable(listed), form)
    titled = [(map_title(record.id, synthetic), contacts) for record, contacts in maps]
    return (contact_png(*one) if form == "png" else contact_text(*one).encode() for one in titled)


def map_title(name: str, synthetic: bool) -> str:
    """Return the title of a map, which says so if the weights are synthetic."""
    return f"{name} (SYNTHETIC WEIGHTS)" if synthetic else name


def contact_list(
    record: Record, contacts: Contacts, threshold: float = 0.3, min_separation: int = 6
) -> list[tuple[str, int, str, int, str, str]]:
    """Return a row per contact, the most probable first; positions count from 1."""
    i, j = np.triu_indices(len(contacts), k=min_separation)
    keep = contacts[i, j] >= threshold
    i, j = i[keep], j[keep]
    order = np.argsort(-contacts[i, j], kind="stable")
    return [
        (record.id, a + 1, record.sequence[a], b + 1, record.sequence[b], f"{contacts[a, b]:.4f}")
        for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True)
    ]


def contact_text(title: str, contacts: Contacts, width: int | None = None) -> str:
    """Draw the map in characters, shrunk to the terminal; a cell shows its highest probability."""
    columns = width or min(120, shutil.get_terminal_size((80, 24)).columns) - 2
    cells = min(len(contacts), max(10, columns // 2))
    edges = np.arange(cells + 1) * len(contacts) // cells
    shrunk = np.maximum.reduceat(np.maximum.reduceat(contacts, edges[:-1], axis=0), edges[:-1], axis=1)
    shade = np.minimum((shrunk * len(_SHADES)).astype(int), len(_SHADES) - 1)
    rows = ("".join(_SHADES[value] * 2 for value in row) for row in shade)
    head = f"{title}: {len(contacts)} residues, contacts 0 to 1 as {_SHADES!r}"
    return "\n".join([head, *(f"|{row}|" for row in rows)]) + "\n"


def contact_png(title: str, contacts: Contacts) -> bytes:
    """Draw the map as a PNG."""
    figure = outputs.figure_class()(figsize=(6.4, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    length = len(contacts)
    ends, smoothing = (0.5, length + 0.5), "nearest" if length > 400 else "none"
    image = axes.imshow(
        contacts, vmin=0, vmax=1, cmap="Blues", origin="lower", extent=ends + ends, interpolation=smoothing
    )
    axes.set(xlabel="residue", ylabel="residue")
    lines = textwrap.wrap(f"{title}: {length} residues", 56, max_lines=4, placeholder=" …")
    axes.set_title("\n".join(lines), parse_math=False)  # ids may have a `$`
    axes.locator_params(integer=True)
    figure.colorbar(image, label="contact probability")
    return outputs.png_bytes(figure)
