"""`python -m bench`: measure, write JSON and a table."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from numpyesm import __version__

from . import workloads
from .engines import RESULTS, interpreters, select, set_up
from .measure import Limits
from .report import write_all
from .run import PARTS, Plan, run, say
from .weights import shape_of

_QUICK = Limits(repeats=3, cell_seconds=10, warm_up_seconds=2, skip_seconds=24)
_FULL = Limits(repeats=5, cell_seconds=30, warm_up_seconds=5, skip_seconds=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    p.add_argument("--full", action="store_true", help="adds 8x2048, growth with length, batch and threads, repeats")
    p.add_argument("--setup", action="store_true", help="make the peers' environments first")
    p.add_argument("--engines", type=_words, help="names or families, separated by commas (all)")
    p.add_argument("--workloads", type=_words, help=f"of {', '.join(workloads.FULL)}, or any NxL and varlenN")
    p.add_argument("--only", type=_words, help=f"of {', '.join(PARTS)}")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="(%(default)s)")
    p.add_argument("--repeats", type=int, help="turns of an engine at a workload; short runs come five in a turn")
    p.add_argument("--output", type=Path, help=f"folder ({RESULTS}; in it, one for --full and one for partial runs)")
    p.add_argument("--model", default="esm2-35m", help="a preset, or its first layers: esm2-3b/4 (%(default)s)")
    return p


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def plan_of(options: argparse.Namespace) -> Plan:
    """Return what the options ask for; ValueError for an unknown engine, workload, part or model."""
    limits = _FULL if options.full else _QUICK
    names = options.workloads or (workloads.FULL if options.full else workloads.QUICK)
    for name in names:
        workloads.sequences(name)
    if unknown := set(options.only or ()) - set(PARTS):
        raise ValueError(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if not 1 <= options.threads <= (os.cpu_count() or 1):
        raise ValueError(f"--threads {options.threads}: this machine has {os.cpu_count()} CPUs")
    shape_of(options.model)
    return Plan(
        mode="full" if options.full else "quick",
        engines=select(options.engines),
        names=tuple(names),
        threads=options.threads,
        limits=replace(limits, repeats=options.repeats or limits.repeats),
        parts=tuple(options.only or PARTS),
        repeats=3 if options.full else 1,
        growth=workloads.GROWTH if options.full else (),
        model=options.model,
    )


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    try:
        plan = plan_of(options)
        partial = options.engines or options.workloads or options.only or options.model != "esm2-35m"
        output = options.output or RESULTS / ("partial" if partial else f"v{__version__}" if options.full else "")
        output.mkdir(parents=True, exist_ok=True)  # now, not after an hour of measuring
    except (ValueError, OSError) as error:
        p.error(str(error))
    if options.setup:
        set_up()
    result = run(plan, interpreters())
    markdown = write_all(result, output)
    print(markdown.read_text())
    say(f"{result['minutes']:.1f} minutes; {markdown} and the files beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
