"""`python -m bench.bulk`: `numpyesm embed` against fair-esm's esm-extract and a plain onnxruntime script, in turn.

20,000 sequences of proteome-like lengths by default (hours); `--records 500 --model esm2-8m` is a quick look. All run
on the same random weights, each in a process of its own, start-up and weights included. `embed` writes mean and bos to
Parquet; `encode` computes the same and writes nothing; `ray` is `embed` on Ray, with a worker per thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import FairEsm, OnnxRuntime
from .client import run_python
from .engines import BY_NAME, CACHE, RESULTS, interpreters
from .report import table_of
from .weights import make_weights
from .workloads import AMINO_ACIDS, MAX_BATCH_TOKENS, pad, padded_batches, read_fasta, residues

# Of a log-normal: half of a proteome's proteins are shorter than 300 residues, one in a hundred is longer than 1500.
MEDIAN, SIGMA, SHORTEST, LONGEST = 300, 0.7, 30, 2000
RUNS = ("embed", "encode", "fair-esm", "onnxruntime", "ray")


def write_proteome(path: Path, count: int) -> int:
    """Write random sequences of proteome-like lengths, always the same. Returns their residues."""
    rng = random.Random(0)
    lengths = [int(min(LONGEST, max(SHORTEST, rng.lognormvariate(0, SIGMA) * MEDIAN))) for _ in range(count)]
    records = (f">P{i}\n{''.join(rng.choices(AMINO_ACIDS, k=length))}\n" for i, length in enumerate(lengths))
    path.write_text("".join(records))
    return sum(lengths)


# -- inside the processes: `python -m bench.bulk --inside NAME FASTA WEIGHTS THREADS OUTPUT` ------------------------


def encode(fasta: Path, weights: Path, threads: int, _: Path) -> None:
    """`ESM2.encode` alone, 64 sequences at a time: what writing and keeping a journal are measured by."""
    warnings.simplefilter("ignore")
    model = import_module("numpyesm").ESM2.from_pretrained(weights, threads=threads)
    sequences = list(read_fasta(fasta).values())
    for start in range(0, len(sequences), 64):
        model.encode(sequences[start : start + 64], include=["mean", "bos"])


def fair_esm(fasta: Path, weights: Path, threads: int, output: Path) -> None:
    """The body of fair-esm's scripts/extract.py with `--include mean bos`, for up to 2048 residues.

    The script itself is not in the package on PyPI, and loads its weights by a name that must be on the network.
    """
    torch, data = import_module("torch"), import_module("esm.data")
    adapter = FairEsm(weights, "fp32", threads, "")
    model, layer = adapter.model, adapter.last
    output.mkdir(parents=True, exist_ok=True)
    dataset = data.FastaBatchedDataset.from_file(str(fasta))
    batches = dataset.get_batch_indices(MAX_BATCH_TOKENS, extra_toks_per_seq=1)
    converter = model.alphabet.get_batch_converter(2048)
    with torch.no_grad():
        for labels, texts, tokens in torch.utils.data.DataLoader(dataset, collate_fn=converter, batch_sampler=batches):
            rows = model(tokens, repr_layers=[layer], return_contacts=False)["representations"][layer]
            for i, label in enumerate(labels):
                mean = rows[i, 1 : min(2048, len(texts[i])) + 1].mean(0).clone()
                result = {"label": label, "mean_representations": {layer: mean}}
                torch.save(result | {"bos_representations": {layer: rows[i, 0].clone()}}, output / f"{label}.pt")


def onnxruntime(fasta: Path, weights: Path, threads: int, output: Path) -> None:
    """A plain script: sorted by length, padded, pooled, one `.npz` at the end."""
    adapter = OnnxRuntime(weights, "fp32", threads, "")
    sequences = list(read_fasta(fasta).values())
    means: dict[int, Any] = {}
    firsts: dict[int, Any] = {}
    for indices in padded_batches(sequences):
        batch = [sequences[i] for i in indices]
        last, _ = adapter.forward(*pad(batch))
        for row, index in enumerate(indices):
            means[index], firsts[index] = residues(batch, row, last).mean(axis=0), last[row, 0].copy()
    order = range(len(sequences))
    np.savez(output.with_suffix(".npz"), mean=np.stack([means[i] for i in order]), bos=[firsts[i] for i in order])


INSIDE = {"encode": encode, "fair-esm": fair_esm, "onnxruntime": onnxruntime}

# A parent of its own reads what its children used: GNU time is not everywhere.
_WRAPPER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("USAGE", used.ru_maxrss, used.ru_utime + used.ru_stime, file=sys.stderr)
sys.exit(code)
"""


def timed(command: Sequence[str], threads: int) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a process and all that it starts; or its `error`."""
    start = time.perf_counter()
    done = run_python(Path(sys.executable), threads, "-c", _WRAPPER, *command)
    seconds = time.perf_counter() - start
    usage = re.search(r"USAGE (\d+) ([\d.]+)", done.stderr)
    if done.returncode or usage is None:
        return {"error": " ".join(done.stderr.split())[-400:]}
    return {"seconds": seconds, "cpu_seconds": float(usage[2]), "peak_mb": int(usage[1]) / 1024}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = []
    for name, run in report["runs"].items():
        figures = [report["residues"] / run["seconds"], *run.values()] if "seconds" in run else [run["error"]]
        rows.append([name, *(f"{value:,.0f}" if isinstance(value, float) else value for value in figures)])
    return (
        f"# Bulk embedding, {report['model']}, {report['threads']} threads\n"
        f"{report['records']:,} sequences, {report['residues']:,} residues, start-up included. Load average: "
        f"{report['load']:.1f}.\n\n" + table_of(["", "residues/s", "seconds", "processor seconds", "peak MB"], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=20_000, help="(%(default)s)")
    parser.add_argument("--model", default="esm2-35m", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(%(default)s)")
    parser.add_argument("--only", default=",".join(RUNS), help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bulk.json", help="(%(default)s)")
    parser.add_argument("--inside", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        name, fasta, weights, threads, output = options.inside
        INSIDE[name](Path(fasta), Path(weights), int(threads), Path(output))
        return
    pythons, threads = interpreters(), str(options.threads)
    peers = {"fair-esm": BY_NAME["fair-esm-fp32"], "onnxruntime": BY_NAME["onnxruntime-fp32"]}
    folder = make_weights(options.model, list(peers.values()), pythons["peers"], CACHE)
    weights = {name: str(folder / engine.file) for name, engine in peers.items()}
    ours = str(folder / "canonical.safetensors")
    (CACHE / "bulk").mkdir(exist_ok=True)
    fasta = CACHE / "bulk" / "proteome.fasta"
    total = write_proteome(fasta, options.records)
    embed = ["-m", "numpyesm", "embed", str(fasta), "--weights", ours, "--overwrite", "--restart"]
    ray = ["--engine", "ray", "--workers", threads, "--threads", "1"]
    runs = {}
    for name in options.only.split(","):
        output = str(CACHE / "bulk" / name)
        command = ["-m", "bench.bulk", "--inside", name, str(fasta), weights.get(name, ours), threads, output]
        if name not in INSIDE:
            command = [*embed, "-o", f"{output}.parquet", *(ray if name == "ray" else ["--threads", threads])]
        runs[name] = timed([str(pythons["peers" if name in peers else "own"]), *command], options.threads)
        print(f"{name}: {runs[name]}", file=sys.stderr, flush=True)
    sizes = {"records": options.records, "residues": total, "threads": options.threads}
    report = {"model": options.model, **sizes, "runs": runs, "load": os.getloadavg()[0]}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(report) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
