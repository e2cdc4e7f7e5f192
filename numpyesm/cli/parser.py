"""Commands and their options. A command's module is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from .._version import __version__
from ..fasta import IDS
from ..options import BACKEND_ALIASES, BACKENDS, INCLUDES, POSITIONS, SCAN_METHODS, SCORING_METHODS

_INPUT_HELP = "FASTA file (plain or gzip), - for standard input, or a bare sequence in upper case"
_WILD_TYPE_HELP = "FASTA file with one sequence, or the sequence itself"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `numpyesm`; each command sets `run`: parsed arguments in, exit code out."""
    parser = argparse.ArgumentParser(prog="numpyesm", description="ESM-2 protein language models on NumPy alone.")
    parser.add_argument("--version", action="version", version=f"numpyesm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add(commands, "demo", "demo", "try everything on a few real proteins")
    command.add_argument("-o", "--output", default="demo-output", help="folder for the results (%(default)s)")

    command = _add(
        commands, "fetch", "files:fetch", "download official weights from the Hugging Face Hub and convert them"
    )
    command.add_argument(
        "name", nargs="?", type=_named, help="esm2-8m, esm2-35m (default), esm2-150m, esm2-650m, or a Hub id"
    )
    command.add_argument("--revision", type=_named, help="commit, branch or tag (the official models are pinned)")
    command.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16", "int8"], default="fp32", help="storage (%(default)s)"
    )
    command.add_argument("-o", "--output", type=_named, help="file or folder (the cache by default)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = _add(commands, "convert", "files:convert", "convert a checkpoint to canonical safetensors, without torch")
    command.add_argument(
        "source", type=_named, help="fair-esm .pt, Hugging Face folder or file, canonical file, or a name"
    )
    command.add_argument("-o", "--output", type=_named, required=True, help="file.safetensors, or a folder")
    command.add_argument(
        "--dtype", choices=["fp32", "fp16", "bf16", "int8"], default="fp32", help="storage (%(default)s)"
    )
    command.add_argument(
        "--regression", type=_named, help="fair-esm's -contact-regression.pt, if it is not beside the checkpoint"
    )

    _add(commands, "verify", "files:verify", "compare the weights with the published reference numbers")
    command = _add(
        commands, "warmup", "files:warmup", "compile the compiled backend's kernels ahead of their first use"
    )
    command.add_argument("--cache", metavar="DIR", help="folder (NUMBA_CACHE_DIR, or the user's cache)")
    command.set_defaults(precision=None)

    _add(commands, "info", "files:info", "what is installed, what the machine has, which weights are found")

    command = _add_inference(commands, "encode", "inference:encode", "embeddings, contacts, logits, attentions")
    command.add_argument("--layers", nargs="+", type=int, default=[-1], metavar="N", help="layers of embeddings (-1)")
    command.add_argument(
        "--include",
        nargs="+",
        default=["mean"],
        choices=[*INCLUDES, "per_residue"],
        metavar="OUTPUT",
        help=f"of {', '.join(INCLUDES)} (mean)",
    )

    command = _add_inference(commands, "predict", "inference:predict", "what stands behind each <mask>")
    command.add_argument("--positions", choices=POSITIONS, default="all", help="rows of logits (%(default)s)")

    _add_inference(commands, "log-prob", "inference:log_prob", "log-probability of each sequence, from one pass")

    command = _add(commands, "contacts", "contacts", "contact map as text, picture or numbers")
    command.add_argument("input", nargs="+", metavar="INPUT", help=_INPUT_HELP)
    command.add_argument("-o", "--output", help=".tsv, .csv, .png, .npz, .json or .txt; FOLDER/ for a file each")
    command.add_argument(
        "--format", choices=["tsv", "csv", "map", "png", "npz", "json"], help="by the output's ending, else tsv"
    )
    _add_ids(command)
    command.add_argument("--threshold", type=float, default=0.3, help="least probability in the list (%(default)s)")
    command.add_argument("--min-separation", type=int, default=6, help="least distance along the chain (%(default)s)")

    command = _add_scoring(commands, "score", "score", "score the variants of a CSV or TSV file", SCORING_METHODS)
    command.add_argument("wild_type", nargs="?", metavar="WILD_TYPE", help=_WILD_TYPE_HELP)
    command.add_argument(
        "variants", nargs="?", metavar="VARIANTS", help="CSV, TSV, .xlsx or .parquet with a header, or -"
    )
    command.add_argument("--sequence", metavar="WILD_TYPE", help="the same as WILD_TYPE (fair-esm's name)")
    command.add_argument("--dms-input", metavar="VARIANTS", help="the same as VARIANTS (fair-esm's name)")
    command.add_argument("-o", "--output", "--dms-output", help="file (stdout by default); the table and one column")
    command.add_argument(
        "--model-location", dest="weights", type=_named, help=argparse.SUPPRESS
    )  # fair-esm's name of --weights
    command.add_argument("--nogpu", action="store_true", help=argparse.SUPPRESS)  # accepted: there is none
    command.add_argument(
        "--mutation-col", metavar="NAME", help="column of mutations as A42G:V50L or p.Ala42Gly (mutant)"
    )
    command.add_argument("--measured-col", metavar="NAME", help="column of measured values (DMS_score)")
    command.add_argument("--column", metavar="NAME", help="name of the new column (the method)")
    command.add_argument("--skip-invalid", action="store_true", help="leave rows that cannot be scored blank")

    command = _add_scoring(commands, "scan", "scan", "score every substitution of a protein", SCAN_METHODS)
    command.add_argument("input", metavar="WILD_TYPE", help=_WILD_TYPE_HELP)
    command.add_argument(
        "-o", "--output", help=".csv, .tsv, .json or a folder (stdout by default); with it, a heat map .png beside it"
    )
    command.add_argument("--heatmap", metavar="FILE", help="picture (beside the output by default)")
    command.add_argument("--no-heatmap", action="store_true", help="the table alone")

    command = _add(commands, "serve", "serve", "the HTTP service: the hosted ESM-2 API and a page, on your machine")
    _add_serve_options(command)
    _add_embed(commands)
    return parser


def _add_embed(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = _add(
        commands,
        "embed",
        "embed",
        "embed any number of sequences into Parquet, HDF5 or a folder; goes on if interrupted",
    )
    command.add_argument(
        "input", nargs="+", metavar="INPUT", help="FASTA file (plain or gzip), or - for standard input"
    )
    command.add_argument("-o", "--output", required=True, help="OUT.parquet, OUT.h5 or OUT_DIR/")
    command.add_argument("--layers", nargs="+", type=int, default=[-1], metavar="N", help="layers of embeddings (-1)")
    command.add_argument(
        "--include",
        nargs="+",
        choices=[*INCLUDES, "per_residue"],
        metavar="OUTPUT",
        help=f"of {', '.join(INCLUDES)} (Parquet: mean bos, HDF5: mean per_token, folder: mean)",
    )
    command.add_argument(
        "--dtype", choices=["fp32", "fp16"], default="fp32", help="of the stored numbers (%(default)s)"
    )
    command.add_argument(
        "--long",
        choices=["error", "truncate", "windows"],
        default="error",
        help="more than 2048 residues: reject the record, take the first 2048, or average overlapping windows (error)",
    )
    command.add_argument(
        "--overlap", type=int, default=512, metavar="N", help="residues that windows share at least (%(default)s)"
    )
    command.add_argument("--tokens-per-batch", type=int, metavar="N", help="(from cores and free memory)")
    _add_ids(command)
    command.add_argument("--shard", metavar="I/N", help="only share I of N, for job arrays")
    command.add_argument("--strict", action="store_true", help="stop at the first record that cannot be embedded")
    command.add_argument("--engine", choices=["local", "ray"], default="local", help="(%(default)s)")
    command.add_argument("--address", help="of a running Ray cluster, such as auto (one on this machine is started)")
    command.add_argument("--workers", type=int, metavar="N", help="Ray actors (all CPUs of the cluster)")
    command.add_argument("--json-progress", action="store_true", help="JSON lines on stderr")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.add_argument("--overwrite", action="store_true", help="replace an output that is there already")
    command.add_argument("--restart", action="store_true", help="forget what an interrupted run left")


def _add_ids(command: argparse.ArgumentParser) -> None:
    command.add_argument("--ids", choices=IDS, default=IDS[0], help="call sp|P12345|NAME so, or P12345 (%(default)s)")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, target: str, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument(
        "--weights", type=_named, help="model name, Hub id, file, folder, or synthetic[:name[:seed]] (esm2-35m)"
    )
    command.add_argument(
        "--backend",
        choices=[*BACKENDS, *BACKEND_ALIASES],
        metavar="{auto,numpy,compiled}",
        default="auto",
        help="(auto)",
    )
    default = "%(default)s" if name != "warmup" else "all that the CPU has"
    command.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32", help=f"({default})")
    command.add_argument("--threads", type=int, help="worker threads (all CPUs)")
    if name != "serve":  # which has one of its own
        command.add_argument(
            "--max-memory", metavar="SIZE", help="stay below 300M (or MiB: 2^20 bytes) or 300MB (10^6)"
        )
    command.add_argument("--debug", action="store_true", help="full traceback on an error")
    module, _, function = target.partition(":")

    def run(arguments: argparse.Namespace) -> int:
        loaded = import_module(f".{module}", __package__)
        code: int = getattr(loaded, function or "run")(arguments)
        return code

    command.set_defaults(run=run)
    return command


def _add_scoring(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    target: str,
    text: str,
    methods: Sequence[str],
) -> argparse.ArgumentParser:
    command = _add(commands, name, target, text)
    command.add_argument(
        "--method", "--scoring-strategy", choices=methods, default=methods[0], help="how to score (%(default)s)"
    )
    command.add_argument(
        "--offset", "--offset-idx", type=int, default=1, help="position of the wild type's first residue (%(default)s)"
    )
    command.add_argument(
        "--window",
        type=_window,
        metavar="N",
        help="residues seen around each position (the whole), or proteingym: 1024 tokens, as ProteinGym cuts them",
    )
    return command


def _add_inference(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, target: str, text: str
) -> argparse.ArgumentParser:
    command = _add(commands, name, target, text)
    command.add_argument("input", nargs="+", metavar="INPUT", help=_INPUT_HELP)
    command.add_argument("-o", "--output", help="file: .json, .npz, .csv, .tsv or .txt, also .gz (stdout by default)")
    command.add_argument(
        "--format",
        choices=["json", "npz", "csv", "tsv", "table"],
        help="by the output's ending, else table on a terminal and json",
    )
    _add_ids(command)
    return command


def _add_serve_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    command.add_argument(
        "--model",
        type=_model,
        action="append",
        default=[],
        metavar="SLUG=WEIGHTS",
        help="a model to serve; may be repeated",
    )
    command.add_argument(
        "--api-keys-file", type=_named, metavar="FILE", help="one key a line (NUMPYESM_API_KEYS holds more)"
    )
    command.add_argument(
        "--allow-no-auth", action="store_true", help="listen beyond this machine without keys: everybody may use it"
    )
    command.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further Host name for a keyless service"
    )
    command.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="IP", help="whose X-Forwarded-For is believed"
    )
    command.add_argument("--queue-size", type=int, default=512, help="requests that may wait (%(default)s)")
    command.add_argument("--deadline", type=float, default=300, help="seconds for a request (%(default)s)")
    command.add_argument(
        "--max-memory", type=_named, metavar="SIZE", help="of the whole process (80%% of the machine, at most 8G)"
    )
    command.add_argument("--max-body", default="1M", metavar="SIZE", help="of a body as sent (%(default)s)")
    command.add_argument("--max-decompressed", default="2M", metavar="SIZE", help="of a body unpacked (%(default)s)")
    command.add_argument("--max-connections", type=int, default=1000, help="open at a time (%(default)s)")
    command.add_argument("--head-timeout", type=float, default=10, help="seconds for the headers (%(default)s)")
    command.add_argument("--body-timeout", type=float, default=30, help="seconds for the body (%(default)s)")
    command.add_argument(
        "--write-timeout",
        type=float,
        default=60,
        help="seconds to take a piece of an answer (%(default)s)",
    )
    command.add_argument("--grace", type=float, default=30, help="seconds to finish after SIGTERM (%(default)s)")


def _named(text: str) -> str:
    """A name that is not empty: an unset variable in a script must not become the default."""
    if not text:
        raise argparse.ArgumentTypeError("expected a name, not an empty text (an unset variable?)")
    return text


def _window(text: str) -> int | str:
    """A number of residues, or the name of ProteinGym's rule."""
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
