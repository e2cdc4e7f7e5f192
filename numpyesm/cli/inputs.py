"""Sequences from the command line: FASTA files, standard input, or bare sequences; and the model to run them."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..alphabet import MASK_TOKEN, tokenize
from ..errors import InvalidOption, InvalidSequence
from ..fasta import Record, clean_sequence, nameless, read_fasta, record_name
from ..files import same_file
from ..model import ESM2

Results = TypeVar("Results")

_BARE_SEQUENCE = re.compile(r"(?:[A-Z*-]|<mask>)+")
# Joined chains, gaps and stops in other notations. No file name consists of these alone.
_NEARLY_A_SEQUENCE = re.compile(r"[A-Z]{2}(?:[A-Z.:/|*~-]|<mask>)*[A-Z*]")


def load_model(arguments: argparse.Namespace) -> ESM2:
    """Load the model that the common options name."""
    return ESM2.from_pretrained(
        arguments.weights,
        backend=arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        max_memory=arguments.max_memory,
    )


def read_records(
    inputs: Sequence[str], output: str | None = None, ids: str = "first-word", masks: bool = False
) -> list[Record]:
    """Read the records of all inputs in order; bare sequences are named by their place.

    `output` must not be one of the inputs. `ids` says how to name records, see `fasta.record_name`; `masks`, whether to
    expect `<mask>` in them.
    """
    records: list[Record] = []
    for text in inputs:
        if text == "-":
            records += read_fasta(sys.stdin.buffer, first=len(records) + 1)
        elif os.path.exists(text) and not os.path.isdir(text):
            check_output_is_another(text, output)
            records += read_fasta(text, first=len(records) + 1)
        elif _BARE_SEQUENCE.fullmatch(text):
            records.append(Record(nameless(len(records) + 1), "", clean_sequence(text)))
        else:
            raise InvalidSequence(_no_input(text, masks))
    return [record._replace(id=record_name(record.id, ids)) for record in records]


def check_output_is_another(source: str, output: str | Path | None, option: str = "-o") -> None:
    """Raise InvalidOption if the output would replace the input."""
    if output is not None and same_file(source, output):
        raise InvalidOption(f"{option} {output} is the input itself: choose another output")


def _no_input(text: str, masks: bool) -> str:
    """Explain why an argument is neither a file nor a sequence."""
    if os.path.isdir(text):
        return f"{text!r} is a folder, expected a file"
    if not text or (set(text) & set("./\\:~") and not _NEARLY_A_SEQUENCE.fullmatch(text)):
        return f"there is no file {text[:200]!r}"
    try:
        tokenize([text], masks=masks or MASK_TOKEN in text)
    except InvalidSequence as error:
        return f"{text[:80]!r} is not a file, and as a sequence: {error.reason}"
    return f"{text[:80]!r} is neither a file nor a sequence"


def compute(
    arguments: argparse.Namespace, records: Sequence[Record], call: Callable[[ESM2, list[str]], Results]
) -> tuple[ESM2, Results]:
    """Load the model; return it and `call(model, sequences)`. An error about a sequence names its record."""
    model = load_model(arguments)
    try:
        return model, call(model, [record.sequence for record in records])
    except InvalidSequence as error:
        if error.item is None:
            raise
        raise InvalidSequence(
            f"record {error.item + 1} ({records[error.item].id or 'no name'}): {error.reason}",
            position=error.position,
            character=error.character,
        ) from error
