"""`python -m bench`: run, write JSON, table and plot."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from numpyesm.weights.synthetic import parse_synthetic

from . import workloads
from .engines import RESULTS, Environments, select
from .environments import set_up
from .measure import Limits
from .report import write_all
from .run import Plan, run, say

_QUICK = Limits(repeats=3, cell_seconds=10, warm_up_seconds=2, skip_seconds=24, variant_skip_seconds=4)
_FULL = Limits(repeats=5, cell_seconds=30, warm_up_seconds=5, skip_seconds=120, variant_skip_seconds=15)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="the default: about 8 minutes on two cores")
    mode.add_argument("--full", action="store_true", help="adds 8x2048, growth and repeats: under 45 minutes")
    p.add_argument("--setup", action="store_true", help="make .venv-bench and .venv-bench-esm-cpp first")
    p.add_argument("--setup-only", action="store_true", help="make them and stop")
    p.add_argument("--engines", type=_words, help="names or families, separated by commas; default all")
    p.add_argument("--workloads", type=_words, help=f"of {', '.join(workloads.FULL)}, or any NxL; none for no timings")
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--repeats", type=int, help="timed runs of a cell at most")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--model", default="esm2-35m", help="a preset of numpyesm")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--skip", type=_words, default=[], help="of contacts, cold, import, growth, peaks")
    p.add_argument("--peers-python", type=Path, help="interpreter with the peers; default .venv-bench, else this one")
    p.add_argument("--esm-cpp-python", type=Path, help="interpreter with esm-cpp; default .venv-bench-esm-cpp")
    p.add_argument("--sabotage", metavar="ENGINE", help="add noise to its outputs: the comparison must notice")
    return p


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word and word != "none"]


def plan_of(options: argparse.Namespace) -> Plan:
    """What the options ask for.

    Raises
    ------
    ValueError
        An unknown engine, workload or model, or an interpreter that is not there.
    """
    limits = _FULL if options.full else _QUICK
    if options.repeats is not None:
        if options.repeats < 1:
            raise ValueError("--repeats must be at least 1")
        limits = replace(limits, repeats=options.repeats)
    names = options.workloads if options.workloads is not None else workloads.FULL if options.full else workloads.QUICK
    for name in names:
        count, _, length = name.partition("x")
        if name != "varlen256" and not (
            count.isdigit() and length.isdigit() and int(count) and 1 <= int(length) <= 2048
        ):
            raise ValueError(f"workload {name!r}: expected varlen256 or NxL with L from 1 to 2048")
    if not 1 <= options.threads <= (os.cpu_count() or 1):
        raise ValueError(f"--threads {options.threads}: this machine has {os.cpu_count()} CPUs")
    unknown = set(options.skip) - {"contacts", "cold", "import", "growth", "peaks"}
    if unknown:
        raise ValueError(f"--skip {', '.join(sorted(unknown))}: allowed are contacts, cold, import, growth, peaks")
    parse_synthetic(f"synthetic:{options.model}:{options.seed}")
    for python in (options.peers_python, options.esm_cpp_python):
        if python is not None and not os.access(python, os.X_OK):
            raise ValueError(f"{python}: there is no interpreter")
    return Plan(
        mode="full" if options.full else "quick",
        engines=select(options.engines),
        names=tuple(names),
        threads=options.threads,
        limits=limits,
        contact_repeats=0 if "contacts" in options.skip else 3 if options.full else 1,
        cold_repeats=0 if "cold" in options.skip else 5 if options.full else 3,
        import_repeats=0 if "import" in options.skip else 40 if options.full else 15,
        growth=options.full and "growth" not in options.skip,
        peaks="peaks" not in options.skip,
        model=options.model,
        seed=options.seed,
        sabotage=options.sabotage,
    )


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    try:
        plan = plan_of(options)
        options.output.mkdir(parents=True, exist_ok=True)  # now, not after an hour of measuring
    except (ValueError, OSError) as error:
        p.error(str(error))
    if options.setup or options.setup_only:
        set_up()
        if options.setup_only:
            return 0
    environments = Environments.find(options.peers_python, options.esm_cpp_python)
    result = run(plan, environments)
    markdown = write_all(result, options.output)
    print(markdown.read_text())
    say(f"{result['minutes']:.1f} minutes; {markdown} and the files beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
