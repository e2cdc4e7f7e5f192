"""From a run's JSON to a Markdown table and a plot: `python -m bench.report JSON [--output DIR]`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .engines import OURS, REFERENCE
from .machine import slug
from .plot import plot

Result = dict[str, Any]
NOISY = 0.05  # share of the machine that others may take before the report says so


def write_all(result: Result, folder: Path) -> Path:
    """`<date>-<cpu>-<mode>.json`, `latest.json`, `.md` and, with matplotlib, `.png`; returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    named = folder / f"{result['date'][:10]}-{slug(result['machine']['cpu'])}-{result['mode']}.json"
    named.write_text(json.dumps(result, indent=1) + "\n")
    shutil.copyfile(named, folder / "latest.json")
    return write_report(result, folder)


def write_report(result: Result, folder: Path) -> Path:
    """The Markdown and the plot of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    problem = plot(result, folder / "latest.png")
    if problem:
        print(f"no plot: {problem}", file=sys.stderr)
    path = folder / "latest.md"
    path.write_text(markdown(result))
    return path


def markdown(result: Result) -> str:
    """All tables of a run."""
    sections = [
        _header(result),
        _seconds(result),
        _against_best_peer(result),
        _against_reference(result),
        _share_of_peak(result),
        _contacts(result),
        _cold_start(result),
        _growth(result),
        _agreement(result),
        _absent(result),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def lane_cells(result: Result, lane: str) -> dict[str, dict[str, Any]]:
    """Cells of one engine or variant, by workload."""
    cells: dict[str, dict[str, Any]] = result["timings"].get(lane, {})
    return cells


def median_of(result: Result, lane: str, workload: str) -> float | None:
    """Median seconds of a cell; None if it was not timed."""
    value: float | None = lane_cells(result, lane).get(workload, {}).get("median")
    return value


def ready(result: Result) -> list[str]:
    """Engines that were timed."""
    return [name for name, engine in result["engines"].items() if engine["status"] == "ok"]


def best_peer(result: Result, precision: str, workload: str) -> tuple[str, float] | None:
    """The fastest engine of others at one workload in one precision."""
    found = [
        (seconds, name)
        for name in ready(result)
        if result["engines"][name]["precision"] == precision and result["engines"][name]["family"] != OURS
        if (seconds := median_of(result, name, workload)) is not None
    ]
    return (min(found)[1], min(found)[0]) if found else None


def left_out(result: Result, precision: str, workload: str) -> list[str]:
    """Engines of others in one precision that have no time at one workload: any of them may be the fastest."""
    return [
        name
        for name in ready(result)
        if result["engines"][name]["precision"] == precision
        and result["engines"][name]["family"] != OURS
        and median_of(result, name, workload) is None
    ]


def _header(result: Result) -> str:
    machine = result["machine"]
    lines = [
        f"Measured on {result['date'][:10]} ({result['mode']} run): {machine['cpu']}, {machine['cpus']} CPUs "
        f"({', '.join(machine['isa']) or 'no wide SIMD'}), {result['threads']} threads, {result['model']} with random "
        f"weights, {machine['system']}, commit {machine['commit']}. "
        "All engines took turns in one run, on the same weights; their outputs were compared first."
    ]
    peaks = result.get("peaks", {})
    counts = [
        count for count in dict.fromkeys((1, result["threads"])) if any(peak_of(p, count) for p in peaks.values())
    ]
    for count in counts:
        parts = [f"{name} {value:,.0f}" for name, peak in peaks.items() if (value := peak_of(peak, count)) is not None]
        lines.append(
            f"The machine's own peak in this run, {count} thread{'s' if count > 1 else ''}, billions of operations a "
            f"second: {', '.join(parts)}."
        )
    methods = [f"{name} {peak['method']}" for name, peak in peaks.items() if "method" in peak]
    if methods:
        lines.append(f"What those peaks are of: {', '.join(methods)}.")
    load = result.get("other_load", 0.0)
    if load > NOISY:
        lines.append(
            f"**Noisy: other processes used {100 * load:.0f} % of the machine while the engines were timed.** "
            "Ratios are indications only."
        )
    return "\n\n".join(lines)


def _seconds(result: Result) -> str:
    names = list(result["workloads"])
    if not names:
        return ""
    lanes = sorted(ready(result), key=lambda n: (_precision_rank(result, n), result["engines"][n]["family"] != OURS))
    rows = []
    for lane in lanes:
        peak = max((cell["peak_mb"] for cell in lane_cells(result, lane).values()), default=0)
        cells = [_seconds_cell(lane_cells(result, lane).get(w)) for w in names]
        rows.append([bold(lane), *cells, f"{peak:,.0f}" if peak else "–"])
        mean = f"{lane}:mean"
        if mean in result["timings"]:
            rows.append([f"{lane}, mean only", *(_seconds_cell(lane_cells(result, mean).get(w)) for w in names), ""])
    table = table_of(["", *names, "peak MB"], rows)
    return (
        "**Seconds**, median (best): last layer's representations and logits. Padded engines get batches of at most "
        f"4096 tokens, sorted by length. Memory: the most that the process has held in all of these.\n\n{table}"
    )


def _against_best_peer(result: Result) -> str:
    names = list(result["workloads"])
    rows = []
    for lane in (n for n in ready(result) if result["engines"][n]["family"] == OURS):
        row = [bold(lane)]
        for workload in names:
            precision = result["engines"][lane]["precision"]
            peer, ours = best_peer(result, precision, workload), median_of(result, lane, workload)
            without = "".join(f", without {name}" for name in left_out(result, precision, workload))
            row.append(f"{peer[1] / ours:.2f} ({peer[0]}{without})" if peer and ours else "–")
        rows.append(row)
    if not rows or not names:
        return ""
    return f"**Times faster than the best peer of the same precision** (which one)\n\n{table_of(['', *names], rows)}"


def _against_reference(result: Result) -> str:
    names = list(result["workloads"])
    if REFERENCE not in ready(result) or not names:
        return ""
    rows = []
    for lane in (n for n in ready(result) if n != REFERENCE):
        row = [bold(lane)]
        for workload in names:
            theirs, own = median_of(result, REFERENCE, workload), median_of(result, lane, workload)
            row.append(f"{theirs / own:.2f}" if theirs and own else "–")
        rows.append(row)
    return f"**Times faster than {REFERENCE}**\n\n{table_of(['', *names], rows)}"


def _share_of_peak(result: Result) -> str:
    names = list(result["workloads"])
    rows = []
    for lane in (n for n in ready(result) if result["engines"][n]["family"] == OURS):
        peak = peak_of(result.get("peaks", {}).get(result["engines"][lane]["precision"], {}), result["threads"])
        if peak is None:
            continue
        row = [bold(lane)]
        for workload in names:
            seconds = median_of(result, lane, workload)
            row.append(f"{result['workloads'][workload]['gflops'] / seconds / peak:.2f}" if seconds else "–")
        rows.append(row)
    if not rows or not names:
        return ""
    return (
        "**Share of the machine's peak** in the engine's precision (all arithmetic counted at that peak; the LM head "
        f"is in float32 always, attention in bf16 at the narrowest)\n\n{table_of(['', *names], rows)}"
    )


def _contacts(result: Result) -> str:
    contacts = result.get("contacts", {})
    lengths = list(dict.fromkeys(length for cells in contacts.values() for length in cells))
    rows = []
    for name, cells in contacts.items():
        row = [bold(name)]
        for length in lengths:
            cell, base = cells.get(length, {}), contacts.get(REFERENCE, {}).get(length, {})
            if "median" not in cell:
                row.append(f"– {cell.get('missing', '')}".strip())
                continue
            text = f"{short(cell['median'])} s, {cell['median_peak_mb']:,.0f} MB"
            if "median" in base and name != REFERENCE:
                times = base["median"] / cell["median"]
                text += f" ({times:.1f}× faster, {base['median_peak_mb'] / cell['median_peak_mb']:.1f}× less memory)"
            if not cell.get("agreement", {"agrees": True})["agrees"]:
                text += f" **disagrees by {cell['agreement']['max_difference']:.2g}**"
            row.append(text)
        rows.append(row)
    if not rows:
        return ""
    heads = [f"1×{length}" for length in lengths]
    return (
        "**Contact map of one sequence**, each in a fresh process: seconds of the warm call, peak memory of the "
        f"process\n\n{table_of(['', *heads], rows)}"
    )


def _cold_start(result: Result) -> str:
    rows = [
        [bold(name), short(cell["median"]), short(cell["best"]), f"{cell['median_peak_mb']:,.0f}"]
        if "median" in cell
        else [bold(name), f"– {cell.get('missing', '')}".strip(), "", ""]
        for name, cell in sorted(result.get("cold_start", {}).items(), key=lambda item: item[1].get("median", 1e9))
    ]
    text = ""
    if rows:
        table = table_of(["", "median s", "best s", "peak MB"], rows)
        text = f"**Cold start**: starting Python to the first embedding of 100 residues\n\n{table}"
    cost = result.get("import")
    if cost:
        text += (
            f"\n\n`import numpyesm` takes {1000 * cost['extra_seconds']:.0f} ms more than `import numpy` "
            f"(median of {len(cost['samples']['numpy'])}; best against best {1000 * cost['extra_best']:.0f} ms)."
        )
    return text.strip()


def _growth(result: Result) -> str:
    growth = result.get("growth")
    if not growth:
        return ""
    parts = []
    for title, lanes in (
        ("length, one sequence", growth["length"]),
        ("batch size, 128 residues", growth["batch"]),
    ):
        names = list(next(iter(lanes.values()), {}))
        rows = [[bold(lane), *(_seconds_cell(cells[n], best=False) for n in names)] for lane, cells in lanes.items()]
        parts.append(f"**Growth with {title}**, median seconds\n\n{table_of(['', *names], rows)}")
    counts = list(growth["threads"])
    lanes = growth["threads"][counts[-1]]
    names = list(next(iter(lanes.values()), {}))
    rows = []
    for lane in lanes:
        row = [bold(lane)]
        for name in names:
            values = [growth["threads"][count].get(lane, {}).get(name, {}).get("median") for count in counts]
            row.append(" / ".join("–" if value is None else short(value) for value in values))
        rows.append(row)
    parts.append(f"**Growth with threads** ({' / '.join(counts)}), median seconds\n\n{table_of(['', *names], rows)}")
    return "\n\n".join(parts)


def _agreement(result: Result) -> str:
    rows = []
    for name, engine in result["engines"].items():
        verdict = engine.get("agreement", {})
        if "max_difference" in verdict:
            versions = ", ".join(f"{package} {number}" for package, number in engine.get("versions", {}).items())
            far, cosine = f"{verdict['max_difference']:.1e}", f"{verdict['min_cosine']:.6f}"
            rows.append([bold(name), far, cosine, "yes" if verdict["agrees"] else "**no**", versions])
    if not rows:
        return ""
    reference = next(
        e["agreement"]["reference"] for e in result["engines"].values() if "reference" in e.get("agreement", {})
    )
    return (
        f"**Agreement** with {reference} on {len(rows)} engines: mean embeddings and logits of three short sequences, "
        f"the worst of them\n\n{table_of(['', 'largest difference', 'cosine', 'agrees', 'versions'], rows)}"
    )


def _absent(result: Result) -> str:
    lines = [
        f"- {name} {engine['status']}: {engine['reason']}"
        for name, engine in result["engines"].items()
        if engine["status"] != "ok"
    ]
    for name, peak in result.get("peaks", {}).items():
        if "missing" in peak:
            lines.append(f"- {name} peak missing: {peak['missing']}")
    for lane, cells in result["timings"].items():
        if result["engines"][lane.split(":")[0]]["status"] == "ok":
            lines += [f"- {lane} at {workload} {cell['note']}" for workload, cell in cells.items() if cell["note"]]
    lines += [f"- export {step} failed: {reason}" for step, reason in result.get("exports", {}).items()]
    return "**Not measured**\n\n" + "\n".join(lines) if lines else ""


def peak_of(peak: dict[str, Any], threads: int) -> float | None:
    """The machine's peak in one precision; None if it was not measured."""
    value: float | None = peak.get("gops", {}).get(str(threads))
    return value


def _precision_rank(result: Result, name: str) -> int:
    return ("fp32", "bf16", "int8").index(result["engines"][name]["precision"])


def bold(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS) else name


def _seconds_cell(cell: dict[str, Any] | None, *, best: bool = True) -> str:
    if not cell or "median" not in cell:
        return "–"
    return f"{short(cell['median'])} ({short(cell['best'])})" if best else short(cell["median"])


def short(seconds: float) -> str:
    """Three significant digits."""
    if seconds >= 10:
        return f"{seconds:.1f}"
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.4f}"


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    p.add_argument("json", type=Path)
    p.add_argument("--output", type=Path, help="folder; default that of the JSON file")
    options = p.parse_args(arguments)
    try:
        result = json.loads(options.json.read_text())
    except (OSError, ValueError) as error:
        print(f"{options.json}: {error}", file=sys.stderr)
        return 1
    print(write_report(result, options.output or options.json.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
