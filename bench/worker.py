"""One engine in a process of its own: reads JSON lines on stdin, answers each with one on stdout.

`python -m bench.worker` runs in the engine's environment. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import Adapter, make_adapter


def peak_memory_mb() -> float:
    """Largest resident size of this process so far.

    From /proc where there is one: `ru_maxrss` also counts what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024**2 if sys.platform == "darwin" else 1024)


def load(request: dict[str, Any]) -> Adapter:
    """The adapter that a request names."""
    return make_adapter(
        request["family"], request["backend"], request["precision"], Path(request["path"]), request["threads"]
    )


class Session:
    """What a worker remembers between requests."""

    def __init__(self) -> None:
        self.adapter: Adapter | None = None
        self.workloads: dict[str, list[str]] = {}
        self.sabotage = 0.0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        do = request["do"]
        if do == "load":
            start = time.perf_counter()
            self.adapter = load(request)
            self.sabotage = request["sabotage"]
            return {"seconds": time.perf_counter() - start, "versions": self.adapter.versions()}
        if do == "workload":
            self.workloads[request["name"]] = request["sequences"]
            return {}
        assert self.adapter is not None
        if do == "outputs":
            return {"outputs": self._outputs(self.adapter, request["sequences"])}
        if do == "run":
            batch = self.workloads[request["name"]]
            start = time.perf_counter()
            self.adapter.run(batch, request["outputs"])
            return {"seconds": time.perf_counter() - start, "peak_mb": peak_memory_mb()}
        raise ValueError(f"unknown request {do!r}")

    def _outputs(self, adapter: Adapter, batch: Sequence[str]) -> list[dict[str, Any]]:
        found = []
        for mean, logits in adapter.outputs(batch):
            # Only when the check itself is checked.
            noise = self.sabotage * np.random.default_rng(0).standard_normal(logits.shape)
            found.append({"mean": np.asarray(mean).tolist(), "logits": (np.asarray(logits) + noise).tolist()})
        return found


def private_stdout() -> Any:
    """A stream on the real stdout, while everything else that is printed goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def main() -> None:
    out = private_stdout()
    session = Session()
    for line in sys.stdin:
        try:
            answer = session.answer(json.loads(line))
        except Exception as error:
            message = " ".join(str(error).split())[:400]
            answer = {"error": f"{type(error).__name__}: {message}"}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
