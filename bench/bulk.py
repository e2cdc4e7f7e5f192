"""Bulk embedding: `numpyesm embed`, fair-esm's esm-extract and a plain onnxruntime script, in turn.

`python -m bench.bulk` takes 20,000 sequences of proteome-like lengths; `--records 500 --model esm2-8m` is a quick look.
All engines run on the same random weights, each in a process of its own, start and weights included. Written to
`bench/results/bulk.json` and `bulk.md`:

- numpyesm embed (Parquet, mean and bos), its residues a second, and what `ESM2.encode` alone reaches on the same
  sequences in batches of the same size;
- fair-esm: the body of its scripts/extract.py (`esm-extract --toks_per_batch 4096 --include mean bos`), which writes
  one `.pt` a sequence (see `bulk_peers`);
- onnxruntime: sorted by length, padded, at most 4096 tokens a batch, mean and bos into one `.npz`;
- peak memory of `numpyesm embed` at several numbers of records;
- the Ray engine with one worker of all threads and with two workers that share them, against the local engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engines import CACHE, ROOT, Environments, select
from .weights import make_weights
from .workloads import AMINO_ACIDS

RESULTS = Path(__file__).parent / "results"
# Of a log-normal: half of a proteome's proteins are shorter than 300 residues, one in a hundred is longer than 1500.
MEDIAN, SIGMA, SHORTEST, LONGEST = 300, 0.7, 30, 2000


def proteome(count: int, seed: int = 0) -> list[str]:
    """Random sequences of proteome-like lengths, always the same."""
    rng = random.Random(seed)
    lengths = (int(min(LONGEST, max(SHORTEST, rng.lognormvariate(0, SIGMA) * MEDIAN))) for _ in range(count))
    return ["".join(rng.choices(AMINO_ACIDS, k=length)) for length in lengths]


def write_fasta(path: Path, sequences: Sequence[str]) -> Path:
    """Records `P0`, `P1`, …"""
    path.write_text("".join(f">P{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


def timed(name: str, command: Sequence[str], threads: int) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a process and all that it starts."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMPYESM_THREADS": str(threads)}
    start = time.perf_counter()
    # GNU time is not everywhere: a small parent of its own reads the children's usage.
    wrapper = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "r = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print('USAGE', r.ru_maxrss, r.ru_utime + r.ru_stime, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", wrapper, *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    usage = re.search(r"USAGE (\d+) ([\d.]+)", done.stderr)
    if done.returncode or usage is None:
        return {"name": name, "error": " ".join(done.stderr.split())[-400:]}
    print(f"  {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    # What a peer prints, or the last event of our own command: seconds without the start of the process.
    lines = [line for line in (done.stdout + done.stderr).splitlines() if '"seconds": ' in line or "inner" in line]
    said = json.loads(lines[-1])
    inner = {"inner_seconds": said.get("inner_seconds", said.get("seconds"))}
    return {
        "name": name,
        "seconds": seconds,
        "cpu_seconds": float(usage[2]),
        "peak_mb": int(usage[1]) / 1024,
        **inner,
    }


def embed_command(python: Path, fasta: Path, output: Path, weights: Path, threads: int, *more: str) -> list[str]:
    """The command line that is measured."""
    return [
        *(str(python), "-W", "ignore", "-m", "numpyesm", "embed", str(fasta), "-o", str(output)),
        *("--weights", str(weights), "--threads", str(threads), "--overwrite", "--restart", "--json-progress", *more),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--memory-records", type=int, nargs="*", help="(1,000 and all)")
    parser.add_argument("--model", default="esm2-35m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--skip", default="", help="of encode,fair-esm,onnxruntime,memory,ray")
    parser.add_argument("--peer-records", type=int, help="fewer records for the peers, from the same distribution")
    parser.add_argument("--python", type=Path, help="interpreter of all engines (the benchmark's environments)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bulk.json")
    arguments = parser.parse_args()
    skip = set(filter(None, arguments.skip.split(",")))
    environments = Environments.find(arguments.python, arguments.python)
    engines = select(["numpyesm", *sorted({"fair-esm", "onnxruntime"} - skip)])
    weights, problems = make_weights(arguments.model, 0, engines, environments)
    work = CACHE / "bulk"
    work.mkdir(parents=True, exist_ok=True)
    sequences = proteome(arguments.records)
    peer_sequences = sequences[: arguments.peer_records] if arguments.peer_records else sequences
    fasta = write_fasta(work / "proteome.fasta", sequences)
    peer_fasta = write_fasta(work / "peers.fasta", peer_sequences)
    ours = weights / "canonical.safetensors"
    python, threads = Path(sys.executable), arguments.threads
    everything, peers = sum(map(len, sequences)), sum(map(len, peer_sequences))

    plan: list[tuple[str, list[str], int]] = [
        ("numpyesm embed", embed_command(python, fasta, work / "out.parquet", ours, threads), everything)
    ]
    script = [str(environments.peers), "-m", "bench.bulk_peers"]
    if "encode" not in skip:
        command = [str(python), *script[1:], "encode", str(fasta), str(ours), str(threads)]
        plan.append(("ESM2.encode alone", command, everything))
    for name, file in (("fair-esm", "fair-esm.pt"), ("onnxruntime", "model.onnx")):
        if name not in skip:
            command = [*script, name, str(peer_fasta), str(weights / file), str(threads), str(work / name)]
            plan.append((name, command, peers))
    if "ray" not in skip:
        for workers in (1, 2):
            each = max(1, threads // workers)
            ray = ["--engine", "ray", "--workers", str(workers)]
            command = embed_command(python, fasta, work / f"ray{workers}.parquet", ours, each, *ray)
            plan.append((f"numpyesm embed on Ray, {workers} × {each} threads", command, everything))

    runs: list[dict[str, Any]] = []
    for repeat in range(arguments.repeats):
        turn = repeat % len(plan)
        for name, command, residues in plan[turn:] + plan[:turn]:
            result = timed(name, command, threads)
            if "seconds" in result:
                result["residues_per_second"] = residues / result.get("inner_seconds", result["seconds"])
                result["residues_per_second_with_start"] = residues / result["seconds"]
            runs.append(result | {"residues": residues, "repeat": repeat})
    memory = {}
    if "memory" not in skip:
        for count in arguments.memory_records or sorted({min(1000, arguments.records), arguments.records}):
            few = write_fasta(work / "few.fasta", sequences[:count])
            command = embed_command(python, few, work / "few.parquet", ours, threads)
            result = timed(f"memory, {count} records", command, threads)
            memory[count] = result.get("peak_mb")
    report = {
        "records": arguments.records,
        "residues": everything,
        "peer_records": len(peer_sequences),
        "model": arguments.model,
        "threads": threads,
        "problems": problems,
        "runs": runs,
        "peak_mb": memory,
        "load": os.getloadavg(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    page = markdown(report)
    arguments.output.with_suffix(".md").write_text(page)
    print(page)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# Bulk embedding, {report['model']}, {report['threads']} threads",
        f"{report['records']:,} sequences, {report['residues']:,} residues; peers {report['peer_records']:,} records. "
        f"Load average at the end: {report['load'][0]:.1f}.",
        "",
        "| | residues/s | with start-up | seconds | processor seconds | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(run["name"] for run in report["runs"]):
        runs = [run for run in report["runs"] if run["name"] == name]
        good = sorted((run for run in runs if "seconds" in run), key=lambda run: run["seconds"])
        if not good:
            lines.append(f"| {name} | failed: {runs[0]['error'][-200:]} | | | | |")
            continue
        run = good[len(good) // 2]
        lines.append(
            f"| {name} | {run['residues_per_second']:,.0f} | {run['residues_per_second_with_start']:,.0f} | "
            f"{run['seconds']:.1f} | {run['cpu_seconds']:.1f} | {run['peak_mb']:.0f} |"
        )
    memory = ", ".join(f"{count} records: {peak and round(peak)} MB" for count, peak in report["peak_mb"].items())
    return "\n".join(lines) + (f"\n\nPeak memory of numpyesm embed: {memory}.\n" if memory else "\n")


if __name__ == "__main__":
    main()
