"""A masked-marginal scan of one protein, all single mutants: numpyesm against fair-esm's own script.

    python -m bench.scan                       # TEM-1 beta-lactamase, 286 residues, esm2-35m
    python -m bench.scan --residues 60 --engines numpyesm-numba-fp32,fair-esm-fp32

fair-esm's side is the loop of its `examples/variant-prediction/predict.py` (`--scoring-strategy masked-marginals`):
one pass for each token of the sequence, ends included, of which it keeps one row of log-probabilities. Each engine runs
in a fresh process, in turn, on the same seeded random weights; loading, importing and one short warm-up do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .client import child_environment
from .engines import BY_NAME, OURS, REFERENCE, Environments, select
from .machine import machine_info
from .weights import make_weights, problem_of

Array = npt.NDArray[np.float64]

# TEM-1 beta-lactamase of Escherichia coli, UniProt P62593.
TEM_1 = (
    "MSIQHFRVALIPFFAAFCLPVFAHPETLVKVKDAEDQLGARVGYIELDLNSGKILESFRPEERFPMMSTFKVLLCGAVLSRIDAGQEQLGRRIHYSQNDLVEYSPVTEKHLTDG"
    "MTVRELCSAAITMSDNTAANLLLTTIGGPKELTAFLHNMGDHVTRLDRWEPELNEAIPNDERDTTMPVAMATTLRKLLTGELLTLASRQQLIDWMEADKVAGPLLRSALPAGW"
    "FIADKSGAGERGSRGIIAALGPDGKPSRIVVIYTTGSQATMDERNRQIAEIGASLIKHW"
)
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
ENGINES = ",".join(name for name, engine in BY_NAME.items() if engine.ours or name == REFERENCE)


def scan_with_numpyesm(path: Path, backend: str, precision: str, threads: int, sequence: str) -> tuple[float, Array]:
    """Seconds, and the scores (L, 20)."""
    from numpyesm import ESM2

    model = ESM2.from_pretrained(path, backend=backend, precision=precision, threads=threads)
    model.scan_mutations(sequence[:20])
    start = time.perf_counter()
    scan = model.scan_mutations(sequence)
    return time.perf_counter() - start, scan.scores


def scan_with_fair_esm(path: Path, threads: int, sequence: str) -> tuple[float, Array]:
    """The same of fair-esm's script."""
    from .adapters import FairEsm

    adapter = FairEsm(path, "fp32", threads)
    torch, model = adapter.torch, adapter.model
    alphabet = model.alphabet
    converter = alphabet.get_batch_converter()

    def log_probabilities(text: str) -> Any:
        _, _, tokens = converter([("protein1", text)])
        rows = []
        for i in range(tokens.size(1)):
            masked = tokens.clone()
            masked[0, i] = alphabet.mask_idx
            with torch.no_grad():
                rows.append(torch.log_softmax(model(masked)["logits"], dim=-1)[:, i])
        return torch.cat(rows, dim=0)[1:-1]

    log_probabilities(sequence[:20])
    start = time.perf_counter()
    found = log_probabilities(sequence).numpy()
    own = found[np.arange(len(sequence)), [alphabet.get_idx(letter) for letter in sequence]]
    scores = found[:, [alphabet.get_idx(letter) for letter in LETTERS]] - own[:, None]
    return time.perf_counter() - start, scores.astype(np.float64)


def run_engine(name: str, folder: Path, threads: int, sequence: str, output: Path) -> None:
    """Inside the engine's process."""
    engine = BY_NAME[name]
    path = folder / engine.file
    if engine.family == OURS:
        seconds, scores = scan_with_numpyesm(path, engine.backend, engine.precision, threads, sequence)
    else:
        seconds, scores = scan_with_fair_esm(path, threads, sequence)
    np.savez(output, seconds=seconds, scores=scores)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scan", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", default=ENGINES, help="(%(default)s)")
    parser.add_argument("--model", default="esm2-35m", help="(%(default)s)")
    parser.add_argument("--residues", type=int, default=len(TEM_1), help="of the protein's beginning (all)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=1, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    parser.add_argument("--inside", nargs=3, metavar=("ENGINE", "FOLDER", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sequence = TEM_1[: arguments.residues]
    if arguments.inside:
        name, folder, file = arguments.inside
        run_engine(name, Path(folder), arguments.threads, sequence, Path(file))
        return

    engines, environments = select(arguments.engines.split(",")), Environments.find()
    folder, problems = make_weights(arguments.model, 0, engines, environments)
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    scores: dict[str, Array] = {}
    missing: dict[str, str] = {engine.name: why for engine in engines if (why := problem_of(engine, problems))}
    for _ in range(arguments.repeats):
        for engine in engines:
            if engine.name in missing:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "scan.npz"
                options = ["--residues", str(arguments.residues), "--threads", str(arguments.threads)]
                inside = ["--inside", engine.name, str(folder), str(file)]
                done = subprocess.run(
                    [str(environments.python(engine)), "-m", "bench.scan", *options, *inside],
                    env=child_environment(arguments.threads),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    missing[engine.name] = (done.stderr.strip().splitlines() or ["failed"])[-1]
                    continue
                with np.load(file) as found:
                    seconds[engine.name].append(float(found["seconds"]))
                    scores[engine.name] = found["scores"]
                print(f"{engine.name}: {seconds[engine.name][-1]:.2f} s", file=sys.stderr, flush=True)

    report = {
        "model": arguments.model,
        "residues": len(sequence),
        "mutants": 19 * len(sequence),
        "threads": arguments.threads,
        "machine": machine_info(),
        "missing": missing,
        "engines": {name: _cell(name, runs, seconds, scores) for name, runs in seconds.items() if runs},
    }
    print(f"Masked-marginal scan, {len(sequence)} residues, {19 * len(sequence)} mutants, {arguments.model}")
    for name, cell in report["engines"].items():
        print(
            f"{name:22} {cell['median_seconds']:8.2f} s   {cell.get('speed_up', float('nan')):5.2f} × fair-esm   "
            f"largest difference {cell.get('largest_difference', float('nan')):.1e}"
        )
    for name, why in missing.items():
        print(f"{name:22} missing: {why}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def _cell(name: str, runs: list[float], seconds: dict[str, list[float]], scores: dict[str, Array]) -> dict[str, Any]:
    cell: dict[str, Any] = {"seconds": runs, "median_seconds": float(np.median(runs))}
    if seconds.get(REFERENCE):
        cell["speed_up"] = float(np.median(seconds[REFERENCE]) / np.median(runs))
        cell["largest_difference"] = float(np.abs(scores[name] - scores[REFERENCE]).max())
    return cell


if __name__ == "__main__":
    main()
