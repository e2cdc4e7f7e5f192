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
from collections.abc import Collection, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..alphabet import EOS, PAD, SequenceNotes, frame
from ..cli import guarded
from ..cli.parser import add_arithmetic
from ..errors import InvalidOption, InvalidSequence
from ..files import atomic_write
from ..options import Outputs
from ..results import fields
from ..weights.integrity import weights_sha256
from . import fair_esm as esm

# What each output is called in a file.
_NAMES = {
    "per_token": "representations",
    "mean": "mean_representations",
    "bos": "bos_representations",
    "contacts": "contacts",
}
_ALPHABET = esm.Alphabet.from_architecture("ESM-1b")
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
    notes = SequenceNotes()
    tokens = []
    for label, sequence in zip(dataset.sequence_labels, dataset.sequence_strs, strict=True):  # before hours of work
        tokens.append(_tokens(label, sequence, arguments.truncation_seq_length))
        notes.look(sequence, label)
    notes.warn()
    options = {"backend": arguments.backend, "precision": arguments.precision, "threads": arguments.threads}
    model = esm.pretrained.load_model_and_alphabet(arguments.model_location, **options)[0].core
    include = ["per_token" if name == "per_tok" else name for name in arguments.include]
    outputs = Outputs.check(model.checkpoint, arguments.repr_layers, include)
    names = _names(outputs)
    weights = f"{weights_sha256(model.checkpoint)} {arguments.precision}"
    print(f"Read {arguments.fasta_file} with {len(dataset)} sequences")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    batches = dataset.get_batch_indices(arguments.toks_per_batch, extra_toks_per_seq=1)
    for number, batch in enumerate(batches, start=1):
        stamps = {i: _stamp(weights, dataset.sequence_labels[i], tokens[i]) for i in batch}
        todo = [i for i in batch if not (arguments.skip_existing and _holds(paths[i], names, stamps[i]))]
        print(f"Processing {number} of {len(batches)} batches ({len(todo)} sequences)", flush=True)
        if len(todo) < len(batch):
            print(f"Skipping {len(batch) - len(todo)} sequences whose files already hold these outputs")
        results = model.passes.encode([tokens[i] for i in todo], outputs) if todo else ()
        for i, result in zip(todo, results, strict=True):
            found = result.to_arrays()
            arrays = {name: found[field] for name, field in names.items()}
            _save(paths[i], stamps[i], label=dataset.sequence_labels[i], **arrays)
    return 0


def _tokens(label: str, sequence: str, longest: int) -> npt.NDArray[np.uint8]:
    """Token numbers (T,) of a record cut to `longest` residues; InvalidSequence, which names the record."""
    try:
        ids = _ALPHABET.encode(sequence)
        if not ids:
            raise InvalidSequence("there is no sequence")
        if {PAD, EOS} & set(ids):
            raise InvalidSequence("<pad> and <eos> are no residues")
        return frame(np.array(ids[:longest], np.uint8))
    except InvalidSequence as error:
        raise InvalidSequence(f"record {label[:80]!r}: {error.reason}") from error


def _names(outputs: Outputs) -> dict[str, str]:
    """Names of a file's arrays, and what a result calls them."""
    return {
        _NAMES[field.kind] + ("" if field.layer is None else f"_{field.layer}"): field.name for field in fields(outputs)
    }


def _save(path: Path, stamp: bytes, **arrays: Any) -> None:
    """Write one record's file, whole or not at all; `stamp` becomes the archive's comment, which readers skip."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment and the comment
        file.write(struct.pack("<H", len(stamp)) + stamp)


def _stamp(weights: str, label: str, tokens: npt.NDArray[np.uint8]) -> bytes:
    """Hash what a file's numbers depend on: weights and precision, label, and tokens after truncation."""
    row = tokens.astype("<i8").tobytes()
    return f"numpyesm {sha256(f'{weights} {label} '.encode() + row).hexdigest()}".encode()


def _holds(path: Path, names: Collection[str], stamp: bytes) -> bool:
    """Whether a file has these arrays (and perhaps others), of the same weights, label and sequence."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == stamp and {f"{name}.npy" for name in names} <= set(archive.namelist())
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
    # In UTF-8 even where the locale cannot encode it.
    return folder.joinpath(*(os.fsdecode(part.encode("utf-8", "surrogateescape")) for part in parts))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 for a failure, 2 for wrong use."""
    return guarded(partial(run, create_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
