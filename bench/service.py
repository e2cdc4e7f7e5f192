"""`python -m bench.service`: the service against the library called directly, on the same model and machine.

Requests a second and p50/p99 at 1, 16 and 64 clients for one sequence of 100 (mean) and for 8×256; the milliseconds
that the service adds at one client; and the share of a request for per_token of 8×512 that writing JSON takes. The
library and the service take turns, at one client call by call, so that a machine that slows down slows both. Clients
run in one asyncio process beside the service and share its CPUs, as users on the same machine would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
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
from numpyesm.alphabet import AMINO_ACIDS
from numpyesm.formats import gzip_pieces, json_results

CLIENTS = (1, 16, 64)
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}


def sequences(count: int, length: int) -> list[str]:
    """Random proteins, always the same."""
    chosen = random.Random(f"{count} {length}")
    return ["".join(chosen.choices(AMINO_ACIDS, k=length)) for _ in range(count)]


WORKLOADS = {"1×100": sequences(1, 100), "8×256": sequences(8, 256)}


def start_service(weights: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The process and its address."""
    command = [sys.executable, "-m", "numpyesm", "serve", "--port", "0", "--model", f"esm2-35m={weights}", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"on http://(\S+:\d+)/", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            address = f"http://{found[1]}"
            while True:
                try:
                    if httpx.get(f"{address}/readyz").status_code == 200:
                        return process, address
                except httpx.ConnectError:
                    time.sleep(0.05)
    raise SystemExit("the service did not start")


def time_library(model: ESM2, batch: list[str], seconds: float) -> list[float]:
    """Seconds of each call, one after the other."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        model.encode(batch)
        taken.append(time.perf_counter() - start)
    return taken


def time_in_turn(model: ESM2, address: str, batch: list[str], seconds: float) -> tuple[list[float], list[float]]:
    """Seconds of calls and of requests, one of each in turn."""
    body = json.dumps({"items": [{"sequence": sequence} for sequence in batch]}).encode()
    called: list[float] = []
    asked: list[float] = []
    with httpx.Client(base_url=address, timeout=300) as http:
        end = time.perf_counter() + 2 * seconds
        while time.perf_counter() < end or len(asked) < 3:
            called += time_library(model, batch, 0)[:1]
            start = time.perf_counter()
            http.post("/api/v3/esm2-35m/encode/", content=body, headers=HEADERS).raise_for_status()
            asked.append(time.perf_counter() - start)
    return called, asked


async def time_service(address: str, batch: list[str], clients: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of each request, and requests a second of all clients together."""
    body = json.dumps({"items": [{"sequence": sequence} for sequence in batch]}).encode()
    taken: list[float] = []

    async def client(http: httpx.AsyncClient, end: float) -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            response = await http.post("/api/v3/esm2-35m/encode/", content=body, headers=HEADERS)
            assert response.status_code == 200, response.text
            taken.append(time.perf_counter() - start)

    async with httpx.AsyncClient(
        base_url=address, timeout=300, limits=httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    ) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http, start + seconds) for _ in range(clients)))
        return taken, len(taken) / (time.perf_counter() - start)


def measure_json(model: ESM2) -> dict[str, float]:
    """Milliseconds of the parts of a request for per_token of 8×512."""
    batch = sequences(8, 512)
    compute = _best(lambda: model.encode(batch, include=["per_token"]))
    results = model.encode(batch, include=["per_token"])
    plain = _best(lambda: b"".join(json_results(results)))
    zipped = _best(lambda: b"".join(gzip_pieces(json_results(results))))
    total = compute + plain
    return {
        "compute_ms": compute * 1e3,
        "json_ms": plain * 1e3,
        "json_and_gzip_ms": zipped * 1e3,
        "json_share": plain / total,
        "json_and_gzip_share": zipped / (compute + zipped),
        "json_mb": len(b"".join(json_results(results))) / 1e6,
    }


def _best(work: Callable[[], Any], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    options = ["--backend", arguments.backend, "--precision", arguments.precision]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ESM2.from_pretrained(arguments.weights, backend=arguments.backend, precision=arguments.precision)
    rows: list[dict[str, Any]] = []
    process, address = start_service(arguments.weights, options)
    try:
        for name, batch in WORKLOADS.items():
            time_library(model, batch, 0)
            for clients in CLIENTS:
                if clients == 1:
                    direct, taken = time_in_turn(model, address, batch, arguments.seconds)
                    rate = len(taken) / sum(taken)
                else:
                    # The library before and after; its median is what the service is held against.
                    direct = time_library(model, batch, arguments.seconds / 2)
                    taken, rate = asyncio.run(time_service(address, batch, clients, arguments.seconds))
                    direct += time_library(model, batch, arguments.seconds / 2)
                p50, p99 = np.percentile(taken, [50, 99]) * 1e3
                library = float(np.median(direct))
                rows.append(
                    {
                        "workload": name,
                        "clients": clients,
                        "requests_per_second": rate,
                        "p50_ms": float(p50),
                        "p99_ms": float(p99),
                        "library_ms": library * 1e3,
                        "of_library": rate * library,
                        "added_ms": float(p50) - library * 1e3 if clients == 1 else None,
                    }
                )
                print(_row(rows[-1]), file=sys.stderr, flush=True)
        parts = measure_json(model)
    finally:
        process.terminate()
        process.wait()
    return {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()},
        "model": repr(model),
        "rows": rows,
        "json_8x512_per_token": parts,
    }


def _row(row: dict[str, Any]) -> str:
    added = "" if row["added_ms"] is None else f"{row['added_ms']:.1f}"
    return (
        f"| {row['workload']} | {row['clients']} | {row['requests_per_second']:.2f} | {row['p50_ms']:.0f} | "
        f"{row['p99_ms']:.0f} | {row['library_ms']:.1f} | {row['of_library']:.2f} | {added} |"
    )


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    parts = figures["json_8x512_per_token"]
    lines = [
        "| workload | clients | requests/s | p50 ms | p99 ms | library ms | share of library's throughput | added ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *map(_row, figures["rows"]),
        "",
        f"per_token of 8×512: compute {parts['compute_ms']:.0f} ms, JSON ({parts['json_mb']:.0f} MB) "
        f"{parts['json_ms']:.0f} ms, {parts['json_share']:.1%} of the request; with gzip "
        f"{parts['json_and_gzip_ms']:.0f} ms, {parts['json_and_gzip_share']:.1%}.",
        "",
        f"{figures['model']}; load {figures['machine']['load'][0]:.1f} on {figures['machine']['cpus']} CPUs.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print; `--json FILE` keeps the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__)
    parser.add_argument("--weights", default="synthetic:esm2-35m")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seconds", type=float, default=10, help="for each row (%(default)s)")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    figures = run(arguments)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)
    print(table(figures), end="")


if __name__ == "__main__":
    main()
