"""fair-esm's `esm-extract` with the same arguments: `python -m numpyesm.compat.extract MODEL FASTA OUTPUT_DIR …`.

It writes `LABEL.npz` where fair-esm writes `LABEL.pt`. `load` gives the dictionary that `torch.load` would, and
`numpy.load` the same arrays by flat names: `representations_33`, `mean_representations_33`, `bos_representations_33`,
`contacts`, `label`.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import SequenceNotes
from ..cli import guarded
from ..cli.parser import add_arithmetic
from ..errors import InvalidOption, InvalidSequence
from ..files import atomic_write, native_name
from ..options import check_layers
from ..weights.integrity import weights_sha256
from . import fair_esm as esm
from .fair_esm.data import without_padding
from .fair_esm.model import ESM2

Array = npt.NDArray[Any]

# For `--include`: the name of a layer's output in a file, and how it follows from the rows of `<cls>` and residues.
_BY_LAYER: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "per_tok": ("representations", lambda rows: rows[1:]),
    "mean": ("mean_representations", lambda rows: rows[1:].mean(axis=0)),
    "bos": ("bos_representations", lambda rows: rows[0]),
}
_LONGEST_NAME = 255  # of a file, in bytes, on common file systems


def create_parser() -> argparse.ArgumentParser:
    """fair-esm's arguments, and three of numpyesm's own."""
    parser = argparse.ArgumentParser(
        prog="python -m numpyesm.compat.extract",
        description="Extract per-token representations and model outputs for sequences in a FASTA file",
    )
    parser.add_argument("model_location", help="fair-esm's name of a model, a .pt or .safetensors file, or a folder")
    parser.add_argument("fasta_file", type=Path, help="FASTA file on which to extract representations")
    parser.add_argument("output_dir", type=Path, help="output directory for extracted representations")
    parser.add_argument("--toks_per_batch", type=int, default=4096, help="maximum batch size (%(default)s)")
    parser.add_argument(
        "--repr_layers", type=int, default=[-1], nargs="+", help="layers, 0 to num_layers or from the end (-1)"
    )
    parser.add_argument(
        "--include",
        nargs="+",
        choices=["mean", "per_tok", "bos", "contacts"],
        required=True,
        help="which representations to return",
    )
    parser.add_argument(
        "--truncation_seq_length", type=int, default=1022, help="cut longer sequences to this (%(default)s)"
    )
    parser.add_argument("--nogpu", action="store_true", help="accepted: numpyesm runs on the CPU")
    parser.add_argument("--skip_existing", action="store_true", help="skip records whose file already holds this")
    add_arithmetic(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write one `.npz` per record."""
    if arguments.truncation_seq_length < 1 or arguments.toks_per_batch < 1:
        raise InvalidOption("--truncation_seq_length and --toks_per_batch: expected at least 1")
    dataset = esm.FastaBatchedDataset.from_file(arguments.fasta_file)
    paths = [_path(arguments.output_dir, label) for label in dataset.sequence_labels]
    if len({os.path.normpath(path) for path in paths}) < len(paths):
        raise InvalidSequence(f"{arguments.fasta_file}: labels such as 'a' and './a' would give two records one file")
    alphabet = esm.Alphabet.from_architecture("ESM-1b")
    converter = alphabet.get_batch_converter(arguments.truncation_seq_length)
    notes = SequenceNotes()
    for label, sequence in zip(dataset.sequence_labels, dataset.sequence_strs, strict=True):  # before hours of work
        try:
            if not alphabet.encode(sequence):
                raise InvalidSequence("there is no sequence")
        except InvalidSequence as error:
            raise InvalidSequence(f"record {label[:80]!r}: {error.reason}") from error
        notes.look(sequence, label)
    notes.warn()
    options = {"backend": arguments.backend, "precision": arguments.precision, "threads": arguments.threads}
    model, _ = esm.pretrained.load_model_and_alphabet(arguments.model_location, **options)
    layers = check_layers(arguments.repr_layers, model.num_layers)
    weights = f"{weights_sha256(model.core.checkpoint)} {arguments.precision}"
    print(f"Read {arguments.fasta_file} with {len(dataset)} sequences")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    batches = dataset.get_batch_indices(arguments.toks_per_batch, extra_toks_per_seq=1)
    for number, batch in enumerate(batches, start=1):
        labels, _, tokens = converter.convert([dataset[index] for index in batch])
        stamps = [_stamp(weights, *each) for each in zip(labels, tokens, strict=True)]
        todo = list(range(len(batch)))
        if arguments.skip_existing:
            todo = [i for i in todo if not _holds(paths[batch[i]], layers, arguments.include, stamps[i])]
        print(f"Processing {number} of {len(batches)} batches ({len(todo)} sequences)", flush=True)
        if len(todo) < len(batch):
            print(f"Skipping {len(batch) - len(todo)} sequences whose files already hold these outputs")
        if todo:
            results = _extract(model, tokens[todo], layers, arguments.include)
            for i, result in zip(todo, results, strict=True):
                _save(paths[batch[i]], stamps[i], label=labels[i], **result)
    return 0


def _extract(model: ESM2, tokens: Array, layers: Sequence[int], include: Sequence[str]) -> Iterator[dict[str, Array]]:
    """Yield the arrays of each file of one padded batch (B, T)."""
    by_layer = layers if _BY_LAYER.keys() & set(include) else []
    out = model.outputs(tokens, by_layer, contacts="contacts" in include)
    for i, row in enumerate(tokens):
        end = len(without_padding(row)) - 1
        found: dict[str, Array] = {}
        for kind, (name, take) in _BY_LAYER.items():
            if kind in include:
                found |= {f"{name}_{layer}": take(rows[i, :end]) for layer, rows in out["representations"].items()}
        if "contacts" in include:
            found["contacts"] = out["contacts"][i, : end - 1, : end - 1]
        yield found


def _save(path: Path, stamp: bytes, **arrays: Any) -> None:
    """Write one record's file, whole or not at all; `stamp` becomes the archive's comment, which readers skip."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment and the comment
        file.write(struct.pack("<H", len(stamp)) + stamp)


def _stamp(weights: str, label: str, tokens: npt.NDArray[np.int64]) -> bytes:
    """Hash what a file's numbers depend on: weights and precision, label, and tokens after truncation."""
    row = without_padding(tokens).astype("<i8").tobytes()
    return f"numpyesm {sha256(f'{weights} {label} '.encode() + row).hexdigest()}".encode()


def _holds(path: Path, layers: Sequence[int], include: Sequence[str], stamp: bytes) -> bool:
    """Whether a file has these arrays (and perhaps others), of the same weights, label and sequence."""
    by_layer = _BY_LAYER.keys() & set(include)
    members = {f"{_BY_LAYER[kind][0]}_{layer}.npy" for kind in by_layer for layer in layers}
    members |= {f"{name}.npy" for name in {"label", *include} - by_layer}
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == stamp and members <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `torch.load` returns for fair-esm's file: `label`, `representations` {layer: (L, D)}, and so on."""
    result: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            match = re.fullmatch(r"(\w*representations)_(\d+)", key)
            if match:
                result.setdefault(match[1], {})[int(match[2])] = arrays[key]
            else:
                result[key] = str(arrays[key]) if key == "label" else arrays[key]
    return result


def _path(folder: Path, label: str) -> Path:
    """Name a record's file: a `/` in its label makes a folder, as in fair-esm, but never outside `folder`."""
    parts = f"{label}.npz".split("/")
    if "\0" in label or os.path.isabs(label) or ".." in parts or os.path.splitdrive(label)[0]:
        raise InvalidSequence(f"record {label[:80]!r}: its file would be outside {folder}")
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        raise InvalidSequence(f"record {label[:80]!r}…: the label is too long for the name of a file")
    return folder.joinpath(*map(native_name, parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong use."""
    return guarded(partial(run, create_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
