"""`numpyesm embed`: any number of sequences into one Parquet file, HDF5 file or folder."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ..bulk import BarProgress, JsonProgress, Progress, Summary, embed_fasta
from ..bulk.writers import output_format
from ..errors import InvalidOption, NumpyesmError
from ..printable import in_words
from .inputs import load_model

# Options of the command that `embed_fasta` has by the same names.
_OPTIONS = (
    "include", "dtype", "long", "overlap", "ids", "tokens_per_batch", "shard", "strict", "engine", "address", "workers",
    "threads", "overwrite", "restart",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Return 0 if every record is in the output, 1 if some were rejected or the run failed."""
    if arguments.json_progress:
        return _run_in_json(arguments)
    progress = BarProgress(quiet=arguments.quiet or not sys.stderr.isatty())
    try:
        summary = _embed(arguments, progress)
    finally:
        progress.stop()
    return _report(arguments, summary)


def _run_in_json(arguments: argparse.Namespace) -> int:
    """Turn every line on stderr into JSON: warnings, errors, and anything else that is printed there."""
    lines = JsonProgress()
    warnings.showwarning = lambda message, *_, **__: lines.emit("warning", message=str(message))
    try:
        with redirect_stderr(_Notes(lines)):
            summary = _embed(arguments, lines)
        files = {name: str(value) for name, value in vars(summary).items() if isinstance(value, Path)}
        lines.emit("done", **vars(summary) | {"seconds": round(summary.seconds, 3)} | files)
        return 1 if summary.rejected else 0
    except (NumpyesmError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        lines.emit("error", message=in_words(error))
        return 2 if isinstance(error, InvalidOption) else 1
    except KeyboardInterrupt:
        lines.emit("error", message="interrupted")
        return 130


class _Notes(io.TextIOBase):
    """Takes the place of stderr: each line written to it becomes a note."""

    def __init__(self, lines: JsonProgress) -> None:
        self._lines = lines
        self._begun = ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, whole):
            self._lines.note(line)
        return len(text)


def _embed(arguments: argparse.Namespace, progress: Progress) -> Summary:
    if arguments.max_memory is not None and arguments.engine == "ray":
        raise InvalidOption("--max-memory works with the local engine only: Ray limits its workers by resources")
    output_format(arguments.output)  # an unknown format is refused before the model is loaded
    model = load_model(arguments)
    with redirect_stdout(sys.stderr):  # Ray reports on its workers on stdout
        return embed_fasta(
            arguments.input,
            arguments.output,
            model,
            repr_layers=arguments.layers,
            progress=progress,
            **{name: getattr(arguments, name) for name in _OPTIONS},
        )


def _report(arguments: argparse.Namespace, summary: Summary) -> int:
    if sys.stderr.isatty() and not arguments.quiet and not summary.already_complete:
        rate = f", {summary.residues / summary.seconds:,.0f} residues/s" if summary.residues else ""
        print(f"{summary.output}: {summary.records} records in {summary.seconds:.1f} s{rate}", file=sys.stderr)
    if summary.rejected:
        records = "record" if summary.rejected == 1 else "records"
        print(
            f"numpyesm: {summary.output} is complete except for {summary.rejected} {records} that could not be "
            f"embedded; {summary.rejected_file} says why",
            file=sys.stderr,
        )
        return 1
    return 0
