"""Commands and their options. A command's module is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, TypeAlias

from .._version import __version__
from ..config import PRESETS
from ..fasta import IDS
from ..memory import format_memory
from ..options import BACKEND_ALIASES, BACKENDS, INCLUDES, POSITIONS, PRECISIONS, SCAN_METHODS, SCORING_METHODS
from ..service.settings import OPTIONS, Settings

Command: TypeAlias = argparse.ArgumentParser
# Adds a command: its name, the function that runs it ("module:function", in this package), one line of help.
Add: TypeAlias = Callable[[str, str, str], Command]


def build_parser() -> Command:
    """Build the parser of `numpyesm`; each command sets `run`: parsed arguments in, exit code out."""
    parser = argparse.ArgumentParser(prog="numpyesm", description="ESM-2 protein language models on NumPy alone.")
    parser.add_argument("--version", action="version", version=f"numpyesm {__version__}")
    add = partial(_add, parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    command = add("demo", "demo:run", "try everything on a few real proteins")
    command.add_argument("-o", "--output", default="demo-output", help="folder for the results (%(default)s)")
    _add_weights_commands(add)
    _add_inference_commands(add)
    _add_contacts(add)
    _add_score(add)
    _add_scan(add)
    _add_layers(add)
    _add_serve(add)
    _add_embed(add)
    return parser


def _add(commands: argparse._SubParsersAction[Command], name: str, target: str, text: str) -> Command:
    """Add a command with the options that all commands have."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    source = "model name, Hub id, file, folder, or synthetic[:name[:seed]] (esm2-35m)"
    command.add_argument("--weights", type=_named, help=source)
    add_arithmetic(command, "%(default)s" if name != "warmup" else "all that the CPU has")
    if name != "serve":  # which has one of its own
        command.add_argument("--max-memory", metavar="SIZE", help="limit: 300M (or MiB: 2^20 bytes) or 300MB (10^6)")
    command.add_argument("--debug", action="store_true", help="full traceback on an error")
    module, _, function = target.partition(":")
    command.set_defaults(run=lambda arguments: getattr(import_module(f".{module}", __package__), function)(arguments))
    return command


def add_arithmetic(command: Command, precision: str = "%(default)s") -> None:
    """Add the options that say how to compute; `precision` is the default that its help shows."""
    backends, shown = [*BACKENDS, *BACKEND_ALIASES], "{auto,numpy,compiled}"
    command.add_argument("--backend", choices=backends, metavar=shown, default="auto", help="(auto)")
    command.add_argument("--precision", choices=PRECISIONS, default="fp32", help=f"({precision})")
    command.add_argument("--threads", type=int, help="worker threads (all CPUs)")


_STORAGE: dict[str, Any] = {
    "choices": ["fp32", "fp16", "bf16", "int8"],
    "default": "fp32",
    "help": "storage (%(default)s)",
}


def _add_weights_commands(add: Add) -> None:
    command = add("fetch", "files:fetch", "download official weights from the Hugging Face Hub and convert them")
    command.add_argument("name", nargs="?", type=_named, help=f"{', '.join(PRESETS)} or a Hub id (esm2-35m)")
    command.add_argument("--revision", type=_named, help="commit, branch or tag (the official models are pinned)")
    command.add_argument("--dtype", **_STORAGE)
    command.add_argument("-o", "--output", type=_named, help="file or folder (the cache)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = add("convert", "files:convert", "convert a checkpoint to canonical safetensors, without torch")
    source = "fair-esm .pt, Hugging Face folder or file, canonical file, or a name"
    command.add_argument("source", type=_named, help=source)
    command.add_argument("-o", "--output", type=_named, required=True, help="file.safetensors, or a folder")
    command.add_argument("--dtype", **_STORAGE)
    regression = "fair-esm's -contact-regression.pt, if it is not beside the checkpoint"
    command.add_argument("--regression", type=_named, help=regression)
    command.add_argument("--layers", type=int, metavar="N", help="write the first N layers only, without heads")
    command.add_argument("--adapter", type=_named, help="folder or Hub id of a PEFT adapter (LoRA) to merge in")

    add("verify", "files:verify", "compare the weights with the published reference numbers")
    command = add("warmup", "files:warmup", "compile kernels for this machine before they are first used")
    command.add_argument("--cache", metavar="DIR", help="folder (the user's cache)")
    command.set_defaults(precision=None)
    add("info", "files:info", "show what is installed, what the machine has, and which weights are found")


def _add_inference_commands(add: Add) -> None:
    command = _add_inference(add, "encode", "compute embeddings, contacts, logits, attentions")
    _add_embeddings(command, ["mean"], "mean")
    command = _add_inference(add, "predict", "predict the residue at each <mask>")
    command.add_argument("--positions", choices=POSITIONS, default="all", help="rows of logits (%(default)s)")
    _add_inference(add, "classify", "classify sequences or residues with a fine-tuned model")
    _add_inference(add, "log-prob", "compute the log-probability of each sequence, from one pass")


def _add_inference(add: Add, name: str, text: str) -> Command:
    command = add(name, f"inference:{name.replace('-', '_')}", text)
    _add_records(command)
    command.add_argument("-o", "--output", help="file: .json, .npz, .csv, .tsv or .txt, also with .gz (stdout)")
    formats = "by the output's ending, else table on a terminal and json"
    command.add_argument("--format", choices=["json", "npz", "csv", "tsv", "table"], help=formats)
    return command


def _add_records(command: Command) -> None:
    """Add the options of commands that take any number of sequences."""
    records = "FASTA file (plain or gzip), - for standard input, or a bare sequence in upper case"
    command.add_argument("input", nargs="+", metavar="INPUT", help=records)
    ids = "keep ids such as sp|P12345|NAME, or shorten them to P12345 (%(default)s)"
    command.add_argument("--ids", choices=IDS, default=IDS[0], help=ids)


def _add_embeddings(command: Command, default: list[str] | None, shown: str) -> None:
    """Add the options that say what to compute for each sequence."""
    command.add_argument("--layers", nargs="+", type=int, default=[-1], metavar="N", help="layers of embeddings (-1)")
    names, text = [*INCLUDES, "per_residue"], f"of {', '.join(INCLUDES)} ({shown})"
    command.add_argument("--include", nargs="+", default=default, choices=names, metavar="OUTPUT", help=text)


def _add_contacts(add: Add) -> None:
    command = add("contacts", "contacts:run", "compute contact maps: text, pictures or numbers")
    _add_records(command)
    command.add_argument("-o", "--output", help=".tsv, .csv, .png, .npz, .json or .txt; FOLDER/ for a file each")
    formats = ["tsv", "csv", "map", "png", "npz", "json"]
    command.add_argument("--format", choices=formats, help="by the output's ending, else tsv")
    command.add_argument("--threshold", type=float, default=0.3, help="lowest probability listed (%(default)s)")
    command.add_argument("--min-separation", type=int, default=6, help="residues apart in the chain (%(default)s)")


_WILD_TYPE = "FASTA file with one sequence, or the sequence itself"


def _add_score(add: Add) -> None:
    command = add("score", "score:run", "score the variants of a CSV or TSV file")
    command.add_argument("wild_type", nargs="?", metavar="WILD_TYPE", help=_WILD_TYPE)
    table = "CSV, TSV, .xlsx or .parquet with a header, or -"
    command.add_argument("variants", nargs="?", metavar="VARIANTS", help=table)
    command.add_argument("-o", "--output", "--dms-output", help="file (stdout); the table and one column")
    _add_scoring(command, SCORING_METHODS)
    # fair-esm's names. Those that have a better one here, or no meaning, are not listed.
    command.add_argument("--sequence", metavar="WILD_TYPE", help="the same as WILD_TYPE (fair-esm's name)")
    command.add_argument("--dms-input", metavar="VARIANTS", help="the same as VARIANTS (fair-esm's name)")
    command.add_argument("--model-location", dest="weights", type=_named, help=argparse.SUPPRESS)
    command.add_argument("--nogpu", action="store_true", help=argparse.SUPPRESS)
    mutations = "column of mutations, such as A42G:V50L or p.Ala42Gly (mutant)"
    command.add_argument("--mutation-col", metavar="NAME", help=mutations)
    command.add_argument("--measured-col", metavar="NAME", help="column of measured values (DMS_score)")
    command.add_argument("--column", metavar="NAME", help="name of the new column (the method)")
    command.add_argument("--skip-invalid", action="store_true", help="leave rows that cannot be scored blank")


def _add_layers(add: Add) -> None:
    text = "find the layer whose embeddings predict a property best, by cross-validation"
    command = add("layers", "layers:run", text)
    command.add_argument("table", metavar="TABLE", help="CSV, TSV, .xlsx or .parquet with a header, or -")
    command.add_argument("--target", required=True, metavar="COLUMN", help="column to predict")
    task = "(regression if the column holds numbers)"
    command.add_argument("--task", choices=["regression", "classification"], help=task)
    command.add_argument("--sequence-column", default="sequence", metavar="COLUMN", help="(%(default)s)")
    command.add_argument("--folds", type=int, default=5, metavar="N", help="for cross-validation (%(default)s)")
    command.add_argument("-o", "--output", help="file: .tsv, .csv or .txt (stdout)")


def _add_scan(add: Add) -> None:
    command = add("scan", "scan:run", "score every substitution of a protein")
    command.add_argument("input", metavar="WILD_TYPE", help=_WILD_TYPE)
    output = ".csv, .tsv, .json or a folder (stdout); a heat map .png is written next to it"
    command.add_argument("-o", "--output", help=output)
    _add_scoring(command, SCAN_METHODS)
    command.add_argument("--heatmap", metavar="FILE", help="picture (next to the output)")
    command.add_argument("--no-heatmap", action="store_true", help="write the table only")


def _add_scoring(command: Command, methods: tuple[str, ...]) -> None:
    text = "how to score (%(default)s)"
    command.add_argument("--method", "--scoring-strategy", choices=methods, default=methods[0], help=text)
    text = "position of the wild type's first residue (%(default)s)"
    command.add_argument("--offset", "--offset-idx", type=int, default=1, help=text)
    text = "residues seen around each position (all), or proteingym: 1024 tokens, as ProteinGym cuts them"
    command.add_argument("--window", type=_window, metavar="N", help=text)


def _add_embed(add: Add) -> None:
    text = "embed any number of sequences into Parquet, HDF5 or a folder; resumes if interrupted"
    command = add("embed", "embed:run", text)
    _add_records(command)
    command.add_argument("-o", "--output", required=True, help="OUT.parquet, OUT.h5 or OUT_DIR/")
    _add_embeddings(command, None, "Parquet: mean bos, HDF5: mean per_token, folder: mean")
    command.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32", help="stored numbers (%(default)s)")
    text = "more than 2048 residues: reject the record, keep the first 2048, or average overlapping windows (error)"
    command.add_argument("--long", choices=["error", "truncate", "windows"], default="error", help=text)
    text = "least number of residues that neighbouring windows share (%(default)s)"
    command.add_argument("--overlap", type=int, default=512, metavar="N", help=text)
    command.add_argument("--tokens-per-batch", type=int, metavar="N", help="(depends on cores and free memory)")
    command.add_argument("--shard", metavar="I/N", help="only share I of N, for job arrays")
    command.add_argument("--strict", action="store_true", help="stop at the first record that cannot be embedded")
    command.add_argument("--engine", choices=["local", "ray"], default="local", help="(%(default)s)")
    command.add_argument("--address", help="of a running Ray cluster, or auto (default: start one here)")
    command.add_argument("--workers", type=int, metavar="N", help="Ray actors (all CPUs of the cluster)")
    command.add_argument("--json-progress", action="store_true", help="JSON lines on stderr")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--overwrite", action="store_true", help="replace an existing output")
    command.add_argument("--restart", action="store_true", help="discard what an interrupted run left")


def _add_serve(add: Add) -> None:
    command = add("serve", "serve:run", "run the HTTP service: the hosted ESM-2 API and a page, on your machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    command.add_argument("--port", type=int, default=8000, help="0 picks a free one (%(default)s)")
    many: dict[str, Any] = {"action": "append", "default": []}
    command.add_argument("--model", type=_model, metavar="SLUG=WEIGHTS", help="serve this model; repeatable", **many)
    text = "one key per line (besides NUMPYESM_API_KEYS)"
    command.add_argument("--api-keys-file", type=_named, metavar="FILE", help=text)
    text = "listen beyond this machine without keys: anyone may use the service"
    command.add_argument("--allow-no-auth", action="store_true", help=text)
    command.add_argument("--allow-host", metavar="NAME", help="another Host name to accept without keys", **many)
    command.add_argument("--trusted-proxy", metavar="IP", help="proxy whose X-Forwarded-For is trusted", **many)
    text = "of the whole process (80%% of the machine, at most 8G)"
    command.add_argument("--max-memory", type=_named, metavar="SIZE", help=text)
    for name, text in (("max_body", "of a body as sent"), ("max_decompressed", "of an unpacked body")):
        default = format_memory(getattr(Settings, name))
        command.add_argument(_option(name), default=default, metavar="SIZE", help=f"{text} (%(default)s)")
    for name, text in OPTIONS.items():
        default = getattr(Settings, name)
        kind = partial(_positive, type(default))
        command.add_argument(_option(name), type=kind, default=default, help=f"{text} (%(default)g)")


def _option(name: str) -> str:
    """Spell a name as an option: `--queue-size`."""
    return f"--{name.replace('_', '-')}"


# -- types of arguments: argparse exits with 2 and the message ----------------------------------------------------


def _named(text: str) -> str:
    """Refuse an empty name: an unset variable in a script must not become the default."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not an empty text (an unset variable?)")
    return text


def _positive(kind: type[int] | type[float], text: str) -> float:
    """Parse a number above 0."""
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0:
        number = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a {number} above 0")
    return value


def _window(text: str) -> int | str:
    """Parse a number of residues, or the name of ProteinGym's rule."""
    if text == "proteingym":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of residues, or proteingym") from None


def _model(text: str) -> tuple[str, str]:
    """Return (slug, weights) of `SLUG=WEIGHTS`, or of a name that is both."""
    slug, equals, weights = text.partition("=")
    if not slug or (equals and not weights):
        raise argparse.ArgumentTypeError(f"{text!r}: expected SLUG=WEIGHTS, neither of them empty (an unset variable?)")
    return slug, weights or slug
