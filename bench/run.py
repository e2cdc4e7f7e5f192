"""One run of the benchmark, from weights to a dictionary that `report` understands."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import accuracy, peaks, processes, workloads
from .client import Bench, EngineFailed, Worker
from .engines import CACHE, REFERENCE, ROOT, Engine
from .measure import Limits, Rounds
from .weights import TRAINED, make_weights

PARTS = ("timings", "growth", "contacts", "scan", "cold", "import", "accuracy", "peaks")
_GROWING = ("fair-esm", "onnxruntime", "openvino")
_FLAGS = "avx2 fma avx512f avx512_bf16 avx512_vnni avx_vnni amx_bf16 amx_int8 asimd bf16 i8mm"


@dataclass(frozen=True)
class Plan:
    """What one run measures. `repeats` is of whole processes: contact maps, scans, cold starts."""

    mode: str
    engines: list[Engine]
    names: tuple[str, ...]
    threads: int
    limits: Limits
    parts: tuple[str, ...]
    repeats: int = 1
    growth: tuple[str, ...] = ()  # workloads of which single and several threads are compared
    model: str = "esm2-35m"
    contact_lengths: tuple[int, ...] = workloads.CONTACT_LENGTHS
    scan_residues: int = 286
    cache: Path = CACHE


def run(plan: Plan, pythons: dict[str, Path]) -> dict[str, Any]:
    """Measure everything in the plan."""
    began = time.monotonic()
    say(f"weights: {plan.model}")
    folder = make_weights(plan.model, plan.engines, pythons["peers"], plan.cache)
    bench = Bench(pythons, folder, plan.threads)
    config = json.loads((folder / "config.json").read_text())
    batches = {name: workloads.sequences(name) for name in plan.names}
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mode": plan.mode,
        "model": plan.model,
        "threads": plan.threads,
        "machine": machine_info(),
        "workloads": {name: {"gflops": workloads.flops(batch, config) / 1e9} for name, batch in batches.items()},
    }
    say("engines")
    workers, result["engines"] = _start(bench, plan.engines)
    able = [engine for engine in plan.engines if engine.name in workers]
    try:
        if "timings" in plan.parts:
            say(f"{len(workers)} engines, {', '.join(batches)}")
            rounds = Rounds(workers, batches, plan.limits, {engine.name for engine in able if engine.ours})
            result["timings"] = rounds.run()
            result["other_load"] = rounds.other_load
            for name, reason in rounds.failed.items():
                result["engines"][name] |= {"status": "failed", "reason": reason}
    finally:
        for worker in workers.values():
            worker.close()
    if "growth" in plan.parts and plan.growth:
        counts = sorted({1, plan.threads})
        result["growth"] = {str(count): _growth(plan, replace(bench, threads=count), able) for count in counts}
    result["processes"] = _processes(plan, bench, able)
    if "import" in plan.parts:
        result["import"] = processes.import_cost(pythons["own"], 15 * plan.repeats)
    if "accuracy" in plan.parts:
        say("accuracy on trained weights")
        result["accuracy"] = _accuracy(plan, pythons, able)
    if "peaks" in plan.parts:
        say("the machine's peak")
        result["peaks"] = peaks.machine_peaks(pythons["own"], plan.threads)
    result["minutes"] = (time.monotonic() - began) / 60
    return result


def _growth(plan: Plan, bench: Bench, able: list[Engine]) -> dict[str, Any]:
    """Seconds by length and batch of numpyesm, fair-esm and the fast C++ engines: `{engine: {workload: cell}}`."""
    say(f"growth, {bench.threads} thread(s)")
    with ExitStack() as stack:
        chosen = [engine for engine in able if engine.ours or engine.family in _GROWING]
        workers = {engine.name: stack.enter_context(bench.opened(engine)) for engine in chosen}
        batches = {name: workloads.sequences(name) for name in plan.growth}
        return Rounds(workers, batches, replace(plan.limits, repeats=3, cell_seconds=3)).run()


def _processes(plan: Plan, bench: Bench, able: list[Engine]) -> dict[str, processes.Cells]:
    """What takes fresh processes: `{title: {engine: cell}}`."""
    able_to_map = [engine for engine in able if engine.ours or engine.name == REFERENCE]
    found = {}
    for length in plan.contact_lengths if "contacts" in plan.parts else ():
        say(f"contact map of {length} residues")
        sequence = workloads.random_sequence(length, 1)
        cells = processes.in_fresh_processes(bench, able_to_map, "contacts", sequence, plan.repeats)
        found[f"contacts of {length}"] = cells
    if "scan" in plan.parts:
        say("masked-marginal scan")
        protein = workloads.read_fasta(workloads.REAL_PROTEINS)["TEM-1"][: plan.scan_residues]
        cells = processes.in_fresh_processes(bench, able_to_map, "scan", protein, 1)
        found[f"scan of {len(protein)}"] = cells
    if "cold" in plan.parts:
        say("cold start")
        found["cold start"] = processes.cold_start(bench, able, 3 * plan.repeats)
    return found


def _start(bench: Bench, engines: Sequence[Engine]) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """Start the engines and compare their outputs; only those that agree stay.

    Returns
    -------
    workers : dict of str to Worker
    report : dict of str to dict
        Of each engine: `status` is `ok`, `missing` or `disagrees`, with `reason`, `versions` and `agreement`.
    """
    workers: dict[str, Worker] = {}
    outputs: dict[str, accuracy.Outputs] = {}
    report: dict[str, dict[str, Any]] = {}
    for engine in engines:
        report[engine.name] = {"family": engine.family, "backend": engine.backend, "precision": engine.precision}
        worker = bench.start(engine)
        try:
            report[engine.name] |= worker.ask(**bench.load_request(engine))
            outputs[engine.name] = worker.outputs(workloads.check_sequences())
            workers[engine.name] = worker
        except EngineFailed as failure:
            worker.close()
            report[engine.name] |= {"status": "missing", "reason": str(failure)}
    reference = min(outputs, key=lambda name: (name != REFERENCE, not name.endswith("fp32")), default="")
    for engine in engines:
        entry = report[engine.name]
        if engine.name in outputs:
            verdict = accuracy.compare(outputs[engine.name], outputs[reference], engine.precision)
            entry |= {"status": "ok", "agreement": verdict | {"reference": reference}}
            if not verdict["agrees"]:
                entry |= {"status": "disagrees", "reason": f"{verdict['reason']} ({reference})"}
                workers.pop(engine.name).close()
        if entry["status"] != "ok":
            say(f"{engine.name} {entry['status']}: {entry['reason']}")
    return workers, report


def _accuracy(plan: Plan, pythons: dict[str, Path], able: list[Engine]) -> dict[str, Any]:
    """Every engine on the trained trunk; nothing where that cannot be had."""
    try:
        folder = make_weights(TRAINED, able, pythons["peers"], plan.cache)
    except FileNotFoundError as error:
        say(f"not measured: {error}")
        return {}
    return accuracy.measure_accuracy(Bench(pythons, folder, plan.threads), able)


def machine_info() -> dict[str, Any]:
    """Processor, system, and the commit that was measured, with `+` if files differ from it."""
    fields: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        lines = info.read_text().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    command = ["git", "describe", "--always", "--dirty=+"]
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": [flag for flag in _FLAGS.split() if flag in flags],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip(),
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
