"""Commands and their options. A command's module is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
import re
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
Argument: TypeAlias = Callable[..., argparse.Action]  # `add_argument` of a command
# Adds a command: its name, the function that runs it ("module:function", in this package), one line of help.
Add: TypeAlias = Callable[[str, str, str], Argument]


def build_parser() -> Command:
    """Build the parser of `numpyesm`; each command sets `run`: parsed arguments in, exit code out."""
    parser = argparse.ArgumentParser(prog="numpyesm", description="ESM-2 protein language models on NumPy alone.")
    parser.add_argument("--version", action="version", version=f"numpyesm {__version__}")
    add = partial(_add, parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    argument = add("demo", "demo:run", "try everything on a few real proteins")
    argument("-o", "--output", default="demo-output", help="folder for the results (%(default)s)")
    _add_weights_commands(add)
    _add_inference_commands(add)
    _add_scoring_commands(add)
    _add_serve(add)
    _add_embed(add)
    return parser


def _add(commands: argparse._SubParsersAction[Command], name: str, target: str, text: str) -> Argument:
    """Add a command with the options that all commands have."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    argument = command.add_argument
    argument("--weights", type=_named, help="model name, Hub id, file, folder, or synthetic[:name[:seed]] (esm2-35m)")
    add_arithmetic(command, _PRECISIONS.get(name, ""))
    if name != "serve":  # which has one of its own
        argument("--max-memory", metavar="SIZE", help="limit: 300M (or MiB: 2^20 bytes) or 300MB (10^6)")
    argument("--debug", action="store_true", help="full traceback on an error")
    module, _, function = target.partition(":")
    command.set_defaults(run=lambda arguments: getattr(import_module(f".{module}", __package__), function)(arguments))
    return argument


def add_arithmetic(command: Command, precision: str = "") -> None:
    """Add the options that say how to compute; `precision` is what that option means where its default is not fp32."""
    backends, shown = [*BACKENDS, *BACKEND_ALIASES], "{auto,numpy,compiled}"
    command.add_argument("--backend", choices=backends, metavar=shown, default="auto", help="(auto)")
    default = None if precision else "fp32"
    command.add_argument("--precision", choices=PRECISIONS, default=default, help=precision or "(fp32)")
    command.add_argument("--threads", type=int, help="worker threads (all CPUs)")


# Commands that do not compute in one precision, and what theirs is.
_PRECISIONS = {"warmup": "(all that the CPU has)", **dict.fromkeys(("fetch", "convert"), "stands in for --dtype")}


def _add_weights_commands(add: Add) -> None:
    storage: dict[str, Any] = {"choices": ["fp32", "fp16", "bf16", "int8"], "help": "storage (fp32)"}
    argument = add("fetch", "files:fetch", "download official weights from the Hugging Face Hub and convert them")
    argument("name", nargs="?", type=_named, help=f"{', '.join(PRESETS)} or a Hub id (esm2-35m)")
    argument("--revision", type=_named, help="commit, branch or tag (the official models are pinned)")
    argument("--dtype", **storage)
    argument("-o", "--output", type=_named, help="file or folder (the cache)")
    argument("--quiet", action="store_true", help="no progress bar")

    argument = add("convert", "files:convert", "convert a checkpoint to canonical safetensors, without torch")
    argument("source", type=_named, help="fair-esm .pt, Hugging Face folder or file, canonical file, or a name")
    argument("-o", "--output", type=_named, required=True, help="file.safetensors, or a folder")
    argument("--dtype", **storage)
    argument("--regression", type=_named, help="fair-esm's -contact-regression.pt, if it is not beside the checkpoint")
    argument("--layers", type=int, metavar="N", help="write the first N layers only, without heads")
    argument("--adapter", type=_named, help="folder or Hub id of a PEFT adapter (LoRA) to merge in")

    add("verify", "files:verify", "compare the weights with the published reference numbers")
    argument = add("warmup", "files:warmup", "compile kernels for this machine before they are first used")
    argument("--cache", type=_named, metavar="DIR", help="folder (the user's cache)")
    add("info", "files:info", "show what is installed, what the machine has, and which weights are found")


def _add_inference_commands(add: Add) -> None:
    argument = _add_inference(add, "encode", "compute embeddings, contacts, logits, attentions")
    _add_embeddings(argument, ["mean"], "mean")
    argument = _add_inference(add, "predict", "predict the residue at each <mask>")
    argument("--positions", choices=POSITIONS, help="rows of logits (masked in a table, else all)")
    _add_inference(add, "classify", "classify sequences or residues with a fine-tuned model")
    _add_inference(add, "log-prob", "compute the log-probability of each sequence, from one pass")

    argument = add("contacts", "contacts:run", "compute contact maps: text, pictures or numbers")
    _add_records(argument)
    argument("-o", "--output", help=".tsv, .csv, .png, .npz, .json or .txt; FOLDER/ for a file each")
    formats = ["tsv", "csv", "map", "png", "npz", "json"]
    argument("--format", choices=formats, help="by the output's ending, else tsv")
    argument("--threshold", type=_probability, metavar="P", help="lowest probability listed in tsv and csv (0.3)")
    whole = partial(_positive, int)
    argument("--min-separation", type=whole, metavar="N", help="residues apart in the chain, in tsv and csv (6)")


def _add_inference(add: Add, name: str, text: str) -> Argument:
    argument = add(name, f"inference:{name.replace('-', '_')}", text)
    _add_records(argument)
    argument("-o", "--output", help="file: .json, .npz, .csv, .tsv or .txt, also with .gz (stdout)")
    formats = "by the output's ending, else table on a terminal and json"
    argument("--format", choices=["json", "npz", "csv", "tsv", "table"], help=formats)
    return argument


def _add_records(argument: Argument, bare: str = ", or a bare sequence in upper case") -> None:
    """Add the options of commands that take any number of sequences."""
    records = f"FASTA file (plain or gzip), - for standard input{bare}"
    argument("input", nargs="+", metavar="INPUT", help=records)
    ids = "keep ids such as sp|P12345|NAME, or shorten them to P12345 (%(default)s)"
    argument("--ids", choices=IDS, default=IDS[0], help=ids)


def _add_embeddings(argument: Argument, default: list[str] | None, shown: str) -> None:
    """Add the options that say what to compute for each sequence."""
    argument("--layers", nargs="+", type=int, default=[-1], metavar="N", help="layers of embeddings (-1)")
    names, text = [*INCLUDES, "per_residue"], f"of {', '.join(INCLUDES)} ({shown})"
    argument("--include", nargs="+", default=default, choices=names, metavar="OUTPUT", help=text)


def _add_scoring_commands(add: Add) -> None:
    wild_type = "FASTA file with one sequence, or the sequence itself"
    argument = add("score", "mutations:score", "score the variants of a CSV or TSV file")
    argument("wild_type", nargs="?", metavar="WILD_TYPE", help=wild_type)
    argument("variants", nargs="?", metavar="VARIANTS", help="CSV, TSV, .xlsx or .parquet with a header, or -")
    argument("-o", "--output", "--dms-output", help="file (stdout); the table and one column")
    _add_scoring(argument, SCORING_METHODS)
    # fair-esm's names. Those that have a better one here, or no meaning, are not listed.
    argument("--sequence", metavar="WILD_TYPE", help="the same as WILD_TYPE (fair-esm's name)")
    argument("--dms-input", metavar="VARIANTS", help="the same as VARIANTS (fair-esm's name)")
    argument("--model-location", dest="weights", type=_named, help=argparse.SUPPRESS)
    argument("--nogpu", action="store_true", help=argparse.SUPPRESS)
    argument("--mutation-col", metavar="NAME", help="column of mutations, such as A42G:V50L or p.Ala42Gly (mutant)")
    argument("--measured-col", metavar="NAME", help="column of measured values (DMS_score)")
    argument("--column", type=_named, metavar="NAME", help="name of the new column (the method)")
    argument("--skip-invalid", action="store_true", help="leave rows that cannot be scored blank")

    argument = add("scan", "mutations:scan", "score every substitution of a protein")
    argument("input", metavar="WILD_TYPE", help=wild_type)
    argument("-o", "--output", help=".csv, .tsv, .json or a folder (stdout); a heat map .png is written next to it")
    _add_scoring(argument, SCAN_METHODS)
    argument("--heatmap", metavar="FILE", help="picture (next to the output)")
    argument("--no-heatmap", action="store_true", help="write the table only")

    text = "find the layer whose embeddings predict a property best, by cross-validation"
    argument = add("layers", "layers:run", text)
    argument("table", metavar="TABLE", help="CSV, TSV, .xlsx or .parquet with a header, or -")
    argument("--target", required=True, metavar="COLUMN", help="column to predict")
    argument("--task", choices=["regression", "classification"], help="(regression if the column holds numbers)")
    argument("--sequence-column", default="sequence", metavar="COLUMN", help="(%(default)s)")
    argument("--folds", type=int, default=5, metavar="N", help="for cross-validation (%(default)s)")
    argument("-o", "--output", help="file: .tsv, .csv or .txt (stdout)")


def _add_scoring(argument: Argument, methods: tuple[str, ...]) -> None:
    argument("--method", "--scoring-strategy", choices=methods, default=methods[0], help="how to score (%(default)s)")
    text = "position of the wild type's first residue (%(default)s)"
    argument("--offset", "--offset-idx", type=int, default=1, help=text)
    text = "residues seen around each position (all), or proteingym: 1024 tokens, as ProteinGym cuts them"
    argument("--window", type=_window, metavar="N", help=text)


def _add_embed(add: Add) -> None:
    text = "embed any number of sequences into Parquet, HDF5 or a folder; resumes if interrupted"
    argument = add("embed", "embed:run", text)
    _add_records(argument, bare="")
    argument("-o", "--output", required=True, help="OUT.parquet, OUT.h5 or OUT_DIR/")
    _add_embeddings(argument, None, "Parquet: mean bos, HDF5: mean per_token, folder: mean")
    argument("--dtype", choices=["fp32", "fp16"], default="fp32", help="stored numbers (%(default)s)")
    text = "more than 2048 residues: reject the record, keep the first 2048, or average overlapping windows (error)"
    argument("--long", choices=["error", "truncate", "windows"], default="error", help=text)
    text = "least number of residues that neighbouring windows share (512)"
    argument("--overlap", type=int, metavar="N", help=text)
    argument("--tokens-per-batch", type=int, metavar="N", help="(depends on cores and free memory)")
    argument("--shard", metavar="I/N", help="only share I of N, for job arrays")
    argument("--strict", action="store_true", help="stop at the first record that cannot be embedded")
    argument("--engine", choices=["local", "ray"], default="local", help="(%(default)s)")
    argument("--address", help="of a running Ray cluster, or auto (default: start one here)")
    argument("--workers", type=int, metavar="N", help="Ray actors (all CPUs of the cluster)")
    argument("--json-progress", action="store_true", help="JSON lines on stderr")
    argument("--quiet", action="store_true", help="no progress bar")
    argument("--overwrite", action="store_true", help="replace an existing output")
    argument("--restart", action="store_true", help="discard what an interrupted run left")


def _add_serve(add: Add) -> None:
    argument = add("serve", "serve:run", "run the HTTP service: the hosted ESM-2 API and a page, on your machine")
    argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    argument("--port", type=int, default=8000, help="0 picks a free one (%(default)s)")
    many: dict[str, Any] = {"action": "append", "default": []}
    argument("--model", type=_model, metavar="SLUG=WEIGHTS", help="serve this model; repeatable", **many)
    argument("--api-keys-file", type=_named, metavar="FILE", help="one key per line (besides NUMPYESM_API_KEYS)")
    text = "listen beyond this machine without keys: anyone may use the service"
    argument("--allow-no-auth", action="store_true", help=text)
    argument("--allow-host", type=_host, metavar="NAME", help="another Host name to accept without keys", **many)
    argument("--trusted-proxy", type=_proxy, metavar="IP", help="proxy whose X-Forwarded-For is trusted", **many)
    argument("--max-memory", type=_named, metavar="SIZE", help="of the whole process (80%% of the machine, at most 8G)")
    for name, text in (("max_body", "of a body as sent"), ("max_decompressed", "of an unpacked body")):
        default = format_memory(getattr(Settings, name))
        argument(_option(name), default=default, metavar="SIZE", help=f"{text} (%(default)s)")
    for name, text in OPTIONS.items():
        default = getattr(Settings, name)
        kind = partial(_positive, type(default))
        argument(_option(name), type=kind, default=default, help=f"{text} (%(default)g)")


def _option(name: str) -> str:
    """Spell a name as an option: `--queue-size`."""
    return f"--{name.replace('_', '-')}"


# -- types of arguments: argparse exits with 2 and the message ----------------------------------------------------


def _named(text: str) -> str:
    """Refuse an empty name: an unset variable in a script must not become the default."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not an empty text (an unset variable?)")
    return text


def _host(text: str) -> str:
    """Parse a name as a Host header has it, whose port does not count."""
    name = re.sub(r":\d+$", "", text.strip().lower()).removesuffix(".")
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one name of a host, such as esm.example.org")
    return name


def _proxy(text: str) -> str:
    """Parse an address or a network."""
    from ipaddress import ip_network

    try:
        ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an IP address or a network of them") from None
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


def _probability(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
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
