"""The README's section on speed, written from the figures of one run: `python -m bench.readme [RESULT.json]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .engines import OURS, REFERENCE, ROOT
from .report import NOISY, Result, best_peer, bold, lane_cells, left_out, median_of, peak_of, ready, short, table_of

START, END = "<!-- bench:start -->", "<!-- bench:end -->"

_ENGINES = (
    f"{OURS}-numpy-fp32",
    f"{OURS}-numba-fp32",
    REFERENCE,
    "transformers-fp32",
    "onnxruntime-fp32",
    "openvino-fp32",
    f"{OURS}-numba-bf16",
    "openvino-bf16",
    f"{OURS}-numba-int8",
    "onnxruntime-int8",
    "openvino-int8",
    "openvino-mixed-int8",
    "esm-cpp-int8",
)


def section(result: Result) -> str:
    """Markdown from the heading to the last sentence."""
    names, machine = list(result["workloads"]), result["machine"]
    known = {name: peak_of(peak, result["threads"]) for name, peak in result.get("peaks", {}).items()}
    peaks = ", ".join(f"{name} {value:,.0f}" for name, value in known.items() if value is not None)
    own_peak = f", whose own peak is {peaks} billion operations a second" if peaks else ""
    shown = [name for name in _ENGINES if name in ready(result)]
    rows = []
    for name in shown:
        cells = [median_of(result, name, workload) for workload in names]
        cold = result.get("cold_start", {}).get(name, {})
        rows.append(
            [
                bold(name),
                *("–" if seconds is None else short(seconds) for seconds in cells),
                f"{cold['median']:.2f} s, {cold['median_peak_mb']:,.0f} MB" if "median" in cold else "–",
            ]
        )
    ratios = []
    for name in (name for name in shown if name.startswith(OURS)):
        row = [bold(name)]
        for workload in names:
            precision = result["engines"][name]["precision"]
            peer, ours = best_peer(result, precision, workload), None
            if lane_cells(result, name).get(workload):
                ours = median_of(result, name, workload)
            mark = "*" if left_out(result, precision, workload) else ""
            row.append(f"{peer[1] / ours:.2f}{mark}" if peer and ours else "–")
        ratios.append(row)
    noise = result["other_load"]
    text = [
        "## Speed",
        f"One {result['mode']} run of `make bench` on {result['date'][:10]}: {machine['cpu']}, {result['threads']} "
        f"threads{own_peak}; random 35M weights, all engines in turn on "
        "the same numbers. Median seconds; cold start is from starting Python to the first embedding of 100 residues. "
        "All peers, best times and accuracies are in [bench/results/latest.md](bench/results/latest.md).",
        table_of(["", *names, "cold start"], rows),
        "How many times faster than the fastest other engine of the same precision:",
        table_of(["", *names], ratios),
    ]
    if any(cell.endswith("*") for row in ratios for cell in row[1:]):
        text.append("\\* One of the others was left out there as too slow for this run: the full table names it.")
    if noise > NOISY:
        text.insert(2, f"**Other processes used {100 * noise:.0f} % of the machine meanwhile.**")
    contacts = {
        name: cells["1022"] for name, cells in result.get("contacts", {}).items() if "median" in cells.get("1022", {})
    }
    if contacts:
        parts = [f"{name} {short(c['median'])} s, {c['median_peak_mb']:,.0f} MB" for name, c in contacts.items()]
        text.append(f"A contact map of 1022 residues: {'; '.join(parts)}.")
    absent = [name for name, engine in result["engines"].items() if engine["status"] != "ok"]
    if absent:
        text.append(f"Not measured, for reasons that the full table names: {', '.join(absent)}.")
    return "\n\n".join(text).replace("## Speed\n\n", "## Speed\n")


def updated(readme: str, result: Result) -> str:
    """The README with the section put between its marks."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{section(result)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results" / "latest.json"
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(), json.loads(path.read_text())))


if __name__ == "__main__":
    main()
