"""One engine in a process of its own: reads JSON lines on stdin and answers each with one on stdout.

`python -m bench.worker` runs in the engine's environment. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import ADAPTERS, Adapter


def peak_memory_mb() -> float:
    """Largest resident size of this process so far; 0 without /proc (`ru_maxrss` counts what the parent held, too)."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


class Session:
    """What a worker remembers between requests."""

    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.workloads: dict[str, list[str]] = {}

    def answer(self, do: str, **request: Any) -> dict[str, Any]:
        """Answer one request: `load`, `workload`, `run`, `outputs`, `contacts` or `scan`."""
        start = time.perf_counter()
        if do == "load":
            options = (request[name] for name in ("precision", "threads", "backend"))
            self.adapter = ADAPTERS[request["family"]](Path(request["path"]), *options)
            assert self.adapter is not None
            return {"versions": self.adapter.versions()}
        if do == "workload":
            self.workloads[request["name"]] = request["sequences"]
            return {}
        assert self.adapter is not None
        if do == "run":
            self.adapter.run(self.workloads[request["name"]], request["outputs"])
        elif do == "outputs":
            arrays: dict[str, Any] = {}
            for i, (rows, logits) in enumerate(self.adapter.outputs(request["sequences"])):
                arrays |= {f"rows{i}": rows, f"logits{i}": logits}
            np.savez(request["file"], **arrays)
        else:
            values = getattr(self.adapter, do)(request["sequence"])
            seconds = time.perf_counter() - start
            np.savez(request["file"], values=values)
            return {"seconds": seconds, "peak_mb": peak_memory_mb()}
        return {"seconds": time.perf_counter() - start, "peak_mb": peak_memory_mb()}


def main() -> None:
    # The real stdout is for answers alone; everything else that is printed goes to stderr.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        try:
            answer = session.answer(**json.loads(line))
        except Exception as error:
            message = " ".join(str(error).split())[:400]
            answer = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
