"""The picture of a run, if matplotlib is there: here, or in the peers' environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from .engines import OURS, PEERS_VENV, ROOT, venv_python

_COLOURS = {"fp32": "#4477aa", "bf16": "#ee9944", "int8": "#66aa55"}


def plot(result: dict[str, Any], path: Path) -> str:
    """Write a PNG; returns why it could not, or an empty string."""
    if not result["workloads"]:
        return "nothing was timed"
    try:
        _draw(result, path)
    except ImportError as error:
        python = venv_python(PEERS_VENV)
        if python.exists() and Path(sys.prefix) != PEERS_VENV:
            run = subprocess.run(
                [str(python), "-m", "bench.plot", str(path)],
                cwd=ROOT,
                input=json.dumps(result),
                capture_output=True,
                text=True,
                check=False,
            )
            return "" if run.returncode == 0 else run.stderr.strip().rsplit("\n", 1)[-1]
        return f"{error}; install matplotlib (the plot extra)"
    return ""


def _draw(result: dict[str, Any], path: Path) -> None:
    """One panel a workload: a bar an engine, shortest on top, ours filled and the others hatched."""
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    names = list(result["workloads"])
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, workload in zip(grid.flat, names, strict=False):
        bars = sorted(
            (cells[workload]["median"], name)
            for name, cells in result["timings"].items()
            if name in result["engines"] and "median" in cells.get(workload, {})
        )
        for position, (seconds, name) in enumerate(bars):
            engine = result["engines"][name]
            ours = engine["family"] == OURS
            axes.barh(
                position,
                seconds,
                color=_COLOURS[engine["precision"]] if ours else "white",
                edgecolor=_COLOURS[engine["precision"]],
                hatch=None if ours else "///",
            )
            axes.text(seconds, position, f" {seconds:.3g}", va="center", fontsize=7)
        axes.set_yticks(range(len(bars)), [name for _, name in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set_title(workload, fontsize=10)
        axes.set_xlabel("seconds", fontsize=8)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, list(_COLOURS), loc="upper right", fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"{result['model']}, {machine['cpu']}, {result['threads']} threads, {result['date'][:10]} (filled: numpyesm)",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    _draw(json.load(sys.stdin), Path(sys.argv[1]))
