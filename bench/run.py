"""One run of the benchmark, from weights to a dictionary that `report` understands."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import agreement, fresh, peaks, workloads
from .client import EngineFailed, Worker, start_all
from .engines import CACHE, REFERENCE, Engine, Environments
from .machine import machine_info
from .measure import Limits, Rounds, mean_other_load
from .weights import make_weights, problem_of

SCHEMA = 1

# Growth is followed for the reference, for us, and for the engines that were fastest when this was written.
GROWTH_FAMILIES = ("numpyesm", "fair-esm", "openvino")


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    Attributes
    ----------
    mode : str
        `quick` or `full`, for the report.
    engines : list of Engine
    names : tuple of str
        Workloads.
    threads : int
    limits : Limits
    contact_lengths : tuple of int
    contact_repeats, cold_repeats, import_repeats : int
        0 leaves the part out.
    growth : bool
    peaks : bool
    model : str
        A preset of numpyesm.
    seed : int
    sabotage : str or None
        An engine whose outputs get noise, to see that the comparison notices.
    """

    mode: str
    engines: list[Engine]
    names: tuple[str, ...]
    threads: int
    limits: Limits
    contact_lengths: tuple[int, ...] = workloads.CONTACT_LENGTHS
    contact_repeats: int = 1
    cold_repeats: int = 3
    import_repeats: int = 15
    growth: bool = False
    peaks: bool = True
    model: str = "esm2-35m"
    seed: int = 0
    sabotage: str | None = None
    cache: Path = field(default=CACHE)


def run(plan: Plan, environments: Environments) -> dict[str, Any]:
    """Measure everything that the plan asks for."""
    began = time.monotonic()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mode": plan.mode,
        "model": plan.model,
        "threads": plan.threads,
        "repeats": plan.limits.repeats,
        "machine": machine_info(),
    }
    say(f"weights: {plan.model}, seed {plan.seed}")
    folder, problems = make_weights(plan.model, plan.seed, plan.engines, environments, plan.cache)
    result["exports"] = problems
    config = json.loads((folder / "config.json").read_text())
    batches = {name: workloads.sequences(name) for name in plan.names}
    result["workloads"] = {
        name: {
            "sequences": len(batch),
            "residues": sum(map(len, batch)),
            "gflops": workloads.flops(batch, config) / 1e9,
        }
        for name, batch in batches.items()
    }
    first_peaks: dict[str, dict[str, Any]] = {}
    if plan.peaks:
        say("the machine's peak")
        first_peaks = peaks.machine_peaks(environments.own, plan.threads)

    say("engines")
    workers, result["engines"] = _start(plan, environments, folder, plan.engines, plan.threads, problems)
    try:
        able = [engine for engine in plan.engines if engine.name in workers]
        rounds = Rounds(workers, batches, plan.limits, _variants(able), _always(able))
        say(f"{len(workers)} engines, {', '.join(batches)}")
        result["timings"] = rounds.run()
        for name, reason in rounds.failed.items():
            result["engines"][name] |= {"status": "failed", "reason": reason}
        result["other_load"] = mean_other_load(result["timings"])
        if plan.growth:
            result["growth"] = _growth(plan, environments, folder, able, workers)
    finally:
        for worker in workers.values():
            worker.close()

    if plan.contact_repeats and plan.contact_lengths:
        say("contact maps")
        mappers = [engine for engine in able if engine.ours or engine.name == REFERENCE]
        result["contacts"] = fresh.contact_maps(
            mappers, environments, folder, plan.threads, plan.contact_lengths, plan.contact_repeats
        )
    if plan.cold_repeats:
        say("cold start")
        result["cold_start"] = fresh.cold_start(able, environments, folder, plan.threads, plan.cold_repeats)
    if plan.import_repeats:
        result["import"] = fresh.import_cost(environments.own, plan.import_repeats)
    if plan.peaks:
        result["peaks"] = peaks.best_of(first_peaks, peaks.machine_peaks(environments.own, plan.threads))
    result["minutes"] = (time.monotonic() - began) / 60
    return result


def _start(
    plan: Plan,
    environments: Environments,
    folder: Path,
    engines: list[Engine],
    threads: int,
    problems: dict[str, str],
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """Start the engines and compare their outputs; only those that agree stay.

    Returns
    -------
    workers : dict of str to Worker
    report : dict of str to dict
        Of every engine: `status` is `ok`, `missing` or `disagrees`, with `reason`, `versions` and `agreement`.
    """

    def start(engine: Engine) -> Worker:
        return Worker(engine, environments.python(engine), threads, plan.cache / "logs" / f"{engine.name}.log")

    unmade = {engine.name: reason for engine in engines if (reason := problem_of(engine, problems))}
    openable = [engine for engine in engines if engine.name not in unmade]
    workers, loaded, missing = start_all(openable, start, folder, threads, plan.sabotage)
    missing |= unmade
    outputs: dict[str, agreement.Outputs] = {}
    for name, worker in list(workers.items()):
        try:
            outputs[name] = worker.ask(do="outputs", sequences=workloads.check_sequences())["outputs"]
        except EngineFailed as failure:
            missing[name] = str(failure)
            workers.pop(name).close()
    reference = next((name for name in agreement.REFERENCES if name in outputs), None)
    report: dict[str, dict[str, Any]] = {}
    for engine in engines:
        name = engine.name
        entry: dict[str, Any] = {"family": engine.family, "backend": engine.backend, "precision": engine.precision}
        report[name] = entry
        if name in missing:
            entry |= {"status": "missing", "reason": missing[name]}
        elif reference is None:
            entry |= {"status": "disagrees", "reason": "no fp32 engine runs that it could be compared with"}
        else:
            verdict = agreement.compare(outputs[name], outputs[reference], engine.precision)
            status = "ok" if verdict["agrees"] else "disagrees"
            entry |= {"status": status, "agreement": verdict | {"reference": reference}, **loaded[name]}
            if not verdict["agrees"]:
                entry["reason"] = f"{verdict['reason']} ({reference})"
        if entry["status"] != "ok":
            say(f"{name} {entry['status']}: {entry['reason']}")
            if name in workers:
                workers.pop(name).close()
    return workers, report


def _growth(
    plan: Plan, environments: Environments, folder: Path, able: list[Engine], workers: dict[str, Worker]
) -> dict[str, Any]:
    """With length, with batch size, and with threads."""
    engines = [engine for engine in able if engine.family in GROWTH_FAMILIES]
    limits = Limits(repeats=min(3, plan.limits.repeats), cell_seconds=5, warm_up_seconds=5, skip_seconds=60)
    lengths = [f"1x{length}" for length in workloads.GROWTH_LENGTHS]
    sizes = [f"{size}x{workloads.GROWTH_BATCH_LENGTH}" for size in workloads.GROWTH_BATCHES]
    by_threads = ("1x100", "1x512", "8x256")

    def measure(chosen: dict[str, Worker], names: list[str]) -> dict[str, Any]:
        batches = {name: workloads.sequences(name) for name in names}
        return Rounds(chosen, batches, limits, always=_always(engines)).run()

    say(f"growth with length and batch: {', '.join(engine.name for engine in engines)}")
    same = {engine.name: workers[engine.name] for engine in engines}
    found: dict[str, Any] = {"length": measure(same, lengths), "batch": measure(same, sizes), "threads": {}}
    counts = sorted({1, 2, plan.threads} - {0})
    for threads in (count for count in counts if count <= plan.threads):
        say(f"growth with threads: {threads}")
        if threads == plan.threads:
            found["threads"][str(threads)] = measure(same, list(by_threads))
            continue
        others, _ = _start(plan, environments, folder, engines, threads, {})
        try:
            found["threads"][str(threads)] = measure(others, list(by_threads))
        finally:
            for worker in others.values():
                worker.close()
    return found


def _variants(engines: list[Engine]) -> dict[str, list[str]]:
    """numpyesm computes only what is asked for: mean embeddings alone are timed too."""
    return {engine.name: ["mean"] for engine in engines if engine.ours}


def _always(engines: list[Engine]) -> frozenset[str]:
    return frozenset(engine.name for engine in engines if engine.ours or engine.name == REFERENCE)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
