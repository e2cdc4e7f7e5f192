"""A fresh process for one measurement: cold start, or a contact map.

`python -m bench.once REQUEST` prints one JSON line.
The request is a worker's load request with `what`: `first` (open the weights, embed one sequence) or `contacts`.
"""

from __future__ import annotations

import json
import sys
import time

from .worker import load, peak_memory_mb, private_stdout
from .workloads import random_sequence

CONTACT_SAMPLES = 12  # rows and columns of the map that are sent back for comparison


def main() -> None:
    request = json.loads(sys.argv[1])
    out = private_stdout()
    adapter = load(request)
    if request["what"] == "first":
        adapter.run([random_sequence(100, 1)], "mean")
        answer = {"peak_mb": peak_memory_mb()}
    else:
        sequence = random_sequence(request["length"], 1)
        adapter.contacts(sequence[:16])  # what is compiled or allocated once
        start = time.perf_counter()
        contacts = adapter.contacts(sequence)
        seconds = time.perf_counter() - start
        step = max(1, len(sequence) // CONTACT_SAMPLES)
        answer = {
            "seconds": seconds,
            "peak_mb": peak_memory_mb(),
            "sample": contacts[::step, ::step].tolist(),
        }
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
