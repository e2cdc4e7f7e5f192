"""`python -m bench.service`: the HTTP service against the library called directly, on the same model and machine.

Requests per second and latency at 1, 16 and 64 clients, for one sequence of 100 and for 8×256. The clients share the
service's CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np

from numpyesm import ESM2

from .report import table_of
from .workloads import sequences

CLIENTS = (1, 16, 64)
WORKLOADS = ("1x100", "8x256")
URL = "/api/v3/esm2-35m/encode/"
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


def start_service(*options: str) -> tuple[subprocess.Popen[str], str]:
    """Start `numpyesm serve`. Returns the process and its address."""
    command = [sys.executable, "-m", "numpyesm", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = next((match for line in process.stderr if (match := re.search(r"on (http://\S+:\d+)/", line))), None)
    if found is None:
        raise SystemExit("the service did not start")
    threading.Thread(target=process.stderr.read, daemon=True).start()
    while httpx.get(f"{found[1]}/readyz").status_code != 200:
        time.sleep(0.05)
    return process, found[1]


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


async def many_clients(address: str, body: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each request, and requests per second of all clients together."""
    taken: list[float] = []

    async def client(http: httpx.AsyncClient, end: float) -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            (await http.post(URL, content=body, headers=HEADERS)).raise_for_status()
            taken.append(time.perf_counter() - start)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http, start + seconds) for _ in range(clients)))
        return taken, len(taken) / (time.perf_counter() - start)


def measure(model: ESM2, address: str, name: str, clients: int, seconds: float) -> dict[str, Any]:
    """One row of the table; the library is timed before and after the service."""
    batch = sequences(name)
    body = json.dumps({"items": [{"sequence": sequence} for sequence in batch]}).encode()
    model.encode(batch)
    direct = [seconds_of(lambda: model.encode(batch)) for _ in range(5)]
    taken, rate = asyncio.run(many_clients(address, body, clients, seconds))
    direct += [seconds_of(lambda: model.encode(batch)) for _ in range(5)]
    p50, p99 = (1e3 * float(value) for value in np.percentile(taken, [50, 99]))
    library = 1e3 * float(np.median(direct))
    return {"workload": name, "clients": clients, "rate": rate, "p50_ms": p50, "p99_ms": p99, "library_ms": library}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `measure` as Markdown."""
    head = ["workload", "clients", "requests/s", "p50 ms", "p99 ms", "library ms", "share of the library's throughput"]
    shown = []
    for row in rows:
        name, clients, *numbers = (*row.values(), row["rate"] * row["library_ms"] / 1e3)
        shown.append([name, str(clients), *(f"{number:.2f}" for number in numbers)])
    return table_of(head, shown)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--weights", default="synthetic:esm2-35m")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seconds", type=float, default=10, help="of each row (%(default)s)")
    options = parser.parse_args()
    chosen = ["--backend", options.backend, "--precision", options.precision]
    warnings.simplefilter("ignore")
    model = ESM2.from_pretrained(options.weights, backend=options.backend, precision=options.precision)
    process, address = start_service("--model", f"esm2-35m={options.weights}", *chosen)
    try:
        rows = [measure(model, address, name, clients, options.seconds) for name in WORKLOADS for clients in CLIENTS]
    finally:
        process.terminate()
        process.wait()
    print(f"{table(rows)}\n\n{model}; load {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
