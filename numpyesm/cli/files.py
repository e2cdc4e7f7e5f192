"""`numpyesm fetch`, `convert`, `verify`, `info`: everything about weights files and the installation."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import numpy as np

from .._version import __version__
from ..config import PRESETS
from ..errors import InvalidOption, NumpyesmError, WeightsNotFound
from ..kernels import describe_kernels
from ..options import missing_head
from ..printable import printable
from ..threads import check_threads, default_threads
from ..verification import compare_with_reference
from ..weights import cache_dir, default_weights, find_local, open_weights, resolve
from ..weights.checkpoint import Checkpoint
from ..weights.hugging_face import adapter_file
from ..weights.load import open_checkpoint
from .inputs import load_model
from .outputs import table


def fetch(arguments: argparse.Namespace) -> int:
    """Download, verify and convert; print where the file is."""
    from ..weights.hub import fetch as fetch_weights

    path = fetch_weights(
        arguments.name or arguments.weights or "esm2-35m",
        revision=arguments.revision,
        dtype=arguments.dtype or arguments.precision or "fp32",
        output=arguments.output,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    print(path)
    if arguments.output:
        print(f"to use it, also on another machine: NUMPYESM_WEIGHTS={shlex.quote(str(path))}", file=sys.stderr)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Convert any checkpoint to one canonical file; print where it is."""
    from ..weights.conversion import convert as convert_weights
    from ..weights.hugging_face import adapter_file
    from ..weights.locate import resolve_base

    source = arguments.source if os.path.exists(arguments.source) else resolve(arguments.source)
    adapter = None if arguments.adapter is None else Path(resolve(arguments.adapter))
    if adapter_file(Path(source)) is not None:
        if adapter is not None:
            raise InvalidOption(f"{source} is itself an adapter, into which {adapter} cannot be merged: name a base")
        adapter, source = Path(source), resolve_base(Path(source))[1]
    made = convert_weights(
        source,
        arguments.output,
        dtype=arguments.dtype or arguments.precision or "fp32",
        regression=arguments.regression,
        layers=arguments.layers,
        adapter=adapter,
        name="" if os.path.exists(arguments.source) else arguments.source,
        progress=True,
    )
    checkpoint = made.checkpoint
    print(made.path)
    print(
        f"{checkpoint.config.name}, {checkpoint.num_parameters:,} parameters, {checkpoint.precision}, "
        f"{made.path.stat().st_size / 1e6:.1f} MB{_missing_heads(checkpoint)}",
        file=sys.stderr,
    )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Check the checksums in and next to the file, and the published numbers; return 1 if any differs."""
    path = resolve(arguments.weights or default_weights())
    if isinstance(path, Path) and adapter_file(path) is None:
        verified = open_checkpoint(path).checksums
        print(f"{path}: {verified or 'no'} checksum{'s'[: verified != 1]} verified", file=sys.stderr)
    model = load_model(arguments)
    comparisons = compare_with_reference(model)
    rows = [
        (c.sequence, c.output, f"{c.expected:.6g}", f"{c.found:.6g}", f"{c.deviation:.1e}", f"{c.tolerance:.0e}",
         "ok" if c.passed else "DIFFERS")
        for c in comparisons
    ]  # fmt: skip
    print(table(("sequence", "output", "expected", "found", "deviation", "allowed", ""), rows), end="")
    failed = sum(not c.passed for c in comparisons)
    if failed:
        why = "synthetic weights cannot reproduce them" if model.checkpoint.synthetic else "not the official weights"
        print(f"numpyesm: {failed} of {len(comparisons)} reference values differ: {why}", file=sys.stderr)
        return 1
    print(f"all {len(comparisons)} reference values are reproduced by {model!r}")
    return 0


def warmup(arguments: argparse.Namespace) -> int:
    """Compile kernels for this machine; print where they are."""
    from ..kernels.warmup import warmup as compile_kernels

    if arguments.backend == "numpy":
        print("nothing to compile: the numpy backend has no kernels")
        return 0
    print(compile_kernels([arguments.precision] if arguments.precision else None, cache_dir=arguments.cache))
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Print versions, the machine, and the weights that would be used."""
    threads = default_threads() if arguments.threads is None else check_threads(arguments.threads)
    rows: list[tuple[str, object]] = [
        ("numpyesm", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("numpy", np.__version__),
        *((name, _version(name)) for name in ("safetensors", "huggingface-hub", "numba", "matplotlib")),
        ("compiled kernels", describe_kernels()),
        ("threads", threads),
        ("cache", cache_dir()),
        ("NUMPYESM_WEIGHTS", os.environ.get("NUMPYESM_WEIGHTS", "not set")),
    ]
    for name in PRESETS:
        try:
            found = find_local(name) and resolve(name)  # which checks that it is this model
            rows.append((name, found or "not on this machine (numpyesm fetch)"))
        except NumpyesmError as error:
            rows.append((name, error))
    print(printable(table(("", ""), rows)).lstrip(), end="")
    try:
        spec = arguments.weights or default_weights()
        checkpoint = open_weights(spec, allow_download=False)
    except WeightsNotFound as error:
        if arguments.weights or "NUMPYESM_WEIGHTS" in os.environ:
            raise
        print(f"\nno weights to describe: {error}", file=sys.stderr)
        return 0
    config = checkpoint.config
    described: list[tuple[str, object]] = [
        ("weights", spec),
        ("model", f"{config.name}: {config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads"),
        ("parameters", f"{checkpoint.num_parameters:,} stored as {checkpoint.precision}{_missing_heads(checkpoint)}"),
        ("source", checkpoint.source + (" (SYNTHETIC: the numbers mean nothing)" if checkpoint.synthetic else "")),
        ("source sha256", checkpoint.source_sha256 or "none"),
    ]
    print("\n" + printable(table(("", ""), described)).lstrip(), end="")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _missing_heads(checkpoint: Checkpoint) -> str:
    missing = [head for name in ("logits", "contacts") if (head := missing_head(checkpoint, name))]
    return f" (no {' and no '.join(missing)})" if missing else ""
